"""Which keys may a strategy file hold, and what does each become?

The tables are the documentation, too: docs/strategies.md is written from them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Becomes:
    """A key with an effect."""

    ours: str
    """Our key, dotted; in the tables of a model relative to `models.<name>`."""
    says: str = ""
    """What it does, where our key's own documentation does not say it."""
    is_copied: bool = False
    """Whether its value is taken as it is."""


@dataclass(frozen=True)
class NoEffect:
    """A key that is accepted; where it is set to something, a notice says why it has no effect."""

    why: str
    neutral: tuple[Any, ...] = (None,)
    """Values that need no notice, because they are what happens."""


Keys = Mapping[str, Becomes | NoEffect]


def _copied(ours: str, says: str = "") -> Becomes:
    return Becomes(ours, says, is_copied=True)


_METRICS = "metrics go to metrics.jsonl and TensorBoard in output_dir"
_SHELL = "set environment variables where the job is started"
_RAY = "Ray knows the hosts of its cluster"
_SCHEDULE = "vLLM schedules within max_num_seqs and max_num_batched_tokens"
_TURNS = "rollout and training take turns"
_LOSS = "the losses here have no such term: every sample counts alike"
_SCRIPT = "the entry script says which class plays a role"
_KERNELS = "vLLM and megatron-core choose their kernels"
_TEXT = "a record's `prompt`, `query` or `text` is used as it is, see docs/rollouts.md"
_SYNC = "a weight sync needs no buffer"
_MEMORY = "models that share devices always make room for each other"
_DEBUG = "there is no such tool here"

TOP: Keys = {
    "exp_name": _copied("runtime.exp_name", "default: the file's name"),
    "seed": Becomes("runtime.seed, model_args.seed of every model"),
    "output_dir": _copied("runtime.output_dir", "default ./output"),
    "entry_script": _copied(
        "runtime.entry_script",
        "a key of ours; default examples/megatron/entry/train_rlvr.py",
    ),
    "max_steps": _copied("runtime.num_episode", "default 500"),
    "save_steps": Becomes("runtime.save_episode_interval", "default 50; 0 = never"),
    "eval_steps": Becomes(
        "runtime.eval_episode_interval", "default 10, if validation names a file"
    ),
    "logging_steps": _copied("runtime.log_interval", "default 1"),
    "max_ckpt_to_keep": Becomes("runtime.max_ckpt_to_keep", "0 = all"),
    "resume_from_checkpoint": Becomes(
        "runtime.enable_resume_training", "True or False; of this experiment's own checkpoints"
    ),
    "checkpoint_config": Becomes(
        "model_args.save of the trainers, runtime.async_save",
        "type file_system: below output_dir one directory per trainer; async_upload",
    ),
    "rollout_batch_size": Becomes(
        "runtime.sample_per_episode", "prompts; times num_return_sequences_in_group; default 128"
    ),
    "num_return_sequences_in_group": Becomes(
        "model_args.num_inference_per_prompt of the policy", "default num_return_sequences, else 1"
    ),
    "prompt_length": Becomes("model_args.seq_length", "longest prompt; default 1024"),
    "response_length": Becomes(
        "model_args.max_new_tokens, model_args.seq_length", "longest response"
    ),
    "sequence_length": Becomes(
        "model_args.seq_length",
        "prompt_length + response_length; needed only where one of them is left out",
    ),
    "ppo_epochs": _copied("runtime.num_training_epoch", "default 1"),
    "pretrain": Becomes("model_args.load", "of policy, trainer and reference"),
    "reward_pretrain": Becomes("model_args.load", "of critic and reward models"),
    "actor_train": Becomes("models.policy_trainer", "ppo_policy where adv_estimator is gae"),
    "actor_infer": Becomes("models.policy"),
    "reference": Becomes("models.reference", "started if there is a KL penalty"),
    "critic": Becomes("models.ppo_value", "scores and learns; only where adv_estimator is gae"),
    "rewards": Becomes("models.reward_<name>"),
    "reward_model": Becomes("models.reward_model", "a further reward, as those of rewards"),
    "validation": Becomes("runtime.eval_data_path, model_args.eval_* of the policy"),
    "adv_estimator": Becomes(
        "model_args.advantage_estimator",
        "grpo; reinforce: reinforce++; gae: PPO with the critic. Default gae",
    ),
    "norm_mean_type": Becomes(
        "model_args.advantage_estimator",
        "with reinforce: group takes grpo's mean; batch changes nothing, whitening undoes it",
    ),
    "norm_std_type": Becomes("model_args.advantage_std", "group: True; see norm_mean_type"),
    "whiten_advantages": Becomes(
        "", "done with reinforce and gae whatever it says, and not with grpo"
    ),
    "gamma": Becomes("model_args.gamma"),
    "lambd": Becomes("model_args.lam"),
    "pg_clip": Becomes("model_args.cliprange", "default 0.2"),
    "use_pg_clip_range": Becomes(
        "model_args.cliprange, cliprange_high", "take pg_clip_low and pg_clip_high for pg_clip"
    ),
    "pg_clip_low": Becomes("model_args.cliprange", "with use_pg_clip_range"),
    "pg_clip_high": Becomes("model_args.cliprange_high", "with use_pg_clip_range"),
    "dual_clip_loss": Becomes("model_args.dual_clip", "True: 1 + 2 x pg_clip"),
    "value_clip": Becomes("model_args.cliprange_value of the critic"),
    "reward_clip": Becomes("model_args.cliprange_reward", "with reinforce and gae"),
    "use_kl_loss": Becomes("model_args.init_kl_coef", "grpo: take kl_loss_coef"),
    "kl_loss_coef": Becomes("model_args.init_kl_coef", "with use_kl_loss"),
    "add_token_level_kl": Becomes("model_args.init_kl_coef", "reinforce, gae: take init_kl_coef"),
    "init_kl_coef": Becomes("model_args.init_kl_coef", "with add_token_level_kl; default 0.2"),
    "target_kl": Becomes("model_args.target, fix_kl_coef", "gae: adapts the coefficient"),
    "kl_horizon": Becomes("model_args.horizon", "with target_kl"),
    "entropy_loss_coef": Becomes("model_args.entropy_coef"),
    "loss_agg_mode": Becomes(
        "model_args.loss_agg",
        "token-mean, seq-mean-token-mean (default): seq-mean, seq-mean-token-sum-norm",
    ),
    "importance_sampling": Becomes("model_args.ratio_level", "token or seq"),
    "max_grad_norm": Becomes("model_args.clip_grad", "default 1"),
    "async_generation_ratio": NoEffect(_TURNS, (None, 0, 0.0)),
    "generate_opt_level": NoEffect(_SCHEDULE, (None, 1)),
    "is_num_return_sequences_expand": NoEffect(_SCHEDULE),
    "max_running_requests": NoEffect(_SCHEDULE),
    "is_use_additional_prompts": NoEffect(_SCHEDULE, (None, False)),
    "use_additional_prompts": NoEffect(_SCHEDULE, (None, False)),
    "max_additional_running_prompts": NoEffect(_SCHEDULE),
    "generate_redundancy_num": NoEffect(_SCHEDULE, (None, 0)),
    "user_defined_rollout_loop_cls": NoEffect("a policy's class says how it generates"),
    "router_args": NoEffect("prompts go to whichever replica has room"),
    "kl_penalty": NoEffect("the KL in rewards is k1, that in the loss k3", (None, "kl")),
    "use_reward_scaling": NoEffect(_LOSS, (None, False)),
    "use_reward_norm": NoEffect(_LOSS, (None, False)),
    "reward_norm": NoEffect(_LOSS),
    "reward_shift": NoEffect(_LOSS, (None, False)),
    "reward_scale": NoEffect(_LOSS, (None, False)),
    "reward_filter_mean_threshold": NoEffect(_LOSS),
    "whiten_rewards": NoEffect("advantages are whitened instead", (None, False)),
    "advantage_clip": NoEffect("advantages are not clipped, cliprange bounds what one does"),
    "add_len_reward": NoEffect(_LOSS, (None, False)),
    "max_len_mask": NoEffect(_LOSS, (None, False)),
    "mask_type": NoEffect(_LOSS),
    "difficulty_mask": NoEffect(_LOSS, (None, False)),
    "difficulty_low_threshold": NoEffect(_LOSS),
    "difficulty_high_threshold": NoEffect(_LOSS),
    "error_max_len_clip": NoEffect(_LOSS, (None, False)),
    "error_max_len_threshold": NoEffect(_LOSS),
    "difficulty_loss_weight": NoEffect(_LOSS, (None, False)),
    "length_loss_weight": NoEffect(_LOSS, (None, False)),
    "postive_loss_coef": NoEffect(_LOSS, (None, 0, 0.0)),
    "use_topr_loss": NoEffect(_LOSS, (None, False)),
    "use_topr_neg_loss_coef": NoEffect(_LOSS, (None, 0, 0.0)),
    "rl_loss_coef": NoEffect(_LOSS, (None, 1, 1.0)),
    "use_policy_loss_type": NoEffect(_LOSS, (None, "PPO")),
    "pg_variant": NoEffect(_LOSS, (None, "ppo")),
    "train_infer_correction": Becomes(
        "model_args.tis_imp_ratio_cap",
        "is_weight with enabled: True and weight_type: token: its upper_bound (default 1.2)",
    ),
    "l2": NoEffect(_LOSS, (None, 0, 0.0)),
    "critic_warmup": NoEffect("policy and critic learn from the first step on", (None, 0)),
    "balance_length": NoEffect("rows are always balanced by length"),
    "minibatch_data_iter_num": NoEffect(_LOSS, (None, 1)),
    "enable_reference": NoEffect("follows from the KL penalty"),
    "enable_old_logprobs_recompute": NoEffect("the trainer always computes them"),
    "force_disable_old_logprobs_recompute": NoEffect(
        "the trainer always computes them", (None, False)
    ),
    "val_batch_size": NoEffect("an evaluation takes all prompts at once"),
    "val_n_sample": NoEffect("an evaluation takes one response per prompt", (None, 1)),
    "val_greedy": Becomes("model_args.eval_temperature of the policy", "True: 0"),
    "val_prompt_length": NoEffect("an evaluation has the lengths of training"),
    "val_sequence_length": NoEffect("an evaluation has the lengths of training"),
    "global_template": NoEffect(_TEXT),
    "tag_to_template": NoEffect(_TEXT),
    "dataset_filter": NoEffect("every record of file_name is used"),
    "hydra": NoEffect("Hydra does not run the job", (None,)),
    "defaults": Becomes("", "files that this one is laid over; see below"),
    "base_dir": NoEffect(_METRICS),
    "logging_dir": NoEffect(_METRICS),
    "rollout_dump_dir": NoEffect(_METRICS),
    "save_logging_board_dir": NoEffect(_METRICS),
    "track_with": NoEffect(_METRICS, (None, "tensorboard")),
    "tracker_kwargs": NoEffect(_METRICS, (None, {})),
    "report_length_and_rewards": NoEffect(_METRICS, (None, False)),
    "length_profiler_dir": NoEffect(_DEBUG),
    "profiler_output_dir": NoEffect(_DEBUG),
    "otlp_output_dir": NoEffect(_DEBUG),
    "profiler_timeline": NoEffect(_DEBUG, (None, False)),
    "profiler_memory": NoEffect(_DEBUG, (None, False)),
    "rollout_mock": NoEffect(_DEBUG),
    "transfer_backend": NoEffect(_SYNC),
    "model_update_buffer_size_mb": NoEffect(_SYNC),
    "is_offload_states": NoEffect(_MEMORY, (None, True)),
    "is_offload_optimizer_states_in_train_step": NoEffect(_MEMORY, (None, False)),
    "offload_nccl": NoEffect(_MEMORY, (None, False)),
    "system_envs": NoEffect(_SHELL, (None, {})),
    "rpc_timeout": NoEffect("a call lasts until it is done or a rank fails"),
    "local_rank": NoEffect(_RAY),
    "num_nodes": NoEffect(_RAY),
    "num_gpus_per_node": NoEffect(_RAY),
    "model_download_type": NoEffect("models are directories, nothing is downloaded"),
    "lora_rank": NoEffect("a name for ${lora_rank}", ()),
    "lora_alpha": NoEffect("a name for ${lora_alpha}", ()),
    "lora_target": NoEffect("a name for ${lora_target}", ()),
}
"""Keys at the top of the file."""

ROLE: Keys = {
    "strategy_args": Becomes("", "strategy_name and strategy_config, see below"),
    "device_mapping": Becomes("device_mapping", "list(range(0,8)) and the like, or a list"),
    "world_size": Becomes("num_cpu", "processes of a role without device_mapping; default 1"),
    "model_args": Becomes("model_args"),
    "training_args": Becomes("model_args", "of a trainer"),
    "generating_args": Becomes("model_args", "of a role on vLLM"),
    "data_args": Becomes("runtime.data_path", "of actor_train; see below"),
    "infer_batch_size": _copied(
        "generation_batch_size",
        "rows per forward pass of a model that scores; vLLM has no use for it",
    ),
    "model_update_frequency": _copied("sync_frequency"),
    "backend_timeout": _copied("model_args.distributed_timeout_minutes"),
    "use_dynamic_batching_in_train": Becomes(
        "model_args.max_tokens_per_micro_batch", "take max_tokens_per_microbatch_in_train"
    ),
    "max_tokens_per_microbatch_in_train": Becomes(
        "model_args.max_tokens_per_micro_batch", "with use_dynamic_batching_in_train"
    ),
    "use_dynamic_batching_in_infer": Becomes(
        "model_args.max_tokens_per_micro_batch",
        "the same of a model that only scores; no effect in actor_train",
    ),
    "max_tokens_per_microbatch_in_infer": Becomes(
        "model_args.max_tokens_per_micro_batch", "with use_dynamic_batching_in_infer"
    ),
    "use_sequence_packing": Becomes("model_args.sequence_packing"),
    "sequence_packing_args": Becomes(
        "model_args.max_tokens_per_micro_batch",
        "with use_sequence_packing, see below",
    ),
    "sequence_length_round_in_train": NoEffect("rows are padded to what the kernels ask for"),
    "sequence_length_round_in_infer": NoEffect("rows are padded to what the kernels ask for"),
    "num_gpus_per_worker": NoEffect("follows from the parallel sizes"),
    "name": NoEffect("a role's name is its key", ()),
    "worker_cls": NoEffect(_SCRIPT),
    "pg_variant": NoEffect(_LOSS, (None, "ppo")),
    "topr_positive_weight": NoEffect(_LOSS),
    "topr_negative_weight": NoEffect(_LOSS),
    "system_envs": NoEffect(_SHELL, (None, {})),
    "max_concurrency": NoEffect("a rank makes one call at a time"),
    "offload_nccl": NoEffect(_MEMORY, (None, False)),
    "logits_in_fp32": NoEffect("log-probabilities are always computed in float32"),
    "apply_loss_scale": NoEffect("the loss is always that of the global batch", (None, True)),
    "router_replay": NoEffect("experts are chosen anew in training", (None, {"mode": "disable"})),
    "mtp_training_mode": NoEffect("models here have no multi-token prediction", (None, "disabled")),
    "opd_kl_coef": NoEffect("there is no distillation here"),
    "eval_steps": NoEffect("eval_steps at the top counts", ()),
}
"""Keys of a role."""

PACKING: Keys = {
    "max_packed_sequence_length_train": Becomes(
        "model_args.max_tokens_per_micro_batch", "of a trainer"
    ),
    "max_packed_sequence_length_forward": Becomes(
        "model_args.max_tokens_per_micro_batch", "of a model that only scores"
    ),
    "algorithm": NoEffect(
        "rows of a micro-batch are always balanced", (None, "none", "load_balance")
    ),
    "min_num_micro_batches_train": NoEffect("a micro-batch takes all rows that fit", (None, 1)),
    "min_num_micro_batches_forward": NoEffect("a micro-batch takes all rows that fit", (None, 1)),
}
"""Keys of `sequence_packing_args`."""

REWARD: Keys = {
    **ROLE,
    "worker_cls": Becomes(
        "model_args.user_args.worker_cls",
        "class of yours, as package.module.Class; see below",
    ),
    "tag_included": Becomes(
        "model_args.user_args.tag_included", "scores only records whose `tag` is one of these"
    ),
    "reward_weight": _copied("reward_weight", "a key of ours: factor on its rewards"),
    **{
        name: Becomes(f"model_args.user_args.{name}", "for your class")
        for name in (
            "reward_type", "response_length_penalty_coef", "judge_prompt", "judge_model_type",
            "judge_model_name", "judge_api_url", "judge_api_key", "code_url", "use_local",
            "format_pattern", "reward_manager_config", "query_filter_config",
            "response_filter_config",
        )
    },
}  # fmt: skip
"""Keys of an entry of `rewards`."""

VALIDATION: Keys = {
    "data_args": Becomes(
        "runtime.eval_data_path, eval_data_num_limit",
        "file_name (without it nothing is evaluated), max_samples",
    ),
    "generating_args": Becomes("model_args.eval_* of the policy"),
    "eval_steps": NoEffect("eval_steps at the top counts", ()),
}
"""Keys of `validation`."""

MODEL_ARGS: Keys = {
    "model_name_or_path": Becomes("model_args.load", "wins over pretrain"),
    "dtype": Becomes("model_args.dtype", "bf16 (default), fp16, fp32"),
    "disable_gradient_checkpointing": Becomes(
        "model_args.recompute_granularity",
        "of a trainer; True: nothing is recomputed, and keys that ask for it are refused. Other "
        "roles recompute nothing",
    ),
    "lora_target": Becomes(
        "model_args.target_modules, lora_r",
        "q_proj, ... or all-linear of a trainer: train adapters on them",
    ),
    "lora_rank": Becomes("model_args.lora_r", "with lora_target; default 8"),
    "lora_alpha": Becomes("model_args.lora_alpha", "with lora_target; default 2 x lora_rank"),
    "lora_dropout": Becomes("model_args.lora_dropout", "with lora_target"),
    "moe_aux_loss_coef": Becomes("model_args.moe_aux_loss_coeff", "of a trainer"),
    **{
        name: Becomes("", "refused: there is nothing like it here")
        for name in (
            "freeze_module_prefix", "ulysses_size", "adapter_name_or_path", "model_config_kwargs",
            "additional_target",
        )
    },
    "attn_implementation": Becomes(
        "model_args.attn_implementation",
        "of actor_infer with hf_infer: sdpa, eager, fa2; others choose their kernels",
    ),
    "flash_attn": Becomes("model_args.attn_implementation", "its older name"),
    "gradient_checkpointing_use_reentrant": NoEffect(_KERNELS),
    "device_map": NoEffect("device_mapping says where a model lies", (None, "balanced")),
    "model_type": NoEffect("config.json says it"),
    "num_labels": NoEffect("config.json says it", (None, 1)),
    "autocast_adapter_dtype": NoEffect("adapters have the weights' type", (None, False)),
}  # fmt: skip
"""Keys of `model_args`."""

TRAINING_ARGS: Keys = {
    "learning_rate": Becomes("model_args.lr", "default 5e-5"),
    "lr_scheduler_type": Becomes(
        "model_args.lr_decay_style", "linear (default), cosine, constant, constant_with_warmup"
    ),
    "warmup_steps": Becomes("model_args.lr_warmup_iters", "optimizer steps"),
    "warmup_ratio": Becomes("model_args.lr_warmup_iters", "share of all optimizer steps"),
    "weight_decay": Becomes("model_args.weight_decay", "default 0"),
    "adam_beta1": _copied("model_args.adam_beta1"),
    "adam_beta2": _copied("model_args.adam_beta2"),
    "per_device_train_batch_size": Becomes(
        "runtime.train_micro_batch_size, train_global_batch_size", "default 8"
    ),
    "gradient_accumulation_steps": Becomes(
        "runtime.train_global_batch_size",
        "times per_device_train_batch_size and the data parallel size; default 1",
    ),
    "num_train_epochs": NoEffect("max_steps at the top says how long the job is", ()),
    "max_steps": NoEffect("max_steps at the top says how long the job is", (None, -1)),
    "output_dir": NoEffect("output_dir at the top counts", (None, "")),
    "seed": NoEffect("seed at the top counts"),
    "data_seed": NoEffect("seed at the top counts"),
    "dataloader_num_workers": NoEffect(
        "responses are made in the job, nothing is loaded", (None, 0)
    ),
    "bf16": NoEffect("dtype in model_args says it"),
    "fp16": NoEffect("dtype in model_args says it"),
    "tf32": NoEffect(_KERNELS),
    "save_hf_model": NoEffect("chatlearn-vllm export makes it of a checkpoint", (None, False)),
}
"""Keys of `training_args`."""

GENERATING_ARGS: Keys = {
    "max_new_tokens": Becomes(
        "model_args.max_new_tokens", "default response_length, and at most that"
    ),
    "temperature": Becomes("model_args.temperature", "of trainer and reference, too; default 0.95"),
    "top_p": Becomes("model_args.top_p", "default 0.7"),
    "top_k": Becomes("model_args.top_k", "default 50"),
    "do_sample": Becomes("model_args.temperature", "False: 0"),
    "num_beams": Becomes(
        "model_args.eval_num_beams, num_beams",
        "more than 1: beam search, in validation and in rewards; 1 in actor_infer",
    ),
    "length_penalty": Becomes(
        "model_args.length_penalty",
        "with num_beams > 1; in validation that of actor_infer, where it has none of its own",
    ),
    "num_return_sequences": Becomes("model_args.num_inference_per_prompt"),
    "stop_strings": Becomes("model_args.stop_token_list", "list of strings"),
    "include_stop_str_in_output": Becomes(
        "model_args.include_stop_str_in_output", "default True with stop_strings"
    ),
    "max_length": NoEffect("max_new_tokens counts"),
}
"""Keys of `generating_args`, besides all fields of vLLM's SamplingParams."""

DATA_ARGS: Keys = {
    "file_name": Becomes("runtime.data_path", "one jsonl file or a list"),
    "prompt": Becomes("model_args.prompt_key of the policy"),
    "tag": Becomes("model_args.user_args.tag of the rewards", "field of tag_included"),
    "template": NoEffect(_TEXT),
    "messages": NoEffect(_TEXT),
    "response": NoEffect("all fields of a record reach the rewards", (None, "solution")),
    "id": NoEffect("all fields of a record reach the rewards", (None, "id")),
    "domain_interleave_probs": NoEffect("prompts are drawn from all files together"),
    "interleave_probs": NoEffect("prompts are drawn from all files together"),
    "dataset_dir": NoEffect("file_name is relative to where the job is started"),
    "dataset_type": NoEffect("files are jsonl", (None, "json")),
    "eval_file_name": NoEffect("validation.data_args.file_name counts"),
    "max_samples": Becomes(
        "runtime.training_data_num_limit, eval_data_num_limit", "the first so many; -1 = all"
    ),
    "preprocessing_num_workers": NoEffect("prompts are tokenised when the policy starts"),
    "custom_data_kwargs_func": NoEffect(_TEXT),
    **{
        name: NoEffect("prompts are text")
        for name in (
            "image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels",
            "video_total_pixels", "video_fps", "video_max_frames", "image_folder", "video_folder",
            "audio_folder",
        )
    },
}  # fmt: skip
"""Keys of `data_args`, in actor_train and validation."""

SAMPLING_SET_ELSEWHERE = {
    "n": "num_return_sequences",
    "max_tokens": "max_new_tokens",
    "stop": "stop_strings",
    "seed": "seed at the top",
    "output_kind": "the runtime",
}
"""Fields of SamplingParams that another key says."""
