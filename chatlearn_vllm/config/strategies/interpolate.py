"""What does `${...}` stand for in a strategy file?

    ${response_length}         the value of another key of the file, whatever its type
    ${actor_train.model_args}  a nested key; ${.dtype} starts beside this one, ${..dtype} above
    ${NAME:default}            the environment variable NAME, as in all files of this project
    ${oc.env:NAME,default}     the same in OmegaConf's notation

A name without a colon is a key of the file where there is one; only otherwise it is an environment
variable. A name with a colon is always an environment variable, but for those that Hydra and
OmegaConf would compute something for, as in ${now:%Y}; they are refused.
"""

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chatlearn_vllm.config.problems import Key, Problem, dotted_key
from chatlearn_vllm.config.scalars import closing_brace, typed
from chatlearn_vllm.config.tree import BROKEN, Tree

_ENVIRONMENT = re.compile(r"(?P<name>[A-Za-z_]\w*):(?P<default>.*)\Z", re.DOTALL)
_OMEGACONF = re.compile(r"oc\.env:\s*(?P<name>[A-Za-z_]\w*)\s*(?:,(?P<default>.*))?\Z", re.DOTALL)
_COMPUTED = re.compile(r"(?P<name>now|hydra|eval|python_version|oc\.(?!env:)[\w.]+):")
"""What Hydra, OmegaConf and ROLL would compute."""
_PATH = re.compile(r"(?P<dots>\.*)(?P<names>[\w-]+(?:\.[\w-]+)*)\Z")


def interpolate(
    tree: Tree, env: Mapping[str, str], problems: list[Problem], missing_files: Sequence[str] = ()
) -> None:
    """Replace all `${...}` in a tree's values, in place.

    Args:
        tree: of a strategy file, the command line included.
        env: environment variables.
        problems: takes what cannot be resolved; such a value is BROKEN afterwards.
        missing_files: that the file's `defaults` name; told where a key is not found.
    """
    resolver = _Resolver(tree, env, missing_files)
    for key in [*_leaves(tree.values)]:
        if key[0] == "hydra":
            continue  # without effect, and full of what only Hydra can fill in
        parent = tree.get(key[:-1])
        try:
            parent[key[-1]] = resolver.value_at(key)
        except (ValueError, RecursionError) as error:
            is_deep = isinstance(error, RecursionError)
            rule = "templates are nested too deep" if is_deep else str(error)
            file, dotted = tree.origin(key)
            problems.append(Problem(file, dotted, rule, parent[key[-1]]))
            parent[key[-1]] = BROKEN


def _leaves(values: Any, at: Key = ()) -> Iterator[Key]:
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _leaves(value, (*at, name))
    else:
        yield at


class _Resolver:
    def __init__(self, tree: Tree, env: Mapping[str, str], missing_files: Sequence[str]) -> None:
        self._values = copy.deepcopy(tree.values)
        self._env = env
        self._missing_files = missing_files
        self._open: list[Key] = []
        """Keys that are being resolved, each asked for by the one before."""

    def value_at(self, key: Key) -> Any:
        """The value of an existing key without templates."""
        if key in self._open:
            circle = [*self._open[self._open.index(key) :], key]
            raise ValueError("keys stand for each other: " + " -> ".join(map(dotted_key, circle)))
        self._open.append(key)
        try:
            value: Any = self._values
            for name in key:
                value = value[name]
            return self._filled(value, key)
        finally:
            self._open.pop()

    def _filled(self, value: Any, at: Key) -> Any:
        if isinstance(value, dict):
            return {name: self._filled(item, (*at, name)) for name, item in value.items()}
        if isinstance(value, list):
            return [self._filled(item, at) for item in value]
        return self._fill(value, at) if isinstance(value, str) else value

    def _fill(self, text: str, at: Key) -> Any:
        """A text with its templates replaced; one that is a single template keeps its type."""
        if text.startswith("${") and closing_brace(text, 0) == len(text) - 1:
            return self._template(text[2:-1], at)
        filled, start = "", 0
        while (opening := text.find("${", start)) >= 0:
            closing = closing_brace(text, opening)
            value = self._template(text[opening + 2 : closing], at)
            if isinstance(value, dict | list):
                raise ValueError(f"{text[opening : closing + 1]} is a map or list inside a text")
            filled += text[start:opening] + str(value)
            start = closing + 1
        return filled + text[start:]

    def _template(self, inner: str, at: Key) -> Any:
        if computed := _COMPUTED.match(inner):
            raise ValueError(
                f"${{{computed['name']}:...}} is not computed here: Hydra does not run the job; "
                "write the value, or ${NAME:default} with an environment variable"
            )
        variable = _ENVIRONMENT.match(inner) or _OMEGACONF.match(inner)
        if variable:
            return self._variable(variable["name"], variable["default"], at)
        if "${" in inner:
            inner = str(self._fill(inner, at))
        path = _PATH.match(inner)
        if not path:
            raise ValueError(
                f"${{{inner}}} is neither the name of a key nor ${{NAME:default}} with an "
                "environment variable"
            )
        names = tuple(path["names"].split("."))
        if dots := len(path["dots"]):
            if dots > len(at):
                raise ValueError(f"${{{inner}}} leads out of the file")
            return self._of_key((*at[: len(at) - dots], *names), inner)
        return self._of_key(names, inner)

    def _variable(self, name: str, default: str | None, at: Key) -> Any:
        if name in self._env:
            return typed(self._env[name])
        if default is None:
            raise ValueError(f"environment variable {name} is not set and there is no default")
        value = self._fill(default, at)
        return typed(value) if isinstance(value, str) else value

    def _of_key(self, key: Key, inner: str) -> Any:
        value: Any = self._values
        for name in key:
            if not isinstance(value, dict) or name not in value:
                break
            value = value[name]
        else:
            return self.value_at(key)
        if inner in self._env:
            return typed(self._env[inner])
        raise ValueError(f"the file has no key {'.'.join(key)}{self._hint('.'.join(key))}")

    def _hint(self, dotted: str) -> str:
        known = [
            dotted_key(key[:length]) for key in _leaves(self._values) for length in (1, len(key))
        ]
        nearest = difflib.get_close_matches(dotted, known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ", nor is there such a variable"
        if self._missing_files:
            hint += "; not found were, from its defaults: " + ", ".join(self._missing_files)
        return hint
