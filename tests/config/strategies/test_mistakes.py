"""Is a mistake in a strategy file told by its key, value, rule and remedy?"""

import pytest

from chatlearn_vllm.config import ConfigError, load_config
from tests.config.strategy_job import (
    ACTOR,
    CONFIG,
    CRITIC,
    INFER,
    JOB,
    REFERENCE,
    TRAIN,
    args_of,
    problems_of,
)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        # unknown keys, with the nearest of vLLM's, megatron-core's and this dialect's
        ("max_stps=3", "command line: max_stps=3: unknown key; did you mean max_steps?"),
        ("runtime.num_episode=3", "command line: runtime: is no key of a file that describes "
         "roles; its keys are at the top"),
        (f"{CONFIG}gpu_memory_utilisation=0.8", f"command line: {CONFIG}gpu_memory_utilisation=0.8:"
         " unknown key; did you mean gpu_memory_utilization?"),
        (f"{INFER}min_tokenz=3", "min_tokenz=3: unknown key; did you mean min_tokens?"),
        (f"{TRAIN}learnin_rate=3", "unknown key; did you mean learning_rate?"),
        ("actor_train.strategy_args.strategy_config.moe_grouped_gem=True",
         "moe_grouped_gem=True: unknown key; did you mean moe_grouped_gemm?"),
        ("actor_train.strategy_args.strategy_config.additional_configs={moe_x: 1}",
         "additional_configs.moe_x=1: is no field of megatron-core's TransformerConfig"),
        # values, by the user's key and with the user's value
        (f"{CONFIG}block_size=x", f"command line: {CONFIG}block_size='x': must be a valid integer"),
        (f"{CONFIG}sleep_level=3", f"command line: {CONFIG}sleep_level=3: must be 1 or 2"),
        (f"{CONFIG}trust_remote_code=maybe", f"command line: {CONFIG}trust_remote_code='maybe': "
         "must be a valid boolean"),
        ("actor_infer.generating_args.guided_regex=a", "guided_regex='a': unknown key: vLLM no "
         "longer has it; set structured_outputs: {regex: ...}"),
        (f"{CONFIG}load_format=dumy", "must be one of vLLM's: auto, "),
        (f"{CONFIG}load_format=dumy", "tensorizer; did you mean dummy?"),
        (f"{CONFIG}quantization=awk", "did you mean awq?"),
        ("actor_infer.model_args.disable_gradient_checkpointing=maybe", "must be True or False"),
        ("max_steps=0", "command line: max_steps=0: must be greater than or equal to 1"),
        ("rollout_batch_size=x", "command line: rollout_batch_size='x': must be a whole number"),
        ("rollout_batch_size=0", "rollout_batch_size=0: must be at least 1"),
        ("rollout_batch_size=2", "job.yaml: actor_train.training_args.gradient_accumulation_steps=2"
         ": the rows of an optimizer step, per_device_train_batch_size x "
         "gradient_accumulation_steps x data parallel size, are 32 and must be at most "
         "rollout_batch_size x num_return_sequences_in_group=8; lower them, or raise that"),
        ("loss_agg_mode=seq-mean-token-sum", "is a loss that grows with response_length; set "
         "seq-mean-token-sum-norm, which is this one divided by response_length"),
        ("actor_train.strategy_args.strategy_config={context_parallel_size: 2, additional_configs: "
         "{}}", "context_parallel_size=2: must be 1, a sequence is not split over ranks here"),
        ("loss_agg_mode=x", "loss_agg_mode='x': must be one of: token-mean, seq-mean-token-mean"),
        (f"{INFER}num_return_sequences=3", f"{INFER}num_return_sequences=3: must be "
         "num_return_sequences_in_group=4"),
        (f"{INFER}stop_strings=['a;b']", "must be a list of texts without a semicolon"),
        (f"{INFER}logprobs=None", "logprobs=None: must be 0 or more"),
        (f"{CONFIG}tensor_parallel_size=3", "job.yaml: actor_infer.device_mapping="
         "'list(range(0,2))': 2 devices are not a multiple of tensor_parallel_size x pipeline_pa"),
        ("actor_infer.device_mapping=__import__('os')", "actor_infer.device_mapping="
         "\"__import__('os')\": \"__import__('os')\" is not understood; write it as list"),
        ("actor_infer.device_mapping=[]", "actor_infer.device_mapping=[]: names no device; "
         "name some, as in list(range(0,8)) or [0, 1]"),
        ("actor_infer.device_mapping=list(range(0,${nowhere}))", "the file has no key nowhere"),
        ("actor_infer.generating_args.3=4", "generating_args.3=4: unknown key"),
        ("rewards.rule.worker_cls=3", "rewards.rule.worker_cls=3: must be text"),
        ("rewards.rule.tag_included=math", "tag_included='math': must be a list"),
        ("rewards.rule.strategy_args={strategy_name: vllm}", "rewards.rule: needs its "
         "device_mapping: vllm runs on devices"),
        ("adv_estimator=ppo", "adv_estimator='ppo': must be one of: gae, grpo, reinforce"),
        ("resume_from_checkpoint=/x", "resume_from_checkpoint='/x': must be True or False"),
        ("resume_from_checkpoint=1", "resume_from_checkpoint=1: must be True or False"),
        ("resume_from_checkpoint=[a]", "resume_from_checkpoint=['a']: must be True or False"),
        ("actor_infer.model_args={attn_implementation: eager, flash_attn: sdpa}", "command line: "
         "actor_infer.model_args.flash_attn='sdpa': is the older name of attn_implementation=eager"
         "; keep one of them"),
        ("checkpoint_config.type=oss", "must be file_system: checkpoints are written to"),
        ("norm_mean_type=running", "norm_mean_type='running': must be group, batch or null"),
        ("add_token_level_kl=True", "add_token_level_kl=True: must be False: grpo has its KL in"),
        (f"{TRAIN}warmup_steps=1000", f"{TRAIN}warmup_steps=1000: must be less than the 1000 "
         "optimizer steps of the job, at whose end lr_scheduler_type=linear is"),
        ("train_infer_correction.is_weight={enabled: True, weight_type: sequence}",
         "train_infer_correction.is_weight.weight_type='sequence': must be token"),
        ("train_infer_correction.is_weight={enabled: True, upper_bound: 0.5}",
         "train_infer_correction.is_weight.upper_bound=0.5: must be greater than or equal to 1"),
        # what another key says
        (f"{INFER}n=2", f"{INFER}n=2: is set by num_return_sequences; leave it out"),
        (f"{INFER}max_tokens=2", "is set by max_new_tokens; leave it out"),
        (f"{CONFIG}dtype=half", "dtype='half': is set by model_args.dtype; leave it out"),
        (f"{CONFIG}inference_engine=transformers", "inference_engine='transformers': is set by "
         "strategy_name, vllm or hf_infer; leave it out"),
        (f"{CONFIG}attn_implementation=eager", "attn_implementation='eager': is set by "
         "model_args.attn_implementation with hf_infer; vLLM chooses its own, or takes"),
        (f"{CONFIG}VLLM_USE_V1=0", "VLLM_USE_V1=0: must be 1: vLLM has the V1 engine only"),
        ("actor_train.model_args.disable_gradient_checkpointing=True", None),
        # strategies
        ("actor_infer.strategy_args.strategy_name=sglang", "strategy_name='sglang': the engine "
         "here is vLLM: set strategy_name: vllm"),
        ("actor_train.strategy_args.strategy_name=fsdp2_train", "training is on megatron-core"),
        ("actor_train.strategy_args.strategy_name=vllm", "takes megatron_train"),
        ("actor_train.strategy_args=None", "job.yaml: actor_train: a role needs its "
         "strategy: megatron_train"),
        ("actor_train.model_args.freeze_module_prefix=vision_model", "no part of a model can be"),
        ("response_length=None", "response_length=None: must be given, or sequence_length"),
        ("rewards=None", "rewards=None: must name at least one"),
        ("actor_infer=None", "actor_infer=None: a role needs its strategy: vllm or hf_infer"),
    ],
)  # fmt: skip
def test_a_mistake_names_the_users_key_value_and_rule(job, override, line):
    if line is None:
        load_config(job, [override])  # without recomputation in its strategy_config
        override = [
            override,
            "actor_train.strategy_args.strategy_config.recompute_granularity=full",
        ]
        assert "contradicts recompute_granularity" in problems_of(job, override)[0]
        return
    lines = problems_of(job, [override])
    assert any(line in one for one in lines), lines
    if "None" not in override and "=sglang" not in override:
        assert len(lines) == 1


@pytest.mark.parametrize(
    "override",
    ["max_steps='100'", "ppo_epochs=0", "ppo_epochs=x", "rewards=x", "rewards.rule=x",
     "actor_infer=x", "actor_infer.device_mapping=x"],
)  # fmt: skip
def test_a_wrong_value_is_told_once(job, override):
    (line,) = problems_of(job, [override])
    assert line.startswith(f"command line: {override.partition('=')[0]}=")


def test_a_file_with_models_and_roles_is_refused(write):
    path = write("job.yaml", JOB + "models: {policy: {num_gpu: 1}}\n")
    rule = "a file describes models or roles, not both; docs/strategies.md"
    assert f"job.yaml: actor_train: {rule}" in problems_of(path)


def test_a_greedy_rollout_has_one_response_per_prompt(job):
    args = args_of(job, [f"{INFER}do_sample=False", "num_return_sequences_in_group=1",
                         "rollout_batch_size=64", "adv_estimator=reinforce"])  # fmt: skip
    assert (args.temperature, args.num_inference_per_prompt) == (0.0, 1)
    (line,) = problems_of(job, [f"{INFER}do_sample=False"])
    assert f"command line: {INFER}do_sample=False: must be more than 0 with 4 responses" in line
    (line,) = problems_of(job, [f"{INFER}temperature=0"])
    assert f"command line: {INFER}temperature=0: must be more than 0 with 4 responses" in line


def test_responses_per_prompt_may_be_said_of_the_rollout_alone(job):
    loaded = load_config(
        job, ["num_return_sequences_in_group=None", f"{INFER}num_return_sequences=4"]
    )
    assert loaded.models["policy"].model_args.num_inference_per_prompt == 4
    prompts = loaded.runtime.sample_per_episode / 4
    six = load_config(job, ["num_return_sequences_in_group=None", f"{INFER}num_return_sequences=6"])
    assert six.runtime.sample_per_episode == 6 * prompts


def test_beams_are_of_the_evaluation(job):
    args = args_of(job, ["validation.generating_args.num_beams=3"])
    assert (args.num_beams, args.eval_num_beams) == (1, 3)
    (line,) = problems_of(job, [f"{INFER}num_beams=4"])
    assert f"{INFER}num_beams=4: must be 1: training takes the probability with which a" in line


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["num_return_sequences_in_group=1", "rollout_batch_size=64"],
         "command line: num_return_sequences_in_group=1: must be 2 or more: adv_estimator grpo "
         "compares the responses of a prompt, and one has nothing to be compared with; or set "
         "adv_estimator: reinforce without norm_mean_type"),
        (["num_return_sequences_in_group=None", f"{INFER}num_return_sequences=1",
          "rollout_batch_size=64"], f"command line: {INFER}num_return_sequences=1: must be 2 or"),
        (["adv_estimator=reinforce", "importance_sampling=seq"], "command line: importance_sampling"
         "='seq': must be token with adv_estimator gae or reinforce"),
        (["use_kl_loss=True", "kl_loss_coef=0.1"], "command line: use_kl_loss=True: needs the role "
         "reference, whose log-probabilities it compares with; or set use_kl_loss: False"),
        (["adv_estimator=reinforce", "add_token_level_kl=True"], "command line: add_token_level_kl="
         "True: needs the role reference"),
        ([f"{ACTOR}data_args.file_name=None"], f"command line: {ACTOR}data_args.file_name=None: "
         "must name the jsonl file, or a list of them, with the prompts of training"),
        ([f"{ACTOR}data_args.max_samples=0"], f"command line: {ACTOR}data_args.max_samples=0: "
         "leaves no record; set -1 for all, or leave it out"),
        (["validation.data_args={file_name: e, max_samples: 0}"], "command line: validation."
         "data_args.max_samples=0: leaves no record"),
        (["rewards.rule=None"], "command line: rewards.rule=None: needs worker_cls, which says how "
         "it scores: name a class of yours as package.module.Class (docs/strategies.md, Rewards)"),
        (["rewards.rule.worker_cls=None"], "job.yaml: rewards.rule: needs worker_cls, which says"),
        (["rewards.judge={strategy_args: {strategy_name: vllm}, device_mapping: [4]}"],
         "command line: rewards.judge: needs worker_cls, which says how it scores"),
        (["rewards.second={strategy_args: {strategy_name: hf_infer}}"],
         "command line: rewards.second: needs model_args.model_name_or_path, or reward_pretrain"),
        (["rewards.rule.worker_cls=Rule"], "command line: rewards.rule.worker_cls='Rule': is no "
         "class: name a class of yours as package.module.Class"),
    ],
)  # fmt: skip
def test_what_a_launch_would_refuse_is_refused_by_the_users_keys(job, overrides, line):
    script = "entry_script=examples/megatron/entry/train_rlvr.py"
    (found,) = problems_of(job, [*overrides, script])
    assert found.startswith(line)


HF = "actor_infer.strategy_args.strategy_name=hf_infer"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            [HF, f"{CONFIG}tensor_parallel_size=2"],
            f"{CONFIG}tensor_parallel_size=2: works with one "
            "rank per replica; set tensor_parallel_size: 1, or strategy_name: vllm",
        ),
        (
            [HF, f"{CONFIG}quantization=fp8"],
            f"{CONFIG}quantization='fp8': is vLLM's; leave it out, or set strategy_name: vllm",
        ),
        (
            [HF, f"{CONFIG}kv_cache_dtype=fp8"],
            f"{CONFIG}kv_cache_dtype='fp8': has no meaning for "
            "strategy_name: hf_infer; leave it out, or set strategy_name: vllm",
        ),
        (
            ["validation.generating_args.num_beams=4", f"{INFER}stop_strings=['x']"],
            f"{INFER}stop_strings=['x']: does not go with num_beams of validation.generating_args: "
            "a beam ends with a token; leave it out, or say stop_token_ids",
        ),
    ],
)
def test_rules_of_engines_are_told_in_the_words_of_the_file(job, overrides, line):
    assert problems_of(job, overrides) == [f"command line: {line}"]


def test_what_transformers_reads_of_an_engine_s_arguments_may_be_given(job):
    loaded = load_config(job, [HF, f"{CONFIG}trust_remote_code=True", f"{CONFIG}swap_space=4"])
    assert loaded.models["policy"].model_args.engine_args == {"trust_remote_code": True}


def test_an_entry_script_of_ones_own_says_itself_what_scores_and_where_prompts_are(job):
    for script in (["entry_script=mine.py"], []):  # python mine.py -c JOB needs no key for it
        load_config(job, ["rewards.rule=None", *script])
        load_config(job, [f"{ACTOR}data_args.file_name=None", *script])
        load_config(job, ["rewards.rule.worker_cls=Rule", *script])


def test_a_horizon_of_few_samples_is_refused(job):
    job.write_text(JOB.replace("grpo", "gae") + CRITIC)
    overrides = [*REFERENCE, "add_token_level_kl=True", "init_kl_coef=0.1", "target_kl=0.1",
                 "kl_horizon=12"]  # fmt: skip
    (line,) = problems_of(job, overrides)
    assert "kl_horizon=12: must be more than a fifth of rollout_batch_size x num_ret" in line


def test_files_that_are_missed_are_named_by_the_users_keys(job, write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_config(job, check_files=True)
    assert [str(problem).replace(f"{tmp_path}/", "") for problem in error.value.problems] == [
        "job.yaml: entry_script='examples/megatron/entry/train_rlvr.py': no such file",
        "job.yaml: actor_train.data_args.file_name='train.jsonl': no such file: train.jsonl",
        "job.yaml: pretrain='llama': no such directory: llama",
    ]
    write("train.jsonl", "")
    write("llama/config.json", "{}")
    write("examples/megatron/entry/train_rlvr.py", "")
    load_config(job, check_files=True)


def test_a_reference_on_hugging_face_is_refused_with_what_to_take(job):
    overrides = ["reference.strategy_args.strategy_name=hf_infer",
                 "reference.device_mapping=[0]"]  # fmt: skip
    (line,) = problems_of(job, overrides)
    assert "strategy_name='hf_infer': a reference scores on megatron-core" in line
    assert "set strategy_name: megatron_infer" in line


def test_devices_that_make_no_whole_replicas_are_drawn(job):
    overrides = ["actor_infer.device_mapping=list(range(0,3))+[8,9]",
                 f"{CONFIG}tensor_parallel_size=2"]  # fmt: skip
    (line,) = problems_of(job, overrides)
    assert "5 devices are not a multiple of tensor_parallel_size x pipeline_parallel_size" in line
    assert line.splitlines()[1:] == [
        "      device        0    1    2    8    9",
        "      replica.rank  0.0  0.1  1.0  1.1  left",
    ]
