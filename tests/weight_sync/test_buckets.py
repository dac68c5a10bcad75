"""Do buckets hold each element once, stay below their size, and not depend on the copies' order?"""

import random

import pytest
import torch

from chatlearn_vllm.layouts.blocks import intersect, num_elements
from chatlearn_vllm.weight_sync.buckets import ALIGNMENT, cut, plan_buckets
from chatlearn_vllm.weight_sync.planner import Copy

DTYPES = {"a": torch.bfloat16, "b": torch.float32, "c": torch.float64}


@pytest.mark.parametrize("max_elements", [1, 2, 7, 12, 59, 60, 1000])
def test_parts_tile_a_shape_and_are_as_large_as_whole_rows_allow(max_elements) -> None:
    parts = cut((5, 3, 4), max_elements)
    assert sum(num_elements(part) for part in parts) == 60
    assert not any(intersect(a, b) for i, a in enumerate(parts) for b in parts[:i])
    assert max(num_elements(part) for part in parts) == {7: 4, 59: 48}.get(
        max_elements, min(max_elements, 60)
    )


def random_copies(rng: random.Random) -> list[Copy]:
    copies = []
    for index in range(rng.randint(1, 12)):
        source = tuple((s := rng.randint(0, 9), s + rng.randint(1, 9)) for _ in range(2))
        target = tuple((t := rng.randint(0, 9), t + stop - start) for start, stop in source)
        lead = rng.choice([((), ()), (((3, 4),), ()), ((), ((2, 3),))])
        name = rng.choice("abc")
        copies.append(Copy(0, name, (*lead[0], *source), f"{name}{index}", (*lead[1], *target)))
    return copies


def test_buckets_move_each_element_of_each_copy_once() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        copies, bucket_bytes = random_copies(rng), rng.choice([16, 40, 100, 1000, 10**6])
        buckets = plan_buckets(copies, DTYPES, bucket_bytes)
        assert plan_buckets(rng.sample(copies, len(copies)), DTYPES, bucket_bytes) == buckets
        moved = {copy.target_param: [] for copy in copies}
        for bucket in buckets:
            end = 0
            for piece in bucket:
                assert piece.start % ALIGNMENT == 0 and end <= piece.start, seed
                end = piece.stop
                assert num_elements(piece.source) == num_elements(piece.target), seed
                moved[piece.target_param].append(piece)
            assert end <= bucket_bytes, seed
        for copy in copies:
            source, target = torch.zeros(20, 20, 20), torch.zeros(20, 20, 20)
            source, target = (
                t[(0,) * (3 - len(rect))]
                for t, rect in ((source, copy.source), (target, copy.target))
            )
            source += torch.arange(source.numel()).view(source.shape)
            expected = target.clone()
            expected[_slices(copy.target)] = source[_slices(copy.source)].view(
                expected[_slices(copy.target)].shape
            )
            for piece in moved[copy.target_param]:
                assert piece.source_param == copy.source_param
                place = target[_slices(piece.target)]
                place += source[_slices(piece.source)].view(place.shape)
            assert torch.equal(target, expected), seed


def _slices(rect):
    return tuple(slice(start, stop) for start, stop in rect)
