"""Which sizes does a Hugging Face config.json say that a model has?"""

from collections.abc import Mapping, Sequence
from typing import Any

from chatlearn_vllm.layouts.families import FAMILIES

_NEEDED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
)  # fmt: skip
_NEEDED_BY_TYPE: dict[str, tuple[str, ...]] = {
    "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads", "head_dim"),
    "mixtral": ("num_key_value_heads",),
    "qwen3_moe": ("num_key_value_heads", "moe_intermediate_size"),
}
"""Where the key is absent, transformers and vLLM take a number of the model type's own."""


def model_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields of `ModelShape`, but for its head.

    Raises:
        ValueError: the model type has no layout, or keys are missing or cannot be sizes; names all.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"config.json: model_type={model_type!r} has no weight layout; "
            f"supported: {', '.join(FAMILIES)}"
        )
    has_experts = FAMILIES[model_type].experts is not None
    missing = _missing(config, model_type, has_experts)
    if missing:
        raise ValueError(f"config.json: missing {', '.join(missing)} (model_type {model_type})")
    problems = [*_wrong_sizes(config, has_experts), *_wrong_types(config)]
    problems = problems or [*_wrong_heads(config)]
    if problems:
        raise ValueError(f"config.json: {'; '.join(problems)}")
    heads, num_layers = config["num_attention_heads"], config["num_hidden_layers"]
    sizes = dict(
        num_layers=num_layers,
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        model_type=model_type,
    )
    if has_experts:
        step = config.get("decoder_sparse_step") or 1
        only_dense = config.get("mlp_only_layers") or ()
        sizes |= dict(
            num_experts=config.get("num_local_experts") or config["num_experts"],
            moe_ffn_hidden_size=(
                config.get("moe_intermediate_size") or config["intermediate_size"]
            ),
            dense_layers=frozenset(
                i for i in range(num_layers) if i in only_dense or (i + 1) % step
            ),
        )
    return sizes


def _missing(config: Mapping[str, Any], model_type: str, has_experts: bool) -> list[str]:
    missing = [key for key in _NEEDED if config.get(key) is None]
    missing += [key for key in _NEEDED_BY_TYPE.get(model_type, ()) if key not in config]
    # transformers 5 writes num_local_experts for qwen3_moe, too.
    if has_experts and config.get("num_local_experts") is config.get("num_experts") is None:
        missing.append("num_local_experts" if model_type == "mixtral" else "num_experts")
    return missing


def _wrong_sizes(config: Mapping[str, Any], has_experts: bool) -> list[str]:
    keys = [*_NEEDED, "num_key_value_heads", "head_dim"]
    if has_experts:
        keys += [
            "num_local_experts", "num_experts", "moe_intermediate_size", "decoder_sparse_step",
        ]  # fmt: skip
    given = {key: config[key] for key in keys if config.get(key) is not None}
    return [
        f"{key}={value!r} must be a positive integer"
        for key, value in given.items()
        if type(value) is not int or value < 1
    ]


def _wrong_types(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if not isinstance(tied := config.get("tie_word_embeddings"), bool | None):
        problems.append(f"tie_word_embeddings={tied!r} must be true or false")
    only_dense = config.get("mlp_only_layers")
    is_list = isinstance(only_dense, Sequence) and all(type(n) is int for n in only_dense)
    if only_dense is not None and not is_list:
        problems.append(f"mlp_only_layers={only_dense!r} must be a list of layer numbers")
    return problems


def _wrong_heads(config: Mapping[str, Any]) -> list[str]:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    problems = []
    if heads % groups:
        problems.append(
            f"num_attention_heads={heads} must be a multiple of num_key_value_heads={groups}"
        )
    if config.get("head_dim") is None and hidden % heads:
        problems.append(
            f"hidden_size={hidden} must be a multiple of num_attention_heads={heads}, or head_dim "
            "be given"
        )
    return problems
