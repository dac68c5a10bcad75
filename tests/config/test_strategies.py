"""Does a strategy file become the job that it describes, and is each key without effect told?"""

import re
from pathlib import Path

import pytest
import yaml

from chatlearn_vllm.config import ConfigError, load_config
from chatlearn_vllm.config.strategies import keys
from chatlearn_vllm.config.strategies.reference import with_tables
from chatlearn_vllm.job import place
from tests.config.strategy_job import (
    ACTOR,
    CONFIG,
    INFER,
    JOB,
    REFERENCE,
    TRAIN,
    args_of,
    problems_of,
)

ROOT = Path(__file__).parents[2]
FILES = Path(__file__).parent / "strategies"
SHIPPED = ROOT / "configs/strategies/rlvr_config.yaml"

SAME_JOB = """
models:
  policy:
    device_mapping: [0, 1]
    free_memory: True
    model_args:
      load: llama
      dtype: bfloat16
      seq_length: 64
      max_new_tokens: 24
      num_inference_per_prompt: 4
      temperature: 0.9
      top_p: 1
      block_size: 16
      load_format: dummy
      sleep_level: 1
  policy_trainer:
    device_mapping: [0, 1, 2, 3]
    trainable: True
    free_memory: True
    model_args:
      load: llama
      dtype: bfloat16
      seq_length: 64
      max_new_tokens: 24
      temperature: 0.9
      lr: 5e-5
      weight_decay: 0.0
      lr_decay_style: linear
      loss_agg: seq-mean
  reward_rule:
    num_cpu: 1
    model_args: {user_args: {worker_cls: my.Rule}}
runtime:
  entry_script: examples/megatron/entry/train_rlvr.py
  exp_name: job
  output_dir: ./output
  num_episode: 500
  sample_per_episode: 64
  train_micro_batch_size: 4
  train_global_batch_size: 32
  save_episode_interval: 50
  enable_resume_training: False
  data_path: train.jsonl
"""


@pytest.fixture
def job(write) -> Path:
    """A small strategy file without errors and without notices."""
    return write("job.yaml", JOB)


# ---- whole files --------------------------------------------------------------------------------


def test_the_same_job_in_both_dialects_is_the_same(job, write):
    ours = load_config(write("job/job.yaml", SAME_JOB))
    theirs = load_config(job)
    assert theirs.notices == ()
    same = {"path": "", "notices": ()}
    # Printed, too: a failing comparison of two whole jobs cannot be read.
    assert theirs.model_copy(update=same).model_dump() == ours.model_copy(update=same).model_dump()
    assert theirs.model_copy(update=same) == ours.model_copy(update=same)
    assert place(theirs) == place(ours)


def test_the_example_that_is_shipped_loads_on_its_defaults():
    loaded = load_config(SHIPPED)
    assert place(loaded).describe().splitlines() == [
        "device  share  policy  policy_trainer  reference",
        "0       1/3    0.0     0.0             0.0",
        "1       1/3    1.0     0.1             1.0",
        "no device: reward_math_rule, 1 x 1 CPU",
    ]
    (notice,) = loaded.notices
    assert notice.startswith("actor_infer: top_p=0.99, top_k=100 draws training responses from a")
    assert loaded.entry_script is None or loaded.entry_script.name == "train_rlvr.py"


def test_rolls_example_loads_as_it_is():
    loaded = load_config(FILES / "rlvr.yaml")
    plan = place(loaded).describe().splitlines()
    assert plan[0].split() == [
        "device", "share", "policy", "policy_trainer", "reward_llm_judge",
    ]  # fmt: skip
    assert plan[12].split() == ["11", "1/2", "11.0", "0.11", "-"]
    assert plan[13].split() == ["12", "1/2", "-", "0.12", "0.0"]
    assert plan[17:] == [
        "no device: reward_ifeval, 8 x 1 CPU",
        "no device: reward_math_rule, 8 x 1 CPU",
    ]
    runtime = loaded.runtime
    assert (runtime.sample_per_episode, runtime.train_global_batch_size) == (512, 512)
    assert (runtime.num_episode, runtime.save_episode_interval) == (500, 100)
    assert runtime.eval_data_path == ("data/math_benchmarks.jsonl",)
    assert (runtime.eval_episode_interval, runtime.enable_eval_before_training) == (10, True)
    trainer = loaded.models["policy_trainer"].model_args
    assert (trainer.advantage_estimator, trainer.cliprange_reward) == ("reinforce++", 10)
    assert (trainer.dual_clip, trainer.recompute_granularity) == (1.4, "full")
    assert trainer.save == "/models/qwen2.5-7B-rlvr-config/policy_trainer"
    judge = loaded.models["reward_llm_judge"].model_args
    assert (judge.load_format, judge.seq_length, judge.max_new_tokens) == ("auto", 8000, 100)
    assert judge.user_args["tag_included"] == ["RLVR"]


def test_one_notice_names_the_keys_without_effect_and_why():
    loaded = load_config(FILES / "rlvr.yaml")
    (line,) = [notice for notice in loaded.notices if "no effect of" in notice]
    assert line.startswith(f"{FILES}/rlvr.yaml: no effect of hydra (Hydra does not run the job); ")
    assert "advantage_clip=2.0 (advantages are not clipped" in line
    assert "value_clip=0.5 (only with adv_estimator: gae)" in line
    assert "reference (not started without a KL penalty: use_kl_loss with grpo" in line
    for quiet in ("track_with", "error_max_len_clip", "length_loss_weight", "num_train_epochs"):
        assert quiet not in line  # what they say is what happens


@pytest.mark.parametrize("name", ["lora", "experts", "packing", "batching"])
def test_files_that_change_some_of_it_load_over_it_and_tell_what_has_no_effect(name):
    loaded = load_config(FILES / f"{name}.yaml")
    told = next(notice for notice in loaded.notices if "no effect of" in notice)
    for key, value in yaml.safe_load((FILES / f"{name}.yaml").read_text()).items():
        entry = keys.TOP[key]
        is_told = isinstance(entry, keys.NoEffect) and entry.neutral and value not in entry.neutral
        assert bool(re.search(rf"(?<![\w.]){key}=", told)) == bool(is_told), key


def test_adapters_experts_and_micro_batches_have_our_keys():
    lora = args_of(FILES / "lora.yaml", model="policy_trainer")
    assert (lora.lora_r, lora.lora_alpha) == (32, 32)
    assert lora.target_modules == ("linear_proj", "linear_qkv")
    experts = load_config(FILES / "experts.yaml").models
    assert experts["policy_trainer"].device_mapping == (0, 1, 2, 3, 8, 9, 10, 11)
    assert experts["policy_trainer"].expert_model_parallel_size == 4
    transformer = experts["policy_trainer"].model_args.transformer_args
    assert transformer["recompute_modules"] == ["moe", "layernorm"]
    assert transformer["moe_permute_fusion"] is True
    assert experts["policy"].model_args.sleep_level == 2
    assert (experts["policy"].num_replica, experts["policy"].tensor_model_parallel_size) == (4, 2)
    assert experts["reference"].expert_model_parallel_size == 1
    trainer = experts["policy_trainer"].model_args
    assert (trainer.advantage_estimator, trainer.advantage_std) == ("grpo", True)
    assert trainer.init_kl_coef == 0.001
    packing = args_of(FILES / "packing.yaml", model="policy_trainer")
    assert (packing.sequence_packing, packing.max_tokens_per_micro_batch) == (True, 8192)
    with_reference = ["add_token_level_kl=True", "init_kl_coef=0.1"]
    batching = load_config(FILES / "batching.yaml", with_reference).models
    assert batching["policy_trainer"].model_args.max_tokens_per_micro_batch == 12288
    assert batching["reference"].model_args.max_tokens_per_micro_batch == 49125


# ---- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "model", "values"),
    [
        # actor_infer, line by line as vLLM's page of ROLL's documentation has it
        ("actor_infer.model_args.dtype=fp16", "policy", {"dtype": "float16"}),
        (f"{INFER}max_new_tokens=20", "policy", {"max_new_tokens": 20}),
        ("response_length=30", "policy", {"max_new_tokens": 30, "seq_length": 70}),
        ("sequence_length=64", "policy", {"max_new_tokens": 24, "seq_length": 64}),
        (f"{INFER}top_p=0.99", "policy", {"top_p": 0.99}),
        (f"{INFER}top_p=None", "policy", {"top_p": 0.7}),
        (f"{INFER}top_k=100", "policy", {"top_k": 100}),
        (f"{INFER}top_k=None", "policy", {"top_k": 50}),
        (f"{INFER}temperature=None", "policy", {"temperature": 0.95}),
        (f"{INFER}temperature=0.5", "policy_trainer", {"temperature": 0.5}),
        (f"{INFER}num_beams=1", "policy", {"use_beam_search": False}),
        (f"{INFER}repetition_penalty=1.1", "policy", {"repetition_penalty": 1.1}),
        (f"{INFER}min_p=0.1", "policy", {"min_p": 0.1}),
        (f"{INFER}logprobs=1", "policy", {"sampling_args": {"logprobs": 1}}),
        (f"{INFER}logit_bias={{5: 1.0}}", "policy", {"sampling_args": {"logit_bias": {5: 1.0}}}),
        (f"{INFER}stop_strings=['a', 'b c']", "policy",
         {"stop_token_list": "a;b c", "sampling_args": {"include_stop_str_in_output": True}}),
        (f"{INFER}include_stop_str_in_output=False", "policy",
         {"sampling_args": {"include_stop_str_in_output": False}}),
        (f"{CONFIG}gpu_memory_utilization=0.8", "policy", {"gpu_memory_utilization": 0.8}),
        (f"{CONFIG}block_size=32", "policy", {"block_size": 32}),
        (f"{CONFIG}max_model_len=8000", "policy", {"engine_args": {"max_model_len": 8000}}),
        (f"{CONFIG}load_format=auto", "policy", {"load_format": "auto"}),
        (f"{CONFIG}sleep_level=2", "policy", {"sleep_level": 2}),
        (f"{CONFIG}sleep_level=None", "policy", {"sleep_level": 1}),
        (f"{CONFIG}tensor_parallel_size=2", "policy", {"tensor_model_parallel_size": 2}),
        (f"{CONFIG}max_num_seqs=8", "policy", {"max_num_seqs": 8}),
        (f"{CONFIG}kv_cache_dtype=fp8", "policy", {"engine_args": {"kv_cache_dtype": "fp8"}}),
        # the others
        ("actor_train.model_args.model_name_or_path=other", "policy_trainer", {"load": "other"}),
        ("seed=7", "policy_trainer", {"seed": 7}),
        (f"{TRAIN}learning_rate=1e-6", "policy_trainer", {"lr": 1e-6}),
        (f"{TRAIN}warmup_steps=3", "policy_trainer", {"lr_warmup_iters": 3}),
        (f"{TRAIN}warmup_ratio=0.01", "policy_trainer", {"lr_warmup_iters": 10}),
        (f"{TRAIN}lr_scheduler_type=cosine", "policy_trainer", {"lr_decay_style": "cosine"}),
        (f"{TRAIN}adam_beta2=0.9", "policy_trainer", {"adam_beta2": 0.9}),
        ("max_grad_norm=0.5", "policy_trainer", {"clip_grad": 0.5}),
        ("pg_clip=0.3", "policy_trainer", {"cliprange": 0.3, "cliprange_high": None}),
        ("loss_agg_mode=token-mean", "policy_trainer", {"loss_agg": "token-mean"}),
        ("importance_sampling=seq", "policy_trainer", {"ratio_level": "sequence"}),
        ("entropy_loss_coef=0.01", "policy_trainer", {"entropy_coef": 0.01}),
        ("actor_train.strategy_args.strategy_config.recompute_granularity=full",
         "policy_trainer", {"recompute_granularity": "full"}),
        ("actor_train.data_args.prompt=question", "policy", {"prompt_key": "question"}),
        ("actor_train.backend_timeout=30", "policy_trainer", {"distributed_timeout_minutes": 30}),
        ("checkpoint_config.output_dir=/c", "policy_trainer", {"save": "/c/policy_trainer"}),
    ],
)  # fmt: skip
def test_a_key_sets_ours(job, override, model, values):
    args = args_of(job, [override], model)
    assert {name: args[name] if name in args else getattr(args, name) for name in values} == values


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("max_steps=3", {"num_episode": 3}),
        ("rollout_batch_size=32", {"sample_per_episode": 128}),
        ("ppo_epochs=2", {"num_training_epoch": 2}),
        ("save_steps=0", {"save_episode_interval": None}),
        ("max_ckpt_to_keep=2", {"max_ckpt_to_keep": 2}),
        ("resume_from_checkpoint=true", {"enable_resume_training": True}),
        ("checkpoint_config.async_upload=True", {"async_save": True}),
        ("logging_steps=5", {"log_interval": 5}),
        ("output_dir=/o", {"output_dir": "/o"}),
        (f"{TRAIN}gradient_accumulation_steps=4", {"train_global_batch_size": 64}),
        (f"{TRAIN}per_device_train_batch_size=2",
         {"train_micro_batch_size": 2, "train_global_batch_size": 16}),
        ("actor_train.data_args.file_name=[a.jsonl, b.jsonl]",
         {"data_path": ("a.jsonl", "b.jsonl")}),
        ("validation.data_args.file_name=e.jsonl",
         {"eval_data_path": "e.jsonl", "eval_episode_interval": 10, "eval_data_num_limit": -1}),
    ],
)  # fmt: skip
def test_a_key_of_the_whole_job_sets_ours(job, override, values):
    runtime = load_config(job, [override]).runtime
    assert {name: getattr(runtime, name) for name in values} == values


def test_a_guide_s_role_has_all_its_keys(job):
    role = """
actor_infer:
  model_args:
    disable_gradient_checkpointing: true
    dtype: bf16
  generating_args:
    max_new_tokens: ${response_length}
    top_p: 0.99
    top_k: 100
    num_beams: 1
    temperature: 0.99
    num_return_sequences: ${num_return_sequences_in_group}
  strategy_args:
    strategy_name: vllm
    strategy_config:
      gpu_memory_utilization: 0.8
      block_size: 16
      max_model_len: 8000
  device_mapping: list(range(0,12))
  infer_batch_size: 1
"""
    head, rest = JOB.split("actor_infer:")
    job.write_text(head + role + "rewards:" + rest.split("rewards:")[1])
    long = ["prompt_length=3904", "response_length=4096"]
    loaded = load_config(job, long)
    (notice,) = loaded.notices
    assert notice.startswith("actor_infer: top_p=0.99, top_k=100 draws training responses from")
    policy = loaded.models["policy"]
    args = policy.model_args
    assert (args.dtype, args.max_new_tokens, args.num_inference_per_prompt) == ("bfloat16", 4096, 4)
    assert (args.top_p, args.top_k, args.temperature, args.num_beams) == (0.99, 100, 0.99, 1)
    assert (args.inference_engine, args.load_format, args.sleep_level) == ("vllm", "dummy", 1)
    assert (args.gpu_memory_utilization, args.block_size) == (0.8, 16)
    assert args.engine_args == {"max_model_len": 8000}
    assert policy.device_mapping == tuple(range(12))
    # Without max_model_len: as long as prompt and response together.
    unset = load_config(job, [*long, "prompt_length=100", f"{CONFIG}max_model_len=None"])
    assert unset.models["policy"].model_args.seq_length == 4196


def test_what_vllm_no_longer_has_is_told(job):
    retired = ["swap_space=4", "use_v2_block_manager=True", "num_scheduler_steps=8"]
    (line,) = load_config(job, [f"{CONFIG}{one}" for one in retired]).notices
    assert line.endswith(
        f"no effect of {', '.join(f'{CONFIG}{one}' for one in retired)} (vLLM's V1 engine has no "
        "such setting)"
    )


def test_devices_batches_and_engine_are_of_the_role(job):
    overrides = ["actor_infer.device_mapping=list(range(0,12))", "actor_infer.infer_batch_size=1",
                 "actor_infer.strategy_args.strategy_name=hf_infer",
                 "actor_infer.strategy_args.strategy_config={max_num_seqs: 7}",
                 "actor_infer.model_args.attn_implementation=fa2",
                 "actor_infer.model_update_frequency=2", "rewards.rule.world_size=8"]  # fmt: skip
    loaded = load_config(job, overrides)
    policy = loaded.models["policy"]
    assert (policy.device_mapping, policy.num_replica) == (tuple(range(12)), 12)
    assert policy.generation_batch_size == loaded.runtime.generation_batch_size  # not its own
    assert policy.sync_frequency == 2
    args = policy.model_args
    assert (args.inference_engine, args.max_num_seqs) == ("transformers", 7)
    assert args.attn_implementation == "flash_attention_2"
    assert loaded.notices == (
        "actor_infer: no effect of block_size=16; vLLM's, and strategy_name is hf_infer",
    )
    assert loaded.models["reward_rule"].num_replica == 8


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        ((), {"advantage_estimator": "grpo", "advantage_std": True, "init_kl_coef": 0}),
        (("adv_estimator=reinforce", "whiten_advantages=True"),
         {"advantage_estimator": "reinforce++"}),
        (("adv_estimator=reinforce", "norm_mean_type=group"),
         {"advantage_estimator": "grpo", "advantage_std": False}),
        ((*REFERENCE, "use_kl_loss=True", "kl_loss_coef=0.01"), {"init_kl_coef": 0.01}),
        (("kl_loss_coef=0.01",), {"init_kl_coef": 0}),
        ((*REFERENCE, "adv_estimator=reinforce", "add_token_level_kl=True"),
         {"init_kl_coef": 0.2}),
        (("use_pg_clip_range=True", "pg_clip_low=0.1", "pg_clip_high=0.3"),
         {"cliprange": 0.1, "cliprange_high": 0.3}),
        (("dual_clip_loss=True", "pg_clip=0.5"), {"dual_clip": 2.0}),
        (("reward_clip=3", "adv_estimator=reinforce"), {"cliprange_reward": 3}),
        (("train_infer_correction.is_weight={enabled: True, weight_type: token}",),
         {"tis_imp_ratio_cap": 1.2}),
        (("train_infer_correction.is_weight={enabled: False, upper_bound: 2}",),
         {"tis_imp_ratio_cap": None}),
    ],
)  # fmt: skip
def test_an_algorithm_has_our_keys(job, overrides, values):
    args = args_of(job, overrides, "policy_trainer")
    assert {name: args[name] for name in values} == values


CRITIC = """
critic:
  model_args: {model_name_or_path: critic}
  training_args:
    {learning_rate: 1e-5, per_device_train_batch_size: 4, gradient_accumulation_steps: 4}
  strategy_args: {strategy_name: megatron_train}
  device_mapping: "[0, 1]"
"""


def test_gae_is_ppo_with_a_critic(job):
    job.write_text(JOB.replace("grpo", "gae") + CRITIC)
    overrides = ["value_clip=0.5", "lambd=0.9", "target_kl=0.1", "add_token_level_kl=True",
                 "init_kl_coef=0.1", *REFERENCE]  # fmt: skip
    models = load_config(job, overrides).models
    assert list(models) == ["policy", "ppo_policy", "reference", "reward_rule", "ppo_value"]
    value = models["ppo_value"]
    assert value.trainable and value.device_mapping == (0, 1)
    assert (value.model_args.load, value.model_args.lr) == ("critic", 1e-5)
    assert value.model_args.cliprange_value == 0.5
    args = models["ppo_policy"].model_args
    assert (args.lam, args.init_kl_coef, args.target, args.fix_kl_coef) == (0.9, 0.1, 0.1, False)
    (line,) = problems_of(job, ["critic.training_args.gradient_accumulation_steps=2"])
    assert "critic.training_args.gradient_accumulation_steps=2: both trainers take batches" in line


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["init_kl_coef=0.1"], "init_kl_coef=0.1 (only with add_token_level_kl: True and"),
        (["kl_loss_coef=0.1"], "kl_loss_coef=0.1 (only with use_kl_loss: True and"),
        ([*REFERENCE, "kl_loss_coef=0.1", "use_kl_loss=True"], None),
        (["pg_clip_low=0.1"], "pg_clip_low=0.1 (only with use_pg_clip_range: True)"),
        (["adv_estimator=reinforce", "whiten_advantages=False"], "whiten_advantages=False (rein"),
        (["whiten_advantages=True"], "whiten_advantages=True (grpo compares a response with its"),
        (["actor_train.generating_args.top_k=1"], "generating_args (responses are actor_infer's)"),
        (["actor_train.world_size=4"], "actor_train.world_size=4 (follows from device_mapping)"),
        (["actor_train.model_args.lora_rank=4"], "lora_rank=4 (only with lora_target)"),
        (["actor_infer.training_args.learning_rate=1"], "(training is said in actor_train)"),
        (["actor_infer.data_args.file_name=x"], "(prompts are named in actor_train and validati"),
        (["actor_infer.model_args.attn_implementation=sdpa"], "choose their kernels"),
        (["validation.generating_args.max_new_tokens=9"], "with the lengths of training"),
        (["validation.generating_args.stop_token_ids=[3]"], "stop_token_ids (an evaluation has "
         "what actor_infer says)"),
        (["validation.generating_args.min_tokens=3", f"{INFER}min_tokens=3",
          "validation.data_args.file_name=e"], "draws training"),
        (["norm_mean_type=batch"], "norm_mean_type=batch (grpo compares a response with its group"),
        (["norm_std_type=batch"], "norm_std_type=batch (grpo compares a response with its group"),
        ([f"{ACTOR}max_tokens_per_microbatch_in_train=99"], f"{ACTOR}max_tokens_per_microbatch_in_"
         "train=99 (only with use_dynamic_batching_in_train: True)"),
        ([f"{ACTOR}sequence_packing_args={{max_packed_sequence_length_train: 99}}"],
         f"{ACTOR}sequence_packing_args (only with use_sequence_packing: True)"),
        ([f"{ACTOR}use_dynamic_batching_in_train=True", f"{ACTOR}use_sequence_packing=True",
          f"{ACTOR}max_tokens_per_microbatch_in_train=99",
          f"{ACTOR}sequence_packing_args={{max_packed_sequence_length_train: 98}}"],
         f"{ACTOR}max_tokens_per_microbatch_in_train=99 (with packed rows max_packed_sequence_"),
        ([f"{ACTOR}use_sequence_packing=True",
          f"{ACTOR}sequence_packing_args={{min_num_micro_batches_train: 2}}"],
         "sequence_packing_args.min_num_micro_batches_train=2 (a micro-batch takes all rows"),
        ([f"{ACTOR}use_dynamic_batching_in_infer=True"], f"{ACTOR}use_dynamic_batching_in_infer"
         "=True (the role trains, and scores as it trains)"),
        (["actor_infer.use_sequence_packing=True"], "actor_infer.use_sequence_packing=True (of ro"),
        (["actor_infer.use_dynamic_batching_in_infer=True"], "batching_in_infer=True (of roles on"),
        (["rewards.rule.use_sequence_packing=True"], "use_sequence_packing=True (of roles on mega"),
        (["adv_estimator=reinforce"], None),
        ([f"{CONFIG}disable_mm_preprocessor_cache=True"], "disable_mm_preprocessor_cache=True "
         "(prompts are text)"),
        (["system_envs={A: 1}"], "system_envs (set environment variables where the job is start"),
        (["reference.strategy_args.strategy_name=megatron_infer", "reference.device_mapping=[0]"],
         "reference (not started without a KL penalty: use_kl_loss with grpo"),
    ],
)  # fmt: skip
def test_a_key_without_effect_in_its_place_is_told(job, overrides, told):
    notices = load_config(job, overrides).notices
    if told is None:
        assert notices == ()
    else:
        (line,) = notices
        assert told in line


def test_a_reference_without_a_kl_penalty_is_checked_but_no_model_of_the_job(job):
    reference = ["reference.strategy_args.strategy_name=megatron_infer",
                 "reference.device_mapping=[0]"]  # fmt: skip
    loaded = load_config(job, reference)
    assert "reference" not in loaded.models
    assert "reference" not in place(loaded).describe()
    with_penalty = load_config(job, [*reference, "use_kl_loss=True", "kl_loss_coef=0.1"])
    assert "reference" in place(with_penalty).describe()
    (line,) = problems_of(job, [*reference, "reference.model_args.dtyp=bf16"])
    assert "reference.model_args.dtyp='bf16': unknown key; did you mean dtype?" in line


def test_a_critic_without_gae_is_named_and_gae_without_a_critic_refused(job):
    job.write_text(JOB + CRITIC)
    loaded = load_config(job)
    assert "ppo_value" not in loaded.models
    assert "critic (only PPO has one: adv_estimator: gae)" in loaded.notices[0]
    job.write_text(JOB.replace("grpo", "gae"))
    (line,) = problems_of(job)
    assert "adv_estimator='gae': gae needs a critic" in line


def test_rewards_may_be_rules_and_models(job):
    overrides = ["rewards.rule.tag_included=[math]", "rewards.rule.reward_weight=0.5",
                 "rewards.model.strategy_args.strategy_name=hf_infer", "reward_pretrain=scores",
                 "rewards.model.device_mapping=[3]", "actor_train.data_args.tag=kind"]  # fmt: skip
    models = load_config(job, overrides).models
    rule, model = models["reward_rule"], models["reward_model"]
    assert rule.model_args.user_args == {
        "worker_cls": "my.Rule", "tag_included": ["math"], "tag": "kind",
    }  # fmt: skip
    assert rule.reward_weight == 0.5
    assert (model.device_mapping, model.model_args.load) == ((3,), "scores")
    assert model.model_args.user_args == {"strategy_name": "hf_infer", "tag": "kind"}


def test_a_reward_may_have_a_number_for_a_name_and_none_has_that_of_another(job):
    names = "rewards={3: {worker_cls: my.Rule}, model: {worker_cls: my.Rule}}"
    assert {"reward_3", "reward_model"} <= load_config(job, [names]).models.keys()
    (line,) = problems_of(job, [names, "reward_model={worker_cls: my.Rule}"])
    assert line == (
        "command line: reward_model: is a second reward of this name; call the one in rewards "
        "something else"
    )


# ---- what is refused ----------------------------------------------------------------------------


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
        (f"{CONFIG}load_format=dumy", "must be one of vLLM's: auto, "),
        (f"{CONFIG}load_format=dumy", "tensorizer; did you mean dummy?"),
        (f"{CONFIG}quantization=awk", "did you mean awq?"),
        ("actor_infer.model_args.disable_gradient_checkpointing=maybe", "must be True or False"),
        ("max_steps=0", "command line: max_steps=0: must be greater than or equal to 1"),
        ("rollout_batch_size=x", "command line: rollout_batch_size='x': must be a whole number"),
        ("rollout_batch_size=0", "rollout_batch_size=0: must be at least 1"),
        ("rollout_batch_size=2", "job.yaml: actor_train.training_args.gradient_accumulation_steps=2"
         ": must be at most rollout_batch_size x num_return_sequences_in_group=8"),
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
    path = write("job.yaml", JOB + SAME_JOB)
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


# ---- templates and defaults ---------------------------------------------------------------------


def test_templates_stand_for_keys_and_for_the_environment(job, write, monkeypatch):
    monkeypatch.setenv("FROM_ENV", "33")
    monkeypatch.setenv("response_length", "99")  # a key of the file: that wins
    text = JOB.replace("temperature: 0.9", "temperature: 0.9, seed_: 1").replace(", seed_: 1", "")
    path = write(
        "job.yaml",
        "exp_name: run-${response_length}-${FROM_ENV}\n"
        "logging_steps: ${FROM_ENV}\n"
        "output_dir: ${NOT_SET:/o/${actor_train.data_args.file_name}}\n"
        "save_steps: ${oc.env:NOT_SET,7}\n"
        "eval_steps: ${oc.env:FROM_ENV}\n"
        "reference: {model_args: '${actor_infer.model_args}', strategy_args: {strategy_name: "
        "megatron_infer, strategy_config: {sequence_parallel: '${.use_distributed_optimizer}', "
        "use_distributed_optimizer: False}}, device_mapping: '${..actor_train.device_mapping}'}\n"
        "use_kl_loss: True\nkl_loss_coef: 0.1\n" + text,
    )
    loaded = load_config(path, ["actor_infer.model_args={dtype: fp16}", "prompt_length=41"])
    runtime = loaded.runtime
    assert (runtime.exp_name, runtime.log_interval) == ("run-24-33", 33)
    assert (runtime.output_dir, runtime.save_episode_interval) == ("/o/train.jsonl", 7)
    reference = loaded.models["reference"]
    assert reference.model_args.dtype == "float16"
    assert reference.device_mapping == (0, 1, 2, 3)
    assert reference.model_args.use_distributed_optimizer is False


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (
            "${response_lenght}",
            "the file has no key response_lenght; did you mean response_length?",
        ),
        ("${nothing.like.it}", "the file has no key nothing.like.it, nor is there such a variable"),
        ("${exp_name}", "keys stand for each other: exp_name -> exp_name"),
        ("a${actor_train}", "${actor_train} is a map or list inside a text"),
        ("${oc.env:NOT_SET}", "environment variable NOT_SET is not set and there is no default"),
        ("${a b}", "${a b} is neither the name of a key nor"),
        ("${....x}", "leads out of the file"),
        ("run-${now:%Y-%m-%d}", "${now:...} is not computed here: Hydra does not run the job; "
         "write the value, or ${NAME:default} with an environment variable"),
        ("${hydra:runtime.cwd}", "${hydra:...} is not computed here"),
        ("${eval: 10*4}", "${eval:...} is not computed here"),
        ("${oc.select:seed,5}", "${oc.select:...} is not computed here"),
        ("${oc.decode:${oc.env:NOT_SET}}", "${oc.decode:...} is not computed here"),
        ("${open", "a template ${ has no closing brace"),
        ("${" * 3000 + "}" * 3000, "templates are nested too deep"),
    ],
)  # fmt: skip
def test_a_template_that_stands_for_nothing_is_named(write, monkeypatch, text, rule):
    monkeypatch.delenv("NOT_SET", raising=False)
    path = write("job.yaml", f"exp_name: '{text}'\n{JOB}")
    (line,) = problems_of(path)
    assert line.startswith(f"job.yaml: exp_name={text!r}"[:300]) and rule in line


def test_what_hydra_would_fill_in_for_itself_is_left_alone(write):
    path = write("job.yaml", f"hydra: {{run: {{dir: '${{now:%Y}}/${{nowhere}}'}}}}\n{JOB}")
    (notice,) = load_config(path).notices
    assert "no effect of hydra (Hydra does not run the job)" in notice


def test_defaults_are_laid_below_the_file_or_where_it_says(write):
    write("base.yaml", JOB + "max_steps: 1\nsave_steps: 1\n")
    write("steps/long.yaml", "max_steps: 9\nsave_steps: 9\n")
    path = write("a.yaml", "defaults: [base, steps/long@_here_]\nsave_steps: 2\n")
    runtime = load_config(path).runtime
    assert (runtime.num_episode, runtime.save_episode_interval) == (9, 2)
    path = write("b.yaml", "defaults: [_self_, base]\nsave_steps: 2\n")
    assert load_config(path).runtime.save_episode_interval == 1
    write("training_args/fast.yaml", "learning_rate: 1e-3\n")
    path = write("c.yaml", "defaults: [base, {training_args@actor_train.training_args: fast}]\n")
    assert args_of(path, model="policy_trainer").lr == 1e-3


def test_defaults_in_a_circle_are_refused(write):
    write("base.yaml", "defaults: [job]\n")
    path = write("job.yaml", f"defaults: [base]\n{JOB}")
    assert problems_of(path) == ["base.yaml: defaults='job': files name each other in a circle"]


def test_files_of_defaults_that_are_not_there_are_named(write):
    path = write("job.yaml", f"defaults: [../config/deepspeed_zero3@_here_]\n{JOB}")
    loaded = load_config(path)
    assert "nothing is taken from them: ../config/deepspeed_zero3.yaml" in loaded.notices[0]
    (line,) = problems_of(path, ["exp_name=${deepspeed_zero3}"])
    assert "not found were, from its defaults: ../config/deepspeed_zero3" in line
    (line,) = problems_of(write("job.yaml", f"defaults: [3]\n{JOB}"))
    assert "job.yaml: defaults=3: must be the name of a file, or {group: name}" in line


def test_the_tables_in_the_documentation_are_up_to_date():
    path = ROOT / "docs/strategies.md"
    document = path.read_text(encoding="utf-8")
    assert document == with_tables(document), (
        f"run: python -m chatlearn_vllm.config.strategies.reference {path.relative_to(ROOT)}"
    )
