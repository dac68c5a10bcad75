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
}
"""model_type -> how it differs from Llama, in TransformerConfig's words."""

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "attention_dropout": (0, 0.0),
}
"""config.json keys that have one supported meaning here; an absent key has that meaning."""


def transformer_config(hf_config: Mapping[str, Any], **settings: Any) -> TransformerConfig:
    """Translate a parsed config.json.

    Args:
        hf_config: the parsed config.json of a dense Llama-like model.
        settings: further TransformerConfig fields (parallel sizes, dtypes, recomputation, ...);
            they win over what follows from config.json.

    Raises:
        ValueError: the model type, or the value of a key, is not supported.
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
    fields.update(settings)
    if fields.get("virtual_pipeline_model_parallel_size"):
        # With two stages both neighbours are the same rank; megatron-core's default batched
        # sends then pair up wrongly and give wrong gradients without an error.
        fields.update(overlap_p2p_comm=True, batch_p2p_comm=False)
    return TransformerConfig(**fields)


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
