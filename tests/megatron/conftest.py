"""Fixtures: ranks that are shared by all tests of a module."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from tests.helpers.ranks import Ranks

MAX_RANKS = 4


class RanksBySize:
    """`ranks[n].run(...)` on n of four processes, which start anew after a failure."""

    def __init__(self) -> None:
        self._processes: Ranks | None = None

    def __getitem__(self, world_size: int) -> "FirstRanks":
        if self._processes is None or not self._processes.is_alive:
            self._processes = Ranks(MAX_RANKS)
        return FirstRanks(partial(self._processes.run_on, world_size))

    def close(self) -> None:
        if self._processes is not None:
            self._processes.close()


class FirstRanks:
    """Some of the processes, with the `run` of `Ranks`."""

    def __init__(self, run: Callable[..., list[Any]]) -> None:
        self.run = run


# Not of the whole folder: groups of gloo that python has not yet collected keep threads that poll,
# and hundreds of engines in one process make everything slow.
@pytest.fixture(scope="module")
def ranks() -> Iterator[RanksBySize]:
    """`ranks[n].run(function, ...)` runs a module-level function on n ranks."""
    by_size = RanksBySize()
    yield by_size
    by_size.close()
