"""Fixtures: ranks that are shared by all tests of a module."""

from collections.abc import Iterator

import pytest

from tests.helpers.ranks import RanksBySize


# Not of the whole folder: groups of gloo that python has not yet collected keep threads that poll,
# and hundreds of engines in one process make everything slow.
@pytest.fixture(scope="module")
def ranks() -> Iterator[RanksBySize]:
    """`ranks[n].run(function, ...)` runs a module-level function on n ranks."""
    by_size = RanksBySize(4)
    yield by_size
    by_size.close()
