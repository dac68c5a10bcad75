"""Which fields of engines may a strategy file hold under their own names?"""

from chatlearn_vllm.config.model_args import LoraArgs, ParallelArgs, SamplingArgs, SchedulerArgs
from chatlearn_vllm.config.strategies import keys, strategy_keys
from chatlearn_vllm.config.upstream_fields import upstream_fields

RECOMPUTE = ("recompute_granularity", "recompute_method", "recompute_num_layers")
ALL_LORA_LAYERS = tuple(LoraArgs.model_fields["target_modules"].default)

_OURS_ON_MEGATRON = frozenset(
    {*ParallelArgs.model_fields, *RECOMPUTE, "bf16", "fp16"} - {"enable_expert_parallel"}
)
_OURS_ON_VLLM = frozenset({*SchedulerArgs.model_fields, "enable_expert_parallel", "tokenizer"})
_SAMPLING = frozenset(
    name for name in SamplingArgs.model_fields if not name.startswith("eval_")
) - {"n", "use_beam_search", "stop_token_list", "new_token_limit", "apply_replica_id_to_seed"}


def sampling_fields() -> frozenset[str]:
    """Of `generating_args`; those that another key says are among them, and are refused later."""
    return _SAMPLING | upstream_fields()["sampling_args"] | {*keys.SAMPLING_SET_ELSEWHERE}


def vllm_fields() -> frozenset[str]:
    """Of the strategy_config of vllm, and of hf_infer, which has no use for some of them."""
    return _OURS_ON_VLLM | upstream_fields()["engine_args"] | {*strategy_keys.VLLM_SET_ELSEWHERE}


def megatron_fields() -> frozenset[str]:
    """Of the strategy_config of megatron_train and megatron_infer."""
    return _OURS_ON_MEGATRON | (upstream_fields()["transformer_args"] - {"params_dtype"})
