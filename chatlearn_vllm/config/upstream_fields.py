"""Which arguments do the installed vLLM and megatron-core take?

Read from their source files without importing them: importing vLLM takes seconds and loads torch.
"""

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

_SPECULATIVE_CONFIG = ("vllm/config/speculative.py", "SpeculativeConfig")
_SOURCES = {
    "engine_args": (("vllm/engine/arg_utils.py", "EngineArgs"),),
    "sampling_args": (("vllm/sampling_params.py", "SamplingParams"),),
    "transformer_args": (
        ("megatron/core/model_parallel_config.py", "ModelParallelConfig"),
        ("megatron/core/transformer/transformer_config.py", "TransformerConfig"),
    ),
}

FIELDS_WITHOUT_VLLM = MappingProxyType(
    {
        "engine_args": frozenset({"trust_remote_code"}),
        "sampling_args": frozenset(
            {
                "stop", "stop_token_ids", "include_stop_str_in_output", "min_tokens", "logit_bias",
                "allowed_token_ids", "logprobs", "detokenize",
            }
        ),
        "transformer_args": frozenset(),
    }
)  # fmt: skip
"""Fields of vLLM's that `inference_engine: transformers` reads; known without vLLM, too."""


@functools.cache
def upstream_fields() -> Mapping[str, frozenset[str]]:
    """Field names by ModelArgs' pass-through dict; of libraries that are installed."""
    return MappingProxyType(
        {
            target: FIELDS_WITHOUT_VLLM[target].union(
                *(_fields(path, name) for path, name in sources)
            )
            for target, sources in _SOURCES.items()
        }
    )


@functools.cache
def speculative_fields() -> frozenset[str]:
    """Fields of vLLM's SpeculativeConfig; empty where vLLM is not installed."""
    return _fields(*_SPECULATIVE_CONFIG)


def _fields(path: str, class_name: str) -> frozenset[str]:
    """Public annotated fields of a class, from its source file under an installed package."""
    package, _, rest = path.partition("/")
    # find_spec of the top-level package runs none of its code; of a submodule it would.
    spec = importlib.util.find_spec(package)
    for location in (spec and spec.submodule_search_locations) or ():
        source = Path(location, rest)
        if source.is_file():
            return _annotated_names(source.read_text(encoding="utf-8"), class_name)
    return frozenset()


def _annotated_names(source: str, class_name: str) -> frozenset[str]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return frozenset(
                field.target.id
                for field in node.body
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and not field.target.id.startswith("_")
                and "ClassVar" not in ast.unparse(field.annotation)
            )
    return frozenset()
