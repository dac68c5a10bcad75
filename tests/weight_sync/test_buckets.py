"""Do buckets hold each element once, stay below their size, and not depend on the copies' order?"""

import random

import pytest
import torch

from chatlearn_vllm.layouts.blocks import intersect, num_elements
from chatlearn_vllm.weight_sync.buckets import cut, plan_buckets
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
        copies, bucket_bytes = random_copies(rng), rng.choice([16, 40, 100, 1000, 10**5])
        buckets = plan_buckets(copies, DTYPES, bucket_bytes)
        assert plan_buckets(rng.sample(copies, len(copies)), DTYPES, bucket_bytes) == buckets
        sources, targets, expected = {}, {}, {}
        for copy in copies:
            dtype = DTYPES[copy.source_param]
            shape = (20,) * len(copy.source)
            numbers = torch.arange(1, 20 ** len(shape) + 1).view(shape) % 251  # exact in bfloat16
            sources[copy.target_param] = numbers.to(dtype)
            targets[copy.target_param] = torch.zeros((20,) * len(copy.target), dtype=dtype)
            expected[copy.target_param] = targets[copy.target_param].clone()
            there = expected[copy.target_param][_slices(copy.target)]
            there += sources[copy.target_param][_slices(copy.source)].view(there.shape)
        for bucket in buckets:
            buffer = torch.zeros(bucket_bytes, dtype=torch.uint8)
            for piece in bucket:
                value = sources[piece.target_param][_slices(piece.source)]
                piece.packed(buffer).copy_(value)
            for piece in bucket:
                assert piece.target_param == piece.source_param + piece.target_param[1:]
                place = targets[piece.target_param][_slices(piece.target)]
                place += piece.packed(buffer).view(place.shape)
        for name, target in targets.items():
            assert torch.equal(target, expected[name]), (seed, name)


@pytest.mark.parametrize("bucket_bytes", [160, 4096])
def test_a_bucket_is_sent_only_when_the_next_piece_does_not_fit(bucket_bytes) -> None:
    for seed in range(50):
        buckets = plan_buckets(random_copies(random.Random(seed)), DTYPES, bucket_bytes)
        for bucket, following in zip(buckets, buckets[1:], strict=False):
            at = 0
            for piece in bucket:
                assert piece.start == -(-at // 16) * 16
                at = piece.start + num_elements(piece.source) * piece.dtype.itemsize
                assert at == piece.stop
            first = following[0]
            num_bytes = num_elements(first.source) * first.dtype.itemsize
            assert -(-at // 16) * 16 + num_bytes > bucket_bytes


def test_a_number_is_one_part() -> None:
    assert cut((), 4) == [()]
    (bucket,) = plan_buckets([Copy(0, "b", (), "scale", ())], DTYPES, 64)
    assert [(piece.source, piece.target, piece.stop) for piece in bucket] == [((), (), 4)]


def test_a_message_may_be_filled_to_its_last_byte() -> None:
    copies = [Copy(0, "b", ((row, row + 1), (0, 8)), f"b{row}", ((0, 1), (0, 8))) for row in (0, 1)]
    (bucket,) = plan_buckets(copies, DTYPES, 64)
    assert [(piece.start, piece.stop) for piece in bucket] == [(0, 32), (32, 64)]
    assert len(plan_buckets(copies, DTYPES, 63)) == 2
    assert plan_buckets([], DTYPES, 64) == []


def _slices(rect):
    return tuple(slice(start, stop) for start, stop in rect)
