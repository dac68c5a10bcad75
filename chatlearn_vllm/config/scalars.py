"""Which value does a piece of yaml text stand for, `${ENV:default}` templates included?"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

_NAME = re.compile(r"[A-Za-z_]\w*\Z")


class UnsetVariableError(ValueError):
    """A template has no default and its environment variable is not set."""

    def __init__(self, name: str) -> None:
        super().__init__(f"environment variable {name} is not set and there is no default")
        self.name = name


class JobYamlLoader(yaml.SafeLoader):
    """yaml with the numbers people mean.

    Beyond plain yaml 1.1: `1e-9` is a number and `None` is null; `12:30`, `010` and `2024-01-01`
    stay text instead of becoming 750, 8 and a date.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.repeated: list[str] = []
        """Where a key stands again that its map already has; the last one counts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen:
                line = key_node.start_mark.line + 1
                self.repeated.append(f"line {line}: key {key_node.value!r} is given twice")
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|None|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE|yes|Yes|no|No|on|On|off|Off", list("tTfFyYnNoO")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    JobYamlLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
    )


def typed(text: str) -> Any:
    """The value of text as if it stood alone in the yaml: number, bool, None, list, map or str."""
    stripped = text.strip()
    if stripped[:1] in ("[", "{", "'", '"'):
        try:
            return yaml.load(stripped, JobYamlLoader)
        except yaml.YAMLError:
            return text
    loader = JobYamlLoader("")
    tag = loader.resolve(yaml.ScalarNode, stripped, (True, False))
    if tag == loader.DEFAULT_SCALAR_TAG:
        return text
    return loader.construct_object(yaml.ScalarNode(tag, stripped))


def fill(text: str, env: Mapping[str, str]) -> Any:
    """Replace every `${NAME:default}` in a scalar by the environment's value or the default.

    The default is all text up to the closing brace, further colons and templates included. A scalar
    that is one template is typed like yaml, any other stays text.

    Raises:
        UnsetVariableError: the scalar is one template without a value; a ValueError like any other.
        ValueError: another template has no value, or one is malformed.
    """
    is_one_template = text.startswith("${") and closing_brace(text, 0) == len(text) - 1
    try:
        filled = _substitute(text, env)
    except UnsetVariableError as error:
        raise (error if is_one_template else ValueError(str(error))) from None
    return typed(filled) if is_one_template else filled


def _substitute(text: str, env: Mapping[str, str]) -> str:
    filled, start = "", 0
    while (opening := text.find("${", start)) >= 0:
        closing = closing_brace(text, opening)
        name, colon, default = text[opening + 2 : closing].partition(":")
        if not _NAME.match(name):
            raise ValueError(f"{name!r} is not the name of an environment variable")
        if name not in env and not colon:
            raise UnsetVariableError(name)
        filled += text[start:opening] + (env[name] if name in env else _substitute(default, env))
        start = closing + 1
    return filled + text[start:]


def closing_brace(text: str, opening: int) -> int:
    """Where a template ends that starts at `opening`.

    Raises:
        ValueError: it has no end.
    """
    depth = 0
    for index in range(opening + 1, len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return index
    raise ValueError("a template ${ has no closing brace")
