"""Which arguments do the installed vLLM and megatron-core take?

Read from their source files without importing them: importing vLLM takes seconds and loads torch.
"""

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

_SPECULATIVE_CONFIG = ("vllm/config/speculative.py", "SpeculativeConfig")
_SOURCES = {
    "engine_args": (("vllm/engine/arg_utils.py", "EngineArgs"),),
    "sampling_args": (("vllm/sampling_params.py", "SamplingParams"),),
    "transformer_args": (
        ("megatron/core/model_parallel_config.py", "ModelParallelConfig"),
        ("megatron/core/transformer/transformer_config.py", "TransformerConfig"),
    ),
}
_NAMES = {
    "load_format": ("vllm/model_executor/model_loader/__init__.py", "LoadFormats"),
    "quantization": (
        "vllm/model_executor/layers/quantization/__init__.py", "QuantizationMethods"
    ),
}  # fmt: skip
"""Where vLLM lists the values of a key of ours that it takes as text."""
_SAMPLING_MAPS = {
    "structured_outputs": ("vllm/sampling_params.py", "StructuredOutputsParams"),
    "repetition_detection": ("vllm/sampling_params.py", "RepetitionDetectionParams"),
}
"""Fields of SamplingParams that are maps with fields of their own."""
_SCALARS = {"bool": bool, "int": int, "float": float, "str": str}
_DROPPED = {
    "best_of": "responses are returned as they are drawn; ask for more of them",
    **{
        f"guided_{kind}": f"set structured_outputs: {{{kind}: ...}}"
        for kind in ("json", "regex", "choice", "grammar")
    },
}
"""Sampling keys of older vLLM versions -> what stands in their place."""

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
def upstream_scalars() -> Mapping[str, Mapping[str, type]]:
    """Types of the fields that hold one bool, int, float or str, by ModelArgs' pass-through dict.

    Many of them also take None.
    """
    found: dict[str, dict[str, type]] = {}
    for target, sources in _SOURCES.items():
        for source in sources:
            for name, annotation in _fields(*source).items():
                plain = annotation.removesuffix(" | None")
                plain = plain.removeprefix("Optional[").removesuffix("]")
                if plain in _SCALARS:
                    found.setdefault(target, {})[name] = _SCALARS[plain]
    return MappingProxyType(found)


@functools.cache
def engine_choices() -> Mapping[str, tuple[Any, ...]]:
    """Fields of vLLM's EngineArgs that take one of a few values; empty without vLLM.

    Some of them also take None.
    """
    literals: dict[str, ast.expr] = {}
    for path in _files("vllm/config"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript() as value):
                    literals[name] = value
    choices = {}
    for name, annotation in _fields(*_SOURCES["engine_args"][0]).items():
        kind = ast.parse(annotation.removesuffix(" | None"), mode="eval").body
        if found := _values(kind, literals):
            choices[name] = found
    return MappingProxyType(choices)


def _values(kind: ast.expr, literals: Mapping[str, ast.expr]) -> tuple[Any, ...]:
    """What a `Literal`, or a name of one, allows; literals may hold others."""
    match kind:
        case ast.Name(id=name) if name in literals:
            return _values(literals[name], literals)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return tuple(
                value
                for part in parts
                for value in (
                    [part.value] if isinstance(part, ast.Constant) else _values(part, literals)
                )
            )
    return ()


@functools.cache
def upstream_names(key: str) -> tuple[str, ...]:
    """The values of `load_format` or `quantization` that vLLM knows; empty without vLLM."""
    path, name = _NAMES[key]
    for node in ast.parse(_source(path)).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == name
            and isinstance(node.value, ast.Subscript)
        ):
            return ast.literal_eval(node.value.slice)
    return ()


def dropped_by_vllm(key: str) -> str | None:
    """What to say of a sampling key that vLLM had once; None of any other."""
    return f"vLLM no longer has it; {_DROPPED[key]}" if key in _DROPPED else None


@functools.cache
def speculative_fields() -> frozenset[str]:
    """Fields of vLLM's SpeculativeConfig; empty where vLLM is not installed."""
    return frozenset(_fields(*_SPECULATIVE_CONFIG))


@functools.cache
def sampling_map_fields(name: str) -> frozenset[str]:
    """What a field of SamplingParams may hold that is a map; empty without vLLM."""
    return frozenset(_fields(*_SAMPLING_MAPS[name]))


def _fields(path: str, class_name: str) -> Mapping[str, str]:
    """Public annotated fields of a class with their annotations."""
    for node in ast.parse(_source(path)).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return {
                field.target.id: annotation
                for field in node.body
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and not field.target.id.startswith("_")
                and "ClassVar" not in (annotation := ast.unparse(field.annotation))
            }
    return {}


def _source(path: str) -> str:
    """A source file under an installed package; empty where that is not installed."""
    for source in _installed(path):
        if source.is_file():
            return source.read_text(encoding="utf-8")
    return ""


def _files(path: str) -> list[Path]:
    """The source files of a directory under an installed package, none where that is not there."""
    return [file for directory in _installed(path) for file in sorted(directory.glob("*.py"))]


def _installed(path: str) -> list[Path]:
    """Where a path under a package may be."""
    package, _, rest = path.partition("/")
    # find_spec of the top-level package runs none of its code; of a submodule it would.
    spec = importlib.util.find_spec(package)
    return [Path(location, rest) for location in (spec and spec.submodule_search_locations) or ()]
