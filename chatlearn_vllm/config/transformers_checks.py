"""What may be asked of `inference_engine: transformers`?"""

from collections.abc import Iterator

from chatlearn_vllm.config.model_args import ModelArgs
from chatlearn_vllm.config.problems import Key
from chatlearn_vllm.config.schema import ModelConfig
from chatlearn_vllm.config.upstream_fields import FIELDS_WITHOUT_VLLM

_CHANGES_RESPONSES = (
    "hf_overrides", "hf_config_path", "model_impl", "revision", "code_revision",
    "tokenizer_revision", "tokenizer_mode", "generation_config", "override_generation_config",
    "logprobs_mode", "enable_lora", "logits_processors", "kv_cache_dtype",
)  # fmt: skip
"""Fields of vLLM's EngineArgs with which another engine would answer otherwise."""


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


def unknown_engine_args(args: ModelArgs) -> list[str]:
    """Arguments of vLLM's engine, as `key=value`, that Transformers has no use for."""
    known = FIELDS_WITHOUT_VLLM["engine_args"] | set(_CHANGES_RESPONSES)
    return [f"{name}={value!r}" for name, value in args.engine_args.items() if name not in known]
