"""How do the schema's docstrings become the tables of docs/configuration.md?

    python -m chatlearn_vllm.config.reference docs/configuration.md

writes the tables anew between the file's two markers.
"""

import sys
import types
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from chatlearn_vllm.config.loader import keys_of
from chatlearn_vllm.config.model_args import ModelArgs
from chatlearn_vllm.config.schema import (
    BatchGenerationConfig,
    LoraConfig,
    MismatchStopConfig,
    MismatchWarnConfig,
    ModelConfig,
    RuntimeConfig,
    RuntimeEnvConfig,
)
from chatlearn_vllm.config.section import Section

BEGIN = "<!-- tables: begin, written by `python -m chatlearn_vllm.config.reference` -->"
END = "<!-- tables: end -->"


def tables() -> str:
    """All keys in Markdown, one table per group of the schema."""
    parts = [_table(group, "##") for group in (RuntimeEnvConfig, ModelConfig)]
    parts += [_table(group, "###") for group in (LoraConfig, BatchGenerationConfig)]
    parts += [_table(group, "##") for group in RuntimeConfig.__bases__]
    parts += [_table(group, "###") for group in (MismatchWarnConfig, MismatchStopConfig)]
    parts.append("## Model files\n\nThe keys of `model_config_file`, flat, in any order.\n")
    parts += [_table(group, "###") for group in ModelArgs.__bases__]
    return "\n".join(parts)


def with_tables(document: str) -> str:
    """The document with its tables written anew."""
    head, _, rest = document.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{tables()}\n{END}{tail}"


def _table(group: type[Section], heading: str) -> str:
    title, _, text = (group.__doc__ or "").partition("\n\n")
    lines = [f"{heading} {title}", ""]
    if text:
        lines += [" ".join(text.split()), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    names = keys_of(group)
    for name, field in group.model_fields.items():
        key = field.alias or name
        if key in names:
            meaning = " ".join((field.description or "").split())
            lines.append(f"| `{key}` | {_type(field)} | {_default(field)} | {meaning} |")
    return "\n".join((*lines, ""))


def _default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, Section):
        return ""
    shown = {(): "[]", "": '""'}.get(value, value) if isinstance(value, str | tuple) else value
    return f"`{shown}`"


def _type(field: FieldInfo) -> str:
    return _type_text(field.annotation, field.metadata)


def _type_text(annotation: Any, metadata: typing.Iterable[Any] = ()) -> str:
    """A type in words, with its bounds."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inner = [part for info in arguments[1:] for part in getattr(info, "metadata", (info,))]
        return _type_text(arguments[0], inner)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(part) for part in arguments)
    if origin is tuple:
        return f"list of {_type_text(arguments[0])}"
    if annotation is type(None):
        return "None"
    if origin is dict or issubclass(annotation, Section):
        return "map"
    return " ".join((annotation.__name__, *_bounds(metadata)))


def _bounds(metadata: typing.Iterable[Any]) -> list[str]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return [
        f"{sign} {getattr(info, name):.10g}"
        for info in metadata
        for name, sign in signs.items()
        if getattr(info, name, None) is not None
    ]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument)
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
