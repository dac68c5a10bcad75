"""Which megatron-core settings make a model compute what its Hugging Face config.json says?"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
    "mixtral": {},
    "qwen3_moe": {"qk_layernorm": True},
}
"""model_type -> how it differs from Llama, in TransformerConfig's words."""

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "attention_dropout": (0, 0.0),
    "router_jitter_noise": (0, 0.0),
    "shared_expert_intermediate_size": (0,),
    "n_shared_experts": (0,),
}
"""config.json keys that have one supported meaning here; an absent key has that meaning."""

_EXPERT_FAMILIES = ("mixtral", "qwen3_moe")
"""Model types whose layers, all or some, choose a few of many feed-forward networks per token."""


def transformer_config(hf_config: Mapping[str, Any], **settings: Any) -> TransformerConfig:
    """Translate a parsed config.json.

    Args:
        hf_config: the parsed config.json of a Llama-like model, dense or with experts.
        settings: further TransformerConfig fields (parallel sizes, dtypes, recomputation, ...);
            they win over what follows from config.json.

    Raises:
        ValueError: the model type, or the value of a key, is not supported, or the experts cannot
            be cut into the parallel sizes.
    """
    model_type = hf_config.get("model_type")
    if model_type not in _FAMILIES:
        raise ValueError(
            f"config.json: model_type={model_type!r} is not supported for training; "
            f"supported: {', '.join(_FAMILIES)}"
        )
    for key, allowed in _MUST_BE.items():
        if hf_config.get(key) is not None and hf_config[key] not in allowed:
            raise ValueError(
                f"config.json: {key}={hf_config[key]!r} is not supported for {model_type}, "
                f"must be {allowed[0]!r}"
            )
    if model_type == "mixtral" and hf_config.get("sliding_window") is not None:
        raise ValueError(
            f"config.json: sliding_window={hf_config['sliding_window']!r} is not supported for "
            "mixtral, must be null: attention covers the whole sequence"
        )
    heads = hf_config["num_attention_heads"]
    fields = dict(
        num_layers=hf_config["num_hidden_layers"],
        hidden_size=hf_config["hidden_size"],
        ffn_hidden_size=hf_config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=hf_config.get("num_key_value_heads") or heads,
        kv_channels=hf_config.get("head_dim") or hf_config["hidden_size"] // heads,
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.get("rms_norm_eps", 1e-6),
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        rotary_interleaved=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        # Each fusion needs Transformer Engine, apex or torch.compile.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        # All weights are written again after building, but only initialising marks parameters as
        # tensor parallel; without the mark gradient norms leave out the shards of other ranks.
        perform_initialization=True,
        use_cpu_initialization=not torch.cuda.is_available(),
    )
    fields.update(_FAMILIES[model_type])
    if model_type in _EXPERT_FAMILIES:
        fields.update(_expert_fields(hf_config))
    fields.update(settings)
    _check_expert_parallel(fields)
    if fields.get("num_moe_experts") and fields.get("tensor_model_parallel_size", 1) > 1:
        # Without it every tensor parallel rank would send the same tokens to the experts, and
        # megatron-core refuses to train.
        fields["sequence_parallel"] = True
    if fields.get("virtual_pipeline_model_parallel_size"):
        # With two stages both neighbours are the same rank; megatron-core's default batched
        # sends then pair up wrongly and give wrong gradients without an error.
        fields.update(overlap_p2p_comm=True, batch_p2p_comm=False)
    return TransformerConfig(**fields)


def _expert_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens choose experts, and how large these are."""
    model_type = hf_config["model_type"]
    top_k = hf_config["num_experts_per_tok"]
    # Mixtral always divides the chosen probabilities by their sum: a softmax of the chosen logits.
    is_normalized = model_type == "mixtral" or bool(hf_config.get("norm_topk_prob", False))
    if is_normalized and top_k == 1:
        raise ValueError(
            "config.json: num_experts_per_tok=1 is not supported where the probabilities of the "
            f"chosen experts are normalized (model_type {model_type!r}): it would always be 1, and "
            "the router would have no gradient"
        )
    return dict(
        # transformers 5 writes num_local_experts for qwen3_moe too.
        num_moe_experts=hf_config.get("num_experts") or hf_config["num_local_experts"],
        moe_ffn_hidden_size=hf_config.get("moe_intermediate_size")
        or hf_config["intermediate_size"],
        moe_router_topk=top_k,
        moe_router_score_function="softmax",
        moe_router_pre_softmax=not is_normalized,
        moe_router_dtype="fp32",
        moe_aux_loss_coeff=0.0,  # a policy gradient has no use for a balance of experts
        moe_layer_freq=_expert_layers(hf_config),
        # alltoall needs CUDA streams; grouped products need Transformer Engine.
        moe_token_dispatcher_type="alltoall" if torch.cuda.is_available() else "allgather",
        moe_grouped_gemm=False,
        moe_permute_fusion=False,
    )


def _expert_layers(hf_config: Mapping[str, Any]) -> int | list[int]:
    """1 if every layer has experts, else 1 or 0 for each layer."""
    step = hf_config.get("decoder_sparse_step") or 1
    dense = hf_config.get("mlp_only_layers") or ()
    layers = [
        int(layer not in dense and (layer + 1) % step == 0)
        for layer in range(hf_config["num_hidden_layers"])
    ]
    return 1 if all(layers) else layers


def _check_expert_parallel(fields: Mapping[str, Any]) -> None:
    experts = fields.get("num_moe_experts")
    expert_parallel = fields.get("expert_model_parallel_size", 1)
    expert_tensor_parallel = fields.get("expert_tensor_parallel_size")
    if experts is None and (expert_parallel > 1 or expert_tensor_parallel is not None):
        raise ValueError(
            f"expert_model_parallel_size={expert_parallel} and expert_tensor_parallel_size="
            f"{expert_tensor_parallel} need a model with experts: leave them out, config.json "
            "describes a dense one"
        )
    if experts is not None and experts % expert_parallel:
        raise ValueError(
            f"expert_model_parallel_size={expert_parallel} must divide the {experts} experts"
        )
    shards = expert_tensor_parallel or fields.get("tensor_model_parallel_size", 1)
    if experts is not None and fields["moe_ffn_hidden_size"] % shards:
        raise ValueError(
            f"expert_tensor_parallel_size={shards} (default: tensor_model_parallel_size) must "
            f"divide the width of an expert, {fields['moe_ffn_hidden_size']}"
        )


def rope_settings(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding arguments of GPTModel.

    Reads both spellings: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling`.

    Raises:
        ValueError: a kind of scaling that megatron-core does not compute alike.
    """
    rope = dict(hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {})
    settings: dict[str, Any] = {
        "position_embedding_type": "rope",
        "rotary_base": rope.get("rope_theta", hf_config.get("rope_theta", 10000)),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return settings
    # megatron-core fixes these three numbers of Llama 3's scaling.
    fixed = {
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    }
    if kind != "llama3" or any(rope.get(key, value) != value for key, value in fixed.items()):
        raise ValueError(
            f"config.json: rope scaling {rope} is not supported; supported: none, or llama3 with "
            + ", ".join(f"{key}={value}" for key, value in fixed.items())
        )
    return {**settings, "rope_scaling": True, "rope_scaling_factor": rope["factor"]}
