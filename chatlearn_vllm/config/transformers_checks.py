"""What may be asked of `inference_engine: transformers`?"""

import importlib.util
from collections.abc import Iterator

from chatlearn_vllm.config.model_args import ModelArgs
from chatlearn_vllm.config.problems import Key
from chatlearn_vllm.config.schema import ModelConfig, RuntimeEnvConfig
from chatlearn_vllm.config.upstream_fields import FIELDS_WITHOUT_VLLM

_CHANGES_RESPONSES = (
    "hf_overrides", "hf_config_path", "model_impl", "revision", "code_revision",
    "tokenizer_revision", "tokenizer_mode", "generation_config", "override_generation_config",
    "logprobs_mode", "enable_lora", "logits_processors", "kv_cache_dtype",
)  # fmt: skip
"""Fields of vLLM's EngineArgs with which another engine would answer otherwise."""

_FLASH_ATTENTION = ("flash_attn", "kernels")
"""Packages that have flash_attention_2; from the second Transformers takes it without the first."""


def transformers_problems(model: ModelConfig) -> Iterator[tuple[Key, str]]:
    """Keys that change what is generated and that Transformers does not have, with the remedy."""
    args, at = model.model_args, ("models", model.name, "model_args")
    if args.inference_engine != "transformers":
        return
    remedy = "leave it out, or set inference_engine: vllm"
    for name in args.sampling_args:
        if name not in FIELDS_WITHOUT_VLLM["sampling_args"]:
            yield (*at, name), f"is none of the sampling keys of Transformers here; {remedy}"
    for name, value in args.engine_args.items():
        if name == "logprobs_mode" and value == "processed_logprobs":
            continue
        if name in _CHANGES_RESPONSES:
            yield (*at, name), f"has no meaning for inference_engine: transformers; {remedy}"


def attention_problem(model: ModelConfig, runtime_env: RuntimeEnvConfig) -> str | None:
    """Why Transformers would not find the attention that is asked for; None if it may.

    Args:
        model: any model of the job.
        runtime_env: may bring packages to the workers that are not here.
    """
    args = model.model_args
    is_asked_for = args.inference_engine == "transformers" and not model.trainable
    if not is_asked_for or args.attn_implementation != "flash_attention_2":
        return None
    if runtime_env.pip or any(importlib.util.find_spec(name) for name in _FLASH_ATTENTION):
        return None
    return "needs the package flash_attn, which is not installed; install it, or set sdpa"


def unknown_engine_args(args: ModelArgs) -> list[str]:
    """Arguments of vLLM's engine, as `key=value`, that Transformers has no use for."""
    known = FIELDS_WITHOUT_VLLM["engine_args"] | set(_CHANGES_RESPONSES)
    return [f"{name}={value!r}" for name, value in args.engine_args.items() if name not in known]
