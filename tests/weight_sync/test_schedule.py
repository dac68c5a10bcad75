"""Does an order of links keep ranks busy, and can it never deadlock? On random sets of links."""

import random
from collections import Counter

import pytest

from chatlearn_vllm.weight_sync.schedule import schedule


def random_links(seed: int) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    density = rng.random()
    pairs = [(t, r) for t in range(rng.randint(1, 9)) for r in range(rng.randint(1, 9))]
    return rng.sample(links := [p for p in pairs if rng.random() < density], len(links))


@pytest.mark.parametrize("block", range(10))
def test_rounds_are_matchings_and_as_few_as_the_busiest_rank_has_links(block) -> None:
    for seed in range(100 * block, 100 * (block + 1)):
        links = random_links(seed)
        rounds = schedule(links)
        assert sorted(link for pairs in rounds for link in pairs) == sorted(links), seed
        for pairs in rounds:
            assert pairs, seed
            assert len({t for t, _ in pairs}) == len({r for _, r in pairs}) == len(pairs), seed
        degrees = Counter([("t", t) for t, _ in links] + [("r", r) for _, r in links])
        assert len(rounds) == max(degrees.values(), default=0), seed


def test_ranks_that_work_their_links_in_order_all_finish() -> None:
    for seed in range(200):
        queues: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for pairs in schedule(random_links(seed)):
            for t, r in pairs:
                queues.setdefault(("t", t), []).append((t, r))
                queues.setdefault(("r", r), []).append((t, r))
        while any(queues.values()):
            # A transfer happens when both ends have come to it.
            heads = Counter(queue[0] for queue in queues.values() if queue)
            ready = [link for link, ends in heads.items() if ends == 2]
            assert ready, f"seed {seed}: all wait: {queues}"
            t, r = ready[seed % len(ready)]
            queues["t", t].pop(0)
            queues["r", r].pop(0)


def test_two_by_two_ranks_all_work_in_both_rounds() -> None:
    assert sorted(map(sorted, schedule([(0, 0), (0, 1), (1, 0), (1, 1)]))) == [
        [(0, 0), (1, 1)],
        [(0, 1), (1, 0)],
    ]
