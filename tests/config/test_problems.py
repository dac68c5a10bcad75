"""Which jobs are refused, and what is the user told?"""

import json

import pytest

from chatlearn_vllm.config import ConfigError, load_config


def problems_of(path, overrides=(), **options) -> list[str]:
    """The lines of the error, without the directory of the test."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, **options)
    return [str(problem).replace(f"{path.parent}/", "") for problem in caught.value.problems]


def test_everything_wrong_is_told_at_once(job, write):
    write("policy.yaml", "temprature: 1\nlr: fast\nload: /x/${NO_SUCH_VARIABLE}\n")
    write("base.yaml", "log_interval: 0\n")
    write(
        "job.yaml",
        """
includes: [base.yaml, missing.yaml]
models:
  policy: {num_gpu: 3, tensor_model_parallel_size: 2, model_config_file: policy.yaml}
  policy_trainer: {num_gpus: 2, num_gpu: 2, trainable: True, free_memory: "False"}
  other: {num_cpu: 1, model_config_file: nowhere.yaml}
runtime:
  num_epsiode: 3
  colocation: ["policy,polcy", "policy,value"]
  train_micro_batch_size: 2
  train_global_batch_size: 3
  save_episode_interval: True
runtimes: {}
""",
    )
    assert problems_of(job) == [
        "job.yaml: includes='missing.yaml': no such file",
        "policy.yaml: load='/x/${NO_SUCH_VARIABLE}': environment variable NO_SUCH_VARIABLE is "
        "not set and there is no default",
        "job.yaml: models.other.model_config_file='nowhere.yaml': no such file",
        "policy.yaml: temprature=1: unknown key; did you mean temperature?",
        "job.yaml: models.policy_trainer.num_gpus=2: unknown key; did you mean num_gpu?",
        "base.yaml: log_interval=0: unknown key here; it belongs in runtime",
        "job.yaml: runtime.num_epsiode=3: unknown key; did you mean num_episode?",
        "job.yaml: runtimes={}: unknown key; did you mean runtime?",
        "policy.yaml: lr='fast': must be a valid number",
        "job.yaml: models.policy_trainer.free_memory='False': must be a valid boolean",
        "job.yaml: runtime.save_episode_interval=True: must be a valid integer",
        "job.yaml: models.policy.num_gpu=3: must be a multiple of "
        "tensor_model_parallel_size x pipeline_model_parallel_size = 2 x 1",
        "job.yaml: runtime.train_global_batch_size=3: must be a multiple of 4 = "
        "train_micro_batch_size x data parallel size of models.policy_trainer",
        "job.yaml: runtime.colocation=['policy,polcy', 'policy,value']: "
        "'polcy' is none of the models: policy, policy_trainer, other",
        "job.yaml: runtime.colocation=['policy,polcy', 'policy,value']: "
        "model 'policy' may be in one group only",
        "job.yaml: runtime.colocation=['policy,polcy', 'policy,value']: "
        "'value' is none of the models: policy, policy_trainer, other",
    ]


def test_trainers_do_not_save_over_each_other(write):
    trained = "{num_gpu: 2, trainable: True, model_args: {save: %s}}"
    path = write("job.yaml", f"models: {{a: {trained % 'out'}, b: {trained % './out/'}}}\n")
    (line,) = problems_of(path)
    assert line.startswith("job.yaml: models.b.model_args.save='./out/': is the directory of mod")
    load_config(path, ["models.b.model_args.save=out/b"])
    load_config(path, ["models.b.trainable=False"])


def test_a_message_has_one_line_per_problem(job):
    with pytest.raises(ConfigError) as caught:
        load_config(job, ["runtime.seeed=1"])
    assert str(caught.value) == (
        "1 problem in the job's configuration:\n"
        "  command line: runtime.seeed=1: unknown key; did you mean seed?"
    )
    assert isinstance(caught.value, ValueError)


def test_a_file_shared_by_two_models_is_reported_once(write):
    write("base.yaml", "seqlength: 3\n")
    write("model.yaml", "includes: [base.yaml]\n")
    path = write(
        "job.yaml",
        "models: {a: {num_gpu: 1, model_config_file: model.yaml},"
        " b: {num_gpu: 1, model_config_file: model.yaml}}\n",
    )
    assert problems_of(path) == ["base.yaml: seqlength=3: unknown key; did you mean seq_length?"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        # types
        ("runtime.num_episode=3.5", "runtime.num_episode=3.5: must be a valid integer"),
        ("runtime.rollout_over_sampling=2", "rollout_over_sampling=2: must be less than or equal"),
        ("runtime.num_episode=0", "runtime.num_episode=0: must be greater than or equal to 1"),
        ("runtime.data_path=3", "runtime.data_path=3: must be a valid string or must be a valid "
         "list"),
        ("runtime=3", "runtime=3: must be a map of keys"),
        ("models.reward=3", "models.reward=3: must be a map of keys"),
        (
            "models.policy.model_args.dtype=float8",
            "models.policy.model_args.dtype='float8': "
            "must be 'auto', 'bfloat16', 'float16' or 'float32'",
        ),
        ("models.policy.lora.lora_dmi=3", "models.policy.lora.lora_dmi=3: unknown key; "
         "did you mean lora_dim?"),
        ("models.policy.lora.lora_dim=True", "models.policy.lora.lora_dim=True: "
         "must be a valid integer"),
        # names
        (
            "models.policy.model_args.enable_chunked_prefil=True",
            "models.policy.model_args.enable_chunked_prefil=True: unknown key; "
            "did you mean enable_chunked_prefill?",
        ),
        (
            "models.policy.model_args.max_tokens=9",
            "models.policy.model_args.max_tokens=9: is set by max_new_tokens; leave it out",
        ),
        (
            "models.policy.temperature=0.5",
            "models.policy.temperature=0.5: unknown key here; it belongs in the model's file or "
            "models.<name>.model_args",
        ),
        (
            "models.policy.model_args.engine_args={}",
            "models.policy.model_args.engine_args={}: unknown key",
        ),
        ("models.polcy.num_gpu=1", "models.polcy.num_gpu='1': the job has no such model, only "
         "policy, reward, policy_trainer"),
        ("runtime.num_episode", "runtime.num_episode: must look like runtime.num_episode=3"),
        # devices
        ("models.reward.num_gpu=1", "models.reward.num_gpu=1: a model has either num_gpu > 0 or, "
         "without devices, num_cpu > 0"),
        ("models.policy.num_replica=3", "models.policy.num_replica=3: follows from the devices "
         "and parallel sizes, which give 2"),
        ("models.reward.trainable=True", "models.reward.trainable=True: "
         "a trainable model needs num_gpu > 0"),
        ("models.policy.gpu_per_process=2", "models.policy.gpu_per_process=2: "
         "must be 1, others have no backend"),
        ("models.policy.expert_model_parallel_size=2", "models.policy.expert_model_parallel_size="
         "2: the 1 ranks of a replica must be a multiple of expert_tensor_parallel_size x "
         "expert_model_parallel_size x pipeline_model_parallel_size = 1 x 2 x 1"),
        ("models.policy.lora.enable_lora=True", "models.policy.lora.enable_lora=True: "
         "must be False; adapters are switched on by lora_r in the model's file"),
        ("models.policy_trainer.model_args.lora_dropout=0.1", "models.policy_trainer.model_args."
         "lora_dropout=0.1: must be 0, with dropout the trainer would not score tokens as the "
         "rollout sampled them"),
        ("models.policy_trainer.model_args.target_modules=['q_proj']", "models.policy_trainer."
         "model_args.target_modules=['q_proj']: must be 'linear_qkv', 'linear_proj', "
         "'linear_fc1' or 'linear_fc2'"),
        ("runtime.colocation=['policy,reward']", "runtime.colocation=['policy,reward']: "
         "model 'reward' has no devices to share (num_gpu is 0)"),
        # batches
        ("runtime.train_global_batch_size=6", "runtime.train_global_batch_size=6: must be a "
         "multiple of 4 = train_micro_batch_size x data parallel size of models.policy_trainer"),
        ("runtime.train_global_batch_size=32", "runtime.train_global_batch_size=32: "
         "the rows of an optimizer step, train_global_batch_size, are 32 and must be at most "
         "sample_per_episode=16; lower them, or raise that"),
        ("models.policy.model_args.num_inference_per_prompt=3", "sample_per_episode=16: "
         "must be a multiple of 3 = num_inference_per_prompt x n of models.policy"),
        ("runtime.load_data_checkpoint_iteration=0",
         "load_data_checkpoint_iteration=0: must be greater than or equal to 1"),
        ("runtime={load_data_checkpoint_iteration: 4, enable_resume_training: False}",
         "load_data_checkpoint_iteration=4: says where to resume from, and enable_resume_training "
         "is False: the job would start anew over that checkpoint"),
        # model arguments
        ("models.policy.model_args={temperature: 0, num_inference_per_prompt: 4}",
         "models.policy.model_args.temperature=0: must be more than 0 with 4 responses per prompt "
         "(num_inference_per_prompt x n): greedy ones would all be equal"),
        ("models.policy.model_args.max_completion_lenght=8", "max_completion_lenght=8: unknown "
         "key; did you mean max_completion_length?"),
        ("models.policy.num_generations=4", "models.policy.num_generations=4: unknown key here; "
         "it belongs in the model's file or models.<name>.model_args"),
        ("models.policy.model_args.trust_remote_code=maybe", "trust_remote_code='maybe': must be a "
         "valid boolean"),
        ("models.policy.model_args.max_model_len=8k", "max_model_len='8k': must be a valid int"),
        ("models.policy.model_args.max_model_len=True", "max_model_len=True: must be a valid int"),
        ("models.policy.model_args.guided_json={}", "guided_json={}: unknown key: vLLM no longer "
         "has it; set structured_outputs: {json: ...}"),
        ("models.policy.model_args.best_of=3", "best_of=3: unknown key: vLLM no longer has it; "),
        ("models.policy.model_args.load_format=dumy", "load_format='dumy': must be one of vLLM's"),
        ("models.policy.model_args.quantization=awk", "; did you mean awq?"),
        ("models.policy.model_args.max_model_len=63", "models.policy.model_args.max_model_len=63: "
         "must be at least seq_length=64, prompt and response together"),
        ("models.policy_trainer.model_args={overlap_param_gather: True, use_distributed_optimizer: "
         "True}", "overlap_param_gather=True: needs overlap_grad_reduce: True"),
        ("models.policy_trainer.model_args.context_parallel_size=2", "context_parallel_size=2: "
         "must be 1, a sequence is not split over ranks here"),
        ("models.policy.model_args.max_new_tokens=64", "models.policy.model_args.max_new_tokens="
         "64: must be less than seq_length=64, the prompt needs room too; raise seq_length"),
        ("models.policy_trainer.model_args={lr_decay_style: linear, lr_warmup_iters: 10000}",
         "models.policy_trainer.model_args.lr_warmup_iters=10000: must be less than the 10000 "
         "optimizer steps of the job"),
        ("models.policy_trainer.model_args={recompute_method: block, recompute_granularity: "
         "selective}", "recompute_method='block': needs recompute_granularity: full, it is "
         "selective; set it, or leave this key out"),
        ("models.policy_trainer.model_args.recompute_num_layers=2", "recompute_num_layers=2: needs "
         "recompute_granularity: full, it is None; set it, or leave this key out"),
        ("models.policy_trainer.model_args.adam_eps=0", "adam_eps=0: must be greater than 0"),
        ("models.policy_trainer.model_args.adam_beta1=1.0", "adam_beta1=1.0: must be less than 1"),
        ("models.policy_trainer.model_args.adam_beta2=1", "adam_beta2=1: must be less than 1"),
        ("models.policy.model_args.max_num_batched_tokens=8", "max_num_batched_tokens=8: "
         "must be at least max_num_seqs=256, one token per running sequence"),
        ("models.policy.model_args.virtual_pipeline_model_parallel_size=2",
         "needs pipeline_model_parallel_size > 1"),
        ("models.policy.model_args.use_beam_search=True", "use_beam_search=True: needs a width; "
         "set num_beams, or n, to more than 1"),
        ("models.policy.model_args.eval_num_beams=0", "eval_num_beams=0"),
        ("models.policy.model_args={eval_num_beams: 2, length_penalty: 500}",
         "length_penalty=500: must be from -166 to 166: scores of beams"),
        ("models.policy.model_args.seed=-1", "seed=-1: must be greater than or equal to 0"),
        ("models.policy.model_args.seed=4294967296", "must be less than 2147483648"),
        ("models.policy.model_args.apply_replica_id_to_seed=False", "must be True"),
    ],
)  # fmt: skip
def test_a_broken_rule_names_file_key_value_and_rule(job, override, line):
    lines = problems_of(job, [override])
    assert len(lines) == 1
    assert line in lines[0]
    assert lines[0].startswith(("command line: ", "job.yaml: "))


@pytest.mark.parametrize(
    ("key", "set_by"),
    [
        ("calculate_per_token_loss", "loss_agg"),
        ("params_dtype", "dtype"),
        ("pipeline_dtype", "dtype"),
        ("variable_seq_lengths", "max_tokens_per_micro_batch and sequence_packing"),
        ("perform_initialization", "the runtime"),
        ("finalize_model_grads_func", "the runtime"),
        ("grad_scale_func", "the runtime"),
        ("grad_sync_func", "the runtime"),
        ("no_sync_func", "the runtime"),
        ("param_sync_func", "the runtime"),
        ("timers", "the runtime"),
    ],
)
def test_fields_of_megatron_core_that_the_engine_sets_are_refused(job, key, set_by):
    (line,) = problems_of(job, [f"models.policy_trainer.model_args.{key}=True"])
    assert line.endswith(f"{key}=True: is set by {set_by}; leave it out")


def test_a_problem_with_a_key_that_was_left_out_names_its_variable(write):
    path = write("job.yaml", "models: {m: {num_gpu: '${NO_SUCH_VARIABLE}'}}\n")
    (line,) = problems_of(path)
    assert line.startswith("job.yaml: models.m.num_gpu: a model has either num_gpu > 0 or")
    assert line.endswith("; environment variable NO_SUCH_VARIABLE is not set")
    path = write(
        "job.yaml", "models: {m: {num_cpu: 1}}\nruntime: {colocation: ['${NO_SUCH_VARIABLE}']}\n"
    )
    (line,) = problems_of(path)
    assert "runtime.colocation='${NO_SUCH_VARIABLE}': environment variable" in line


def test_sequences_must_divide_by_the_tensor_parallel_size_to_be_split(job, write):
    write(
        "policy.yaml", "tensor_model_parallel_size: 2\nsequence_parallel: True\nseq_length: 1023\n"
    )
    (line,) = problems_of(job)
    assert line == (
        "policy.yaml: sequence_parallel=True: needs a tensor_model_parallel_size that divides "
        "seq_length=1023; it is 2"
    )


def test_attention_of_a_package_that_is_not_there_is_refused_before_a_launch(job):
    args = "models.policy.model_args"
    asked = [f"{args}={{inference_engine: transformers, attn_implementation: flash_attention_2}}"]
    load_config(job, asked)  # the job may run elsewhere
    (line,) = problems_of(job, asked, check_files=True)
    assert line.endswith(
        "attn_implementation='flash_attention_2': needs the package flash_attn, which is not "
        "installed; install it, or set sdpa"
    )
    load_config(job, [*asked, "runtime_env.pip=[flash-attn]"], check_files=True)
    load_config(job, [*asked, f"{args}.attn_implementation=eager"], check_files=True)


def test_drafts_of_a_package_that_is_not_there_are_refused_before_a_launch(job):
    args = "models.policy.model_args"
    asked = [f"{args}.speculative_config={{method: suffix, num_speculative_tokens: 2}}"]
    load_config(job, asked)
    (line,) = problems_of(job, asked, check_files=True)
    assert line.endswith(
        "speculative_config.method='suffix': needs the package arctic-inference, which is not "
        "installed; install it, or set ngram"
    )
    load_config(job, [*asked, "runtime_env.pip=[arctic-inference]"], check_files=True)


def test_what_full_recomputation_needs_is_taken_with_it_and_without_training(job):
    keys = "{recompute_method: block, recompute_num_layers: 2}"
    granularity = "models.policy_trainer.model_args.recompute_granularity=full"
    load_config(job, [f"models.policy_trainer.model_args={keys}", granularity])
    load_config(job, [f"models.policy.model_args={keys}"])


def test_heads_and_groups_must_fit_the_tensor_parallel_size(job, write):
    shape = "num_attention_heads: 6\nnum_query_groups: 3\n"
    write("policy.yaml", f"tensor_model_parallel_size: 2\n{shape}")
    lines = problems_of(job)
    assert lines == [
        "policy.yaml: num_query_groups=3: a tensor parallel size of 2 must divide the 3 key-value "
        "heads of the model (num_query_groups), or be a multiple of them"
    ]
    write("policy.yaml", f"tensor_model_parallel_size: 4\n{shape}")
    lines = problems_of(job, ["models.policy.num_gpu=4"])
    assert lines[0] == (
        "policy.yaml: num_attention_heads=6: a tensor parallel size of 4 must divide the 6 "
        "attention heads of the model; set it to one of 1, 2, 3, 6"
    )
    write("policy.yaml", "tensor_model_parallel_size: 4\nnum_attention_heads: 8\n"
          "num_query_groups: 2\n")  # fmt: skip
    load_config(job, ["models.policy.num_gpu=4"])


def test_layers_of_a_trainable_model_must_fit_the_pipeline(job):
    overrides = [
        "models.policy_trainer.pipeline_model_parallel_size=2",
        "models.policy_trainer.model_args.num_layers=3",
    ]
    (line,) = problems_of(job, overrides)
    assert "3 layers of a trainable model must be a multiple of its 2 pipeline stages" in line


@pytest.mark.parametrize(
    ("stages", "line"),
    [
        ({"first": 1, "last": 3}, None),
        ({"first": 1}, None),
        ({"first": 4}, "leaves 0 of 4 layers to 1 of 2 pipeline stages"),
        ({"first": 1, "last": 2}, "leaves 1 of 4 layers to 0 of 2 pipeline stages"),
        ({"last": 1, "virtual": 3}, "leaves 3 of 4 layers to 1 of 2 pipeline stages; these need "
         "equally many, each stage a multiple of 3"),
    ],
)  # fmt: skip
def test_the_first_and_last_stage_may_have_layers_of_their_own(job, stages, line):
    keys = {
        "first": "num_layers_in_first_pipeline_stage",
        "last": "num_layers_in_last_pipeline_stage",
        "virtual": "virtual_pipeline_model_parallel_size",
    }
    args = "models.policy_trainer.model_args."
    overrides = ["models.policy_trainer.pipeline_model_parallel_size=2", f"{args}num_layers=4"]
    overrides += [f"{args}{keys[key]}={value}" for key, value in stages.items()]
    if line is None:
        load_config(job, overrides)
    else:
        assert line in problems_of(job, overrides)[0]


def test_experts_must_fit_the_ranks(job, write, tmp_path):
    write("hf/config.json", json.dumps({"num_local_experts": 6}))
    trainer = "models.policy_trainer."
    expert_parallel = f"{trainer}expert_model_parallel_size"
    overrides = [f"{trainer}model_args.load={tmp_path}/hf", f"{trainer}num_gpu=4"]
    load_config(job, [*overrides, f"{expert_parallel}=2"])
    (line,) = problems_of(job, [*overrides, f"{expert_parallel}=4"])
    assert line.endswith("expert_model_parallel_size=4: must divide the 6 experts")
    overrides += [f"{trainer}tensor_model_parallel_size=4", f"{expert_parallel}=2"]
    (line,) = problems_of(job, overrides)
    assert "the 4 ranks of a replica must be a multiple" in line and "= 4 x 2 x 1" in line
    load_config(job, [*overrides, f"{trainer}model_args.expert_tensor_parallel_size=2"])


def test_a_dense_model_has_no_experts_to_split(job, write, tmp_path):
    write("hf/config.json", json.dumps({"num_hidden_layers": 2}))
    trainer = "models.policy_trainer."
    overrides = [f"{trainer}model_args.load={tmp_path}/hf"]
    (line,) = problems_of(job, [*overrides, f"{trainer}expert_model_parallel_size=2"])
    assert "needs a model with experts" in line


def test_structure_in_the_yaml_must_agree_with_config_json(job, write, tmp_path):
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    write("hf/config.json", json.dumps(config))
    write("policy.yaml", f"load: {tmp_path}/hf\nnum_layers: 3\nnum_attention_heads: 4\n")
    (line,) = problems_of(job)
    assert line.endswith("config.json says num_hidden_layers=2; leave the key out")


def test_structure_of_config_json_is_checked_against_the_parallel_sizes(job, write, tmp_path):
    write("hf/config.json", json.dumps({"num_attention_heads": 3, "num_key_value_heads": 3}))
    write("policy.yaml", f"load: {tmp_path}/hf\ntensor_model_parallel_size: 2\n")
    lines = problems_of(job)
    # It says how many there are, so the key to be changed is the size.
    assert lines == [
        "policy.yaml: tensor_model_parallel_size=2: a tensor parallel size of 2 must divide the 3 "
        "attention heads of the model; set it to one of 1, 3",
        "policy.yaml: tensor_model_parallel_size=2: a tensor parallel size of 2 must divide the 3 "
        "key-value heads of the model (num_query_groups), or be a multiple of them",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("bf16: True\nfp16: True\n", "fp16=True: contradicts"),
        ("bf16: True\ndtype: float32\n", "bf16=True: contradicts"),
        ("bf16: False\ndtype: bfloat16\n", "bf16=False: contradicts dtype=bfloat16"),
    ],
)
def test_two_types_contradict_each_other(job, write, text, line):
    write("policy.yaml", text)
    assert line in problems_of(job)[0]


def test_files_are_required_only_when_asked_for(job, write, tmp_path):
    write("train.jsonl", "{}")
    write("policy.yaml", f"load: {tmp_path}/nowhere\n")
    overrides = [
        f"runtime.data_path=['{tmp_path}/train.jsonl', '{tmp_path}/more.jsonl']",
        "runtime.entry_script=none.py",
    ]
    load_config(job, overrides)
    lines = problems_of(job, overrides, check_files=True)
    assert [line.split(": ")[-1].replace(f"{tmp_path}/", "") for line in lines] == [
        "no such file",
        "more.jsonl",
        "nowhere",
    ]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("models: [", "not yaml"),
        ("- 1\n", "must be a map of keys"),
        ("models: 3\n", "models=3: must be a map of keys"),
        ("models: ${NO_SUCH_VARIABLE}\n", "environment variable NO_SUCH_VARIABLE is not set"),
        ("runtime: {}\n", "a job needs at least one model"),
        ("includes: a.yaml\nmodels: {m: {num_cpu: 1}}\n", "must be a list of file names"),
    ],
)
def test_files_that_hold_no_job_are_refused(write, text, rule):
    (line,) = problems_of(write("job.yaml", text))
    assert line.startswith("job.yaml: ") and rule in line


def test_a_missing_job_is_one_problem(tmp_path):
    assert problems_of(tmp_path / "no.yaml") == ["no.yaml: No such file or directory"]


def test_values_are_shown_at_no_great_length(job):
    (line,) = problems_of(job, [f"runtime.colocation={'x' * 10_000}"])
    assert "xxx...: " in line and len(line) < 500
