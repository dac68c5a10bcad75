"""Fixtures: ranks that are shared by all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.megatron.ranks import Ranks


class RanksBySize:
    """Starts ranks on first use, and again after a failure ended them."""

    def __init__(self) -> None:
        self._started: dict[int, Ranks] = {}

    def __getitem__(self, world_size: int) -> Ranks:
        ranks = self._started.get(world_size)
        if ranks is None or not ranks.is_alive:
            ranks = self._started[world_size] = Ranks(world_size)
        return ranks

    def close(self) -> None:
        for ranks in self._started.values():
            ranks.close()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RanksBySize]:
    """`ranks[n].run(function, ...)` runs a module-level function on n ranks."""
    by_size = RanksBySize()
    yield by_size
    by_size.close()
