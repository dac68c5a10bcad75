"""Does each key of a strategy file set ours, and is each without effect told?"""

import pytest

from chatlearn_vllm.config import load_config
from chatlearn_vllm.job import place
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
        (f"{CONFIG}speculative_min_gain=0", "policy", {"speculative_min_gain": 0}),
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
