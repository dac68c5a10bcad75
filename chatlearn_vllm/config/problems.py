"""How is everything that is wrong with a job told to the user in one go?"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Key = tuple[str, ...]
"""Where a value stands in the whole job, e.g. ("models", "policy", "model_args", "lr")."""

NO_VALUE: Any = object()


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
        given = f"{self.key}={self.value!r}" if self.value is not NO_VALUE else self.key
        hint = f"; did you mean {self.suggestion}?" if self.suggestion else ""
        return ": ".join(part for part in (self.file, given, self.rule) if part) + hint


class ConfigError(ValueError):
    """The job cannot run as described; the message has one line per problem."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        # The same line of a file that two models include is reported once.
        self.problems = tuple({str(problem): problem for problem in problems}.values())
        count = f"{len(self.problems)} problem" + "s" * (len(self.problems) != 1)
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(f"{count} in the job's configuration:{lines}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)
