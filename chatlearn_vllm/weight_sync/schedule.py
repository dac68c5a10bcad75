"""In which order does each rank work its links? Pure Python."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any


def schedule(links: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Order links so that ranks which work theirs one after the other never wait in a circle.

    Args:
        links: (training rank, rollout rank) pairs.

    Returns:
        Rounds; each rank is in a round at most once and works its links in the order of the
        rounds. There are as few as the busiest rank has links.
    """
    # The colours of a bipartite edge colouring are the rounds. Nodes are (side, rank).
    neighbours: dict[tuple[int, int], dict[int, tuple[int, int]]] = defaultdict(dict)
    for trainer_rank, rollout_rank in links:
        trainer, rollout = (0, trainer_rank), (1, rollout_rank)
        free, other = (_first_free(neighbours[node]) for node in (trainer, rollout))
        if free != other:
            _swap_colours(neighbours, rollout, free, other)
        neighbours[trainer][free] = rollout
        neighbours[rollout][free] = trainer
    rounds: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for side, rank in sorted(neighbours):
        if side == 0:
            for colour, (_, rollout_rank) in neighbours[side, rank].items():
                rounds[colour].append((rank, rollout_rank))
    return [rounds[colour] for colour in sorted(rounds)]


def _first_free(used: Mapping[int, Any]) -> int:
    return next(colour for colour in itertools.count() if colour not in used)


def _swap_colours(
    neighbours: dict[tuple[int, int], dict[int, tuple[int, int]]],
    node: tuple[int, int],
    first: int,
    second: int,
) -> None:
    """Swap two colours along the path that leaves `node` with `first`; it has no `second`."""
    path = [node]
    for colour in itertools.cycle((first, second)):
        if colour not in neighbours[path[-1]]:
            break
        path.append(neighbours[path[-1]][colour])
    for node in path:
        colours = neighbours[node]
        swapped = {first: colours.pop(second, None), second: colours.pop(first, None)}
        colours |= {colour: other for colour, other in swapped.items() if other is not None}
