"""Which keys of an engine has a model no use for?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from chatlearn_vllm.config.server_checks import START
from chatlearn_vllm.config.transformers_checks import unknown_engine_args

if TYPE_CHECKING:
    from chatlearn_vllm.config.model_args import ModelArgs
    from chatlearn_vllm.config.schema import ModelConfig

_OF_VLLM = (
    "gpu_memory_utilization", "block_size", "max_num_batched_tokens", "enforce_eager",
    "enable_prefix_caching",
)  # fmt: skip
"""Keys of the schema that only an engine reads which is vLLM's and the job's."""
_OF_CALLS = ("vllm_server_timeout", "vllm_server_max_retries", "vllm_server_api_key")
_NOT_SHOWN = ("vllm_server_api_key", "vllm_server")
"""Keys whose values are secrets, or may hold one."""
_OF_HUBS = ("revision", "code_revision", "tokenizer_revision", "hf_token", "download_dir")
"""Arguments of vLLM's engine about models that are not in a directory."""
_FORMATS_OF_TRANSFORMERS = ("dummy", "auto", "safetensors", "pt", "hf")
"""Of load_format: random weights, or the directory's, in whatever form it has them."""


def without_effect(model: ModelConfig) -> Iterator[tuple[list[str], str]]:
    """Arguments of an engine that a model has no use for, as `key=value`, and why."""
    args = model.model_args
    if model.trainable:
        # Of the others many a trainer has those of a file that it shares with the policy.
        groups = [(_given(args, "vllm_server"), "a model that is trained calls no server")]
    else:
        groups = [*_unused(model)]
    yield from ((given, why) for given, why in groups if given)


def _unused(model: ModelConfig) -> Iterator[tuple[list[str], str]]:
    """The same of a model that may generate; some of the lists are empty."""
    args = model.model_args
    engine = args.inference_engine
    if model.name.startswith("reward"):
        yield _given(args, "vllm_server"), "unless it generates: no other model calls a server"
    if engine == "transformers":
        given = [*_given(args, *_OF_VLLM), *unknown_engine_args(args)]
        if args.load_format not in _FORMATS_OF_TRANSFORMERS:
            given += _given(args, "load_format")
        yield given, "vLLM's, and inference_engine is transformers"
    else:
        why = "of inference_engine: transformers; vLLM's own is attention_backend"
        yield _given(args, "attn_implementation"), why
        yield [name for name in _OF_HUBS if name in args.engine_args], "`load` is a directory"
        name = "override_generation_config"
        given = [name] if args.engine_args.get(name) else []
        yield given, "every request says how it is sampled; set temperature, top_p, ... themselves"
    if engine == "server" and args.vllm_server != (START,):
        given = [*_given(args, *_OF_VLLM, "sleep_level"), *_changed(args, "dtype")]
        yield given, "give them to the server when you start it"
    if engine != "server":
        yield _changed(args, *_OF_CALLS), "only with inference_engine: server"
    if not any(args.beam_width(is_eval=is_eval) > 1 for is_eval in (False, True)):
        yield _changed(args, "length_penalty"), "only beams, num_beams above 1, are compared by it"
    if args.use_beam_search and args.eval_num_beams == 1:
        why = "set eval_num_beams to the number of beams that they are to search"
        yield ["use_beam_search=True in evaluations"], why


def _changed(args: ModelArgs, *names: str) -> list[str]:
    """Those of some keys that the user set to something else than the default."""
    defaults = {name: type(args).model_fields[name].default for name in names}
    return _given(args, *(name for name in names if args[name] != defaults[name]))


def _given(args: ModelArgs, *names: str) -> list[str]:
    """Those of some keys that the user set, with their values where these may be shown."""
    given = [name for name in names if name in args.model_fields_set]
    return [name if name in _NOT_SHOWN else f"{name}={args[name]!r}" for name in given]
