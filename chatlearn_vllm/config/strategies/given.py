"""What is written in one map of a strategy file, and what becomes of it in our dialect?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from chatlearn_vllm.config.problems import NO_VALUE, Key, Problem, dotted_key
from chatlearn_vllm.config.strategies.homes import home_of
from chatlearn_vllm.config.strategies.keys import Becomes, Keys, NoEffect
from chatlearn_vllm.config.tree import BROKEN, Tree

T = TypeVar("T")

_KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a map of keys",
}


class Translation:
    """A strategy file, the job that it becomes, and what is to be said about it.

    Args:
        source: all keys of the strategy file, templates replaced.
        main_file: the file, where keys are missed that it does not have.
        problems: takes what is wrong.
    """

    def __init__(self, source: Tree, main_file: str, problems: list[Problem]) -> None:
        self.source = source
        self.main_file = main_file
        self.job = Tree()
        self._problems = problems
        self._no_effect: dict[str, list[str]] = {}
        self._sources: dict[Key, Key] = {}
        """Our keys, with the one of the strategy file that each stands for."""
        self._reported: set[Key] = set()
        self._said: list[str] = []

    def put(self, target: Key, value: Any, *written: Key) -> None:
        """Set a key of the job.

        Args:
            target: our key.
            value: its value.
            written: the keys of the strategy file that it comes from, the one to name first; of
                several the first that the file has.
        """
        self.stands_for(target, *written)
        at = self.job.values
        for name in target[:-1]:
            at = at.setdefault(name, {})
        at[target[-1]] = value

    def stands_for(self, target: Key, *written: Key) -> None:
        """Say which key of the strategy file a problem with one of ours is to name."""
        missing = object()
        there = [key for key in written if self.source.get(key, missing) is not missing]
        for key in (there or written)[:1]:
            file, dotted = self.source.origin(key)
            self.job.origins[target] = (file or self.main_file, dotted)
            self._sources[target] = key
            value = self.source.get(key, NO_VALUE)
            self.job.written[target] = NO_VALUE if isinstance(value, dict) else value

    def report(self, key: Key, rule: str, suggestion: str | None = None) -> None:
        """Say that a value of the strategy file is wrong."""
        file, dotted = self.source.origin(key)
        value = self.source.get(key, NO_VALUE)
        is_value = value is not NO_VALUE and value is not None and not isinstance(value, dict)
        # What else is wrong with a value of the wrong kind is no news.
        if value is not BROKEN and not (is_value and key in self._reported):
            shown = NO_VALUE if isinstance(value, dict) else value
            place = file or self.main_file
            self._problems.append(Problem(place, dotted, rule, shown, suggestion))
        self._reported.add(key)

    def break_reported(self) -> None:
        """Mark what follows from a wrong value, so that no further rule is told of it."""
        for target, key in self._sources.items():
            at = self.job.get(target[:-1], {})
            is_value = not isinstance(self.source.get(key), dict)
            if key in self._reported and is_value and not isinstance(at.get(target[-1], {}), dict):
                at[target[-1]] = BROKEN

    def has_no_effect(self, key: Key, why: str) -> None:
        """Note that a key is accepted and does nothing."""
        value = self.source.get(key)
        shown = dotted_key(key)
        if isinstance(value, bool | int | float | str) and len(str(value)) <= 40:
            shown += f"={value}"
        self._no_effect.setdefault(why, []).append(shown)

    def say(self, text: str) -> None:
        """Keep a sentence for the user."""
        self._said.append(text)

    def notices(self) -> Iterator[str]:
        """What was said, and one line that names all keys without effect."""
        yield from self._said
        if self._no_effect:
            reasons = (f"{', '.join(keys)} ({why})" for why, keys in self._no_effect.items())
            yield "no effect of " + "; ".join(reasons)


class Given:
    """One map of the strategy file, with the keys that it may hold.

    Args:
        translation: takes what is to be said.
        path: of the map.
        keys: what it may hold; others are reported, with the nearest of all names.
        further: names that are known besides these keys.
    """

    def __init__(
        self, translation: Translation, path: Key, keys: Keys, further: Iterable[str] = ()
    ) -> None:
        self.path = path
        self._translation = translation
        self._keys = keys
        value = translation.source.get(path)
        if value is not None and value is not BROKEN and not isinstance(value, dict):
            translation.report(path, "must be a map of keys")
        self.values: dict[str, Any] = value if isinstance(value, dict) else {}
        further = frozenset(further)
        self.unknown: set[str] = set()
        """Keys that it may not hold."""
        for name in self.values:
            entry = keys.get(name)
            if isinstance(entry, NoEffect):
                if self.values[name] not in entry.neutral and entry.neutral != ():
                    translation.has_no_effect((*path, name), entry.why)
            elif entry is None and name not in further:
                self.unknown.add(name)
                home = home_of(path, str(name), keys, further)
                nearest = difflib.get_close_matches(str(name), [*keys, *sorted(further)], n=1)
                suggestion = nearest[0] if nearest and not home else None
                translation.report((*path, name), home or "unknown key", suggestion)

    def __contains__(self, name: str) -> bool:
        """Whether a key has a value that can be used."""
        value = self.values.get(name)
        return value is not None and value is not BROKEN

    def key(self, name: str) -> Key:
        """The whole key of an entry."""
        return (*self.path, name)

    def get(
        self, name: str, kind: type[T], default: Any = None, *, least: float | None = None
    ) -> T:
        """The value of a key; the default where it is not given or, which is reported, not usable.

        Args:
            name: the key.
            kind: bool, int, float, str, list or dict; float takes whole numbers.
            default: what is taken without it.
            least: the smallest number that will do.
        """
        if name not in self:
            return default
        value = self.values[name]
        is_kind = isinstance(value, int | float if kind is float else kind)
        if not is_kind or (isinstance(value, bool) and kind is not bool):
            self._translation.report(self.key(name), f"must be {_KINDS[kind]}")
            return default
        if least is not None and value < least:
            self._translation.report(self.key(name), f"must be at least {least}")
            return default
        return value

    def choose(self, name: str, choices: Mapping[Any, T], default: T) -> T:
        """What one of a few values stands for."""
        if name not in self:
            return default
        value = self.values[name]
        if isinstance(value, dict | list) or value not in choices:
            allowed = ", ".join(map(str, choices))
            self._translation.report(self.key(name), f"must be one of: {allowed}")
            return default
        return choices[value]

    def copy(self, at: Key = (), *but: str) -> None:
        """Take over the keys that are ours under another name.

        Args:
            at: the map of ours that their names start from.
            but: keys that are not.
        """
        for name, value in self.values.items():
            entry = None if name in but else self._keys.get(name)
            if isinstance(entry, Becomes) and entry.is_copied and value is not None:
                target = (*at, *entry.ours.split("."))
                self._translation.put(target, value, self.key(name))

    def refuse_rest(self, why: str, *used: str) -> None:
        """Note that keys have no effect in this place, but for those named."""
        for name in self.values:
            if name in self and name not in used and isinstance(self._keys.get(name), Becomes):
                self._translation.has_no_effect(self.key(name), why)
