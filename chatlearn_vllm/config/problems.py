"""How is everything that is wrong with a job told to the user in one go?"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Key = tuple[str, ...]
"""Where a value stands in the whole job, e.g. ("models", "policy", "model_args", "lr")."""

NO_VALUE: Any = object()
_SECRET_NAME = re.compile(r"api_?key|secret|password", re.IGNORECASE)
"""In names of keys, misspelt ones too, whose values are not shown."""
_CREDENTIALS = re.compile(r"(?<=://)[^/\s]+@")
"""Of a URL."""
_LONGEST_SHOWN = 300
"""Characters of a value."""


@dataclass(frozen=True)
class Problem:
    """One broken rule."""

    file: str
    key: str
    """Dotted, as it stands in that file; empty for the file as a whole."""
    rule: str
    value: Any = NO_VALUE
    """What was given."""
    suggestion: str | None = None
    """The valid key nearest to an unknown one."""

    def __str__(self) -> str:
        has_value = self.value is not NO_VALUE
        given = f"{self.key}={_shown(self.key, self.value)}" if has_value else self.key
        hint = f"; did you mean {self.suggestion}?" if self.suggestion else ""
        return ": ".join(part for part in (self.file, given, self.rule) if part) + hint


class UserError(ValueError):
    """Something that a user can set right; the message is all that they need for it."""


class ConfigError(UserError):
    """The job cannot run as described; the message has one line per problem."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        # The same line of a file that two models include is reported once.
        self.problems = tuple({str(problem): problem for problem in problems}.values())
        count = f"{len(self.problems)} problem" + "s" * (len(self.problems) != 1)
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(f"{count} in the job's configuration:{lines}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


def dotted_key(key: Sequence[Any]) -> str:
    """A key as users write it; one that yaml takes for a number, too."""
    return ".".join(map(str, key))


def without_credentials(text: str) -> str:
    """A URL, or text with URLs, as it may be shown."""
    return _CREDENTIALS.sub("***@", text)


def _shown(name: str, value: Any) -> str:
    """What was given, without secrets, and not at any length."""
    text = without_credentials(repr(_without_secrets(name, value)))
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _without_secrets(name: str, value: Any) -> Any:
    if _SECRET_NAME.search(name.rpartition(".")[2]) and value is not None:
        return "***"
    if isinstance(value, dict):
        return {key: _without_secrets(str(key), item) for key, item in value.items()}
    return value
