"""What do a yaml file, its includes and the command line say, and which of them said it?"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from chatlearn_vllm.config.problems import NO_VALUE, Key, Problem, dotted_key
from chatlearn_vllm.config.scalars import JobYamlLoader, UnsetVariableError, fill

BROKEN: Any = object()
"""Stands for a value that could not be read and was already reported."""

Origin = tuple[str, str]
"""(file, dotted key in that file)."""


@dataclass
class Tree:
    """Nested maps, with the origin of every entry."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, Origin] = field(default_factory=dict)
    written: dict[Key, Any] = field(default_factory=dict)
    """Values as the user gave them, where ours were computed from them; NO_VALUE for none."""
    words: dict[str, str] = field(default_factory=dict)
    """What the user calls keys of ours, where that differs."""

    @classmethod
    def of(cls, values: dict[str, Any], file: str) -> "Tree":
        """A tree in which everything comes from one file."""
        tree = cls(values)
        tree._own(values, (), file)
        return tree

    def _own(self, values: dict[str, Any], at: Key, file: str) -> None:
        for name, value in values.items():
            key = (*at, str(name))
            self.origins[key] = (file, dotted_key(key))
            if isinstance(value, dict):
                self._own(value, key, file)

    def merge(self, over: "Tree", at: Key = ()) -> None:
        """Lay `over` on top of the map at `at`: its entries win, maps are merged."""
        target = self.values
        for name in at:
            target = target.setdefault(name, {})
        _merge(target, over.values)
        for key, origin in over.origins.items():
            if isinstance(over.get(key), dict):
                self.origins.setdefault((*at, *key), origin)
            else:
                self.origins[(*at, *key)] = origin

    def rename(self, at: Key, old: str, new: str) -> None:
        """Give an entry of the map at `at` another name."""
        parent = self.get(at)
        parent[new] = parent.pop(old)
        before, after = (*at, old), (*at, new)
        for key in [key for key in self.origins if key[: len(before)] == before]:
            self.origins[(*after, *key[len(before) :])] = self.origins.pop(key)

    def get(self, key: Key, default: Any = None) -> Any:
        """The value at a key, or `default`."""
        value: Any = self.values
        for name in key:
            if not isinstance(value, dict) or name not in value:
                return default
            value = value[name]
        return value

    def given(self, key: Key) -> Any:
        """The value at a key as the user wrote it; NO_VALUE if nobody did."""
        return self.written.get(key, self.get(key, NO_VALUE))

    def in_users_words(self, text: str) -> str:
        """A rule or notice with the names that the user knows."""
        if not self.words:
            return text
        longest_first = sorted(self.words, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        return re.sub(
            rf"(?<![\w.])(?:{pattern})(?:(?<=\.)|(?!\w))", lambda found: self.words[found[0]], text
        )

    def origin(self, key: Key) -> Origin:
        """Where a key was written; for a key nobody wrote, where its nearest parent was."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.origins:
                file, dotted = self.origins[key[:length]]
                return file, dotted_key((dotted, *key[length:]))
        return "", dotted_key(key)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> None:
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(name), dict):
            _merge(under[name], value)
        else:
            under[name] = value


class TreeReader:
    """Reads yaml files with their includes.

    Args:
        main_dir: where an include is looked for that is not beside the including file.
        problems: takes what is wrong with the files.
        notices: takes what their user should know.
    """

    def __init__(self, main_dir: Path, problems: list[Problem], notices: list[str]) -> None:
        self.unset: dict[Origin, str] = {}
        """Keys that are left out, for the environment variable that gives them is not set."""
        self._main_dir = main_dir
        self._problems = problems
        self._notices = notices

    def read(self, path: Path, including: Sequence[Path] = ()) -> Tree:
        """One file over its includes: own keys win, later includes win over earlier ones."""
        return self.resolve(path, self.load(path), including)

    def resolve(self, path: Path, loaded: Any, including: Sequence[Path] = ()) -> Tree:
        """What was loaded of a file, over its includes and with its templates filled in."""
        values = self._fill(loaded, str(path), ())
        if not isinstance(values, dict):
            return Tree()
        tree = Tree()
        for name in self._include_names(values.pop("includes", None), str(path)):
            included = self.find(path.parent, name)
            chain = (*including, path.resolve())
            if included is None:
                self._report(path, "includes", "no such file", name)
            elif included.resolve() in chain:
                self._report(path, "includes", "files include each other in a circle", name)
            else:
                tree.merge(self.read(included, chain))
        tree.merge(Tree.of(values, str(path)))
        return tree

    def find(self, directory: Path, name: str) -> Path | None:
        """A file named in a yaml of `directory`: relative to it, else to the main file's."""
        candidates = (directory / name, self._main_dir / name)
        return next((path for path in candidates if path.is_file()), None)

    def load(self, path: Path) -> Any:
        """A file as it is; None if it cannot be read, which is reported."""
        try:
            loader = JobYamlLoader(path.read_text(encoding="utf-8"))
            values = loader.get_single_data()
            self._notices += [f"{path}: {text}; the last one counts" for text in loader.repeated]
        except OSError as error:
            self._report(path, "", error.strerror or str(error))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self._report(path, "", "not yaml: " + " ".join(str(error).split()))
        else:
            if values is None or isinstance(values, dict):
                return values or {}
            self._report(path, "", "must be a map of keys")
        return None

    def _fill(self, value: Any, file: str, at: Key) -> Any:
        if isinstance(value, dict):
            filled = {}
            for key, item in value.items():
                place = (*at, str(key))
                try:
                    filled[str(key)] = self._fill(item, file, place)
                except UnsetVariableError as error:
                    self.unset[file, dotted_key(place)] = error.name
            return filled
        if isinstance(value, list):
            items = [self._fill_item(item, file, at) for item in value]
            return BROKEN if any(item is BROKEN for item in items) else items
        if not isinstance(value, str):
            return value
        try:
            return fill(value, os.environ)
        except UnsetVariableError:
            raise  # to the map whose entry it is
        except ValueError as error:
            self._report(file, dotted_key(at), str(error), value)
            return BROKEN

    def _fill_item(self, value: Any, file: str, at: Key) -> Any:
        """An entry of a list, which cannot be left out."""
        try:
            return self._fill(value, file, at)
        except UnsetVariableError as error:
            self._report(file, dotted_key(at), str(error), value)
            return BROKEN

    def _include_names(self, names: Any, file: str) -> list[str]:
        if names is None or names is BROKEN:
            return []
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
        self._report(file, "includes", "must be a list of file names", names)
        return []

    def _report(self, file: Path | str, key: str, rule: str, value: Any = NO_VALUE) -> None:
        self._problems.append(Problem(str(file), key, rule, value))
