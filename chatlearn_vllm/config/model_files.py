"""What do the JSON files in a model's directory say?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatlearn_vllm.config.problems import ConfigError, Problem

_LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
"""Keys of config.json of which vLLM takes the least; `model_max_length` counts before all."""
OTHER_CONFIG = frozenset({"hf_overrides", "hf_config_path"})
"""Engine arguments with which vLLM reads something else than config.json."""
_SCALED_ALREADY = (
    "default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling",
)  # fmt: skip
"""Kinds of rotary positions whose `max_position_embeddings` is the whole length, as vLLM has it."""


def read_config_json(load: str | None) -> dict[str, Any]:
    """The config.json in a checkpoint's directory; empty without the file.

    Raises:
        ConfigError: the file holds something else than a JSON object.
    """
    return {} if load is None else read_json_object(Path(load, "config.json"))


def read_json_object(path: Path) -> dict[str, Any]:
    """What a file holds; empty without the file.

    Raises:
        ConfigError: that is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the text's encoding, too
        why = f": {error}"
    else:
        if isinstance(content, dict):
            return content
        why = ""
    rule = f"must hold a JSON object{why}; copy the file from where the model came from"
    raise ConfigError([Problem(str(path), "", rule)])


def rotary_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of rotary positions, under the key of either version of it."""
    return (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a mixture of experts."""
    return bool(config.get("num_experts") or config.get("num_local_experts"))


def longest_sequence(config: Mapping[str, Any]) -> int | None:
    """Tokens for which a model has positions, as vLLM counts them.

    Args:
        config: of config.json.

    Returns:
        None where the file does not say it: then the model's class has a length of its own.
    """
    rope = rotary_keys(config)
    has_kinds = any(isinstance(value, dict) for value in rope.values())  # of layers, each its own
    if config.get("max_position_embeddings") is None or has_kinds:
        return None
    longest = min(config[name] for name in _LENGTHS if config.get(name) is not None)
    longest = config.get("model_max_length") or longest
    if rope.get("rope_type", rope.get("type", "default")) not in _SCALED_ALREADY:
        longest *= rope.get("factor") or 1
    return int(longest)
