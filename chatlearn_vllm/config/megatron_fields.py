"""Which fields of megatron-core's TransformerConfig may a model's file hold, and which do nothing?

The trained model is the one that config.json describes, made of megatron-core's layers with torch's
attention and norms: responses and exported checkpoints are of that model, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from chatlearn_vllm.config.model_files import has_experts, read_config_json

if TYPE_CHECKING:
    from chatlearn_vllm.config.problems import Key
    from chatlearn_vllm.config.schema import ModelConfig

IDLE = {
    "the weights are those of `load`; random ones have initializer_range of its config.json": (
        "init_method_std", "embedding_init_method_std", "init_model_with_meta_device",
    ),
    "attention is torch's scaled_dot_product_attention": (
        "attention_backend", "attention_softmax_in_fp32", "apply_query_key_layer_scaling",
        "masked_softmax_fusion", "flash_decode", "qk_clip", "log_max_attention_logit",
    ),
    "norms are torch's": ("persist_layer_norm", "memory_efficient_layer_norm"),
    "log-probabilities are computed without megatron-core's loss": (
        "cross_entropy_loss_fusion", "cross_entropy_fusion_impl",
    ),
    "layers are megatron-core's own, without Transformer Engine": (
        "transformer_impl", "use_te_rng_tracker", "tp_comm_overlap",
    ),
}  # fmt: skip
"""Why fields do nothing, and which."""
_HF_NAMES = {
    "layernorm_epsilon": ("rms_norm_eps",),
    "kv_channels": ("head_dim",),
    "num_moe_experts": ("num_experts", "num_local_experts"),
    "moe_ffn_hidden_size": ("moe_intermediate_size",),
    "moe_router_topk": ("num_experts_per_tok",),
}
"""A field -> the keys of config.json of which the first that is there says the same."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "softmax_scale": (None,), "rotary_interleaved": (False,), "no_rope_freq": (None,),
    "activation_func_clamp_value": (None,), "glu_linear_offset": (0,), "window_size": (None,),
    "softmax_type": ("vanilla",), "fp8": (None,), "fp4": (None,), "mtp_num_layers": (None,),
    "normalization": ("RMSNorm",), "add_bias_linear": (False,), "gated_linear_unit": (True,),
    "layernorm_zero_centered_gamma": (False,), "apply_residual_connection_post_layernorm": (False,),
    "moe_router_score_function": ("softmax",), "moe_router_topk_scaling_factor": (None, 1),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "moe_router_num_groups": (None,), "moe_router_force_load_balancing": (False,),
    "moe_input_jitter_eps": (None, 0), "moe_expert_capacity_factor": (None,),
}  # fmt: skip
"""Fields that make another model, or none that is built here, and the values that do not."""
_OTHER_MODEL = (
    "is of another model than config.json describes, and of that one are responses and exported "
    "checkpoints; leave the key out"
)


def megatron_problems(model: ModelConfig) -> Iterator[tuple[Key, str]]:
    """Fields that contradict config.json, or are of another model, with the remedy."""
    args, at = model.model_args, ("models", model.name, "model_args")
    given, config = args.transformer_args, read_config_json(args.load)
    for name, theirs in _HF_NAMES.items():
        said = [key for key in theirs if config.get(key) is not None]
        if name in given and said and given[name] != config[said[0]]:
            rule = f"{args.load}/config.json says {said[0]}={config[said[0]]}; leave the key out"
            yield (*at, name), rule
    for name, neutral in _NEUTRAL.items():
        value = given.get(name, neutral[0])
        values = value if isinstance(value, list) else [value]
        if not all(one in neutral for one in values):
            yield (*at, name), _OTHER_MODEL
    if "moe_router_pre_softmax" in given and has_experts(config):
        # Chosen experts' probabilities add up to 1, or are those among all experts.
        adds_up = config.get("model_type") == "mixtral" or bool(config.get("norm_topk_prob"))
        if given["moe_router_pre_softmax"] == adds_up:
            yield (*at, "moe_router_pre_softmax"), _OTHER_MODEL


def idle_fields(model: ModelConfig) -> Iterator[tuple[list[str], str]]:
    """Fields that do nothing for a model that is trained, as `key=value`, and why."""
    given, config = model.model_args.transformer_args, read_config_json(model.model_args.load)
    for why, names in IDLE.items():
        if idle := [f"{name}={given[name]!r}" for name in names if name in given]:
            yield idle, why
    of_experts = [f"{name}={value!r}" for name, value in given.items() if name.startswith("moe_")]
    if of_experts and config and not has_experts(config):
        yield of_experts, f"{model.model_args.load}/config.json describes no experts"
