"""Is the arithmetic of rectangles right, and is a layout that does not tile its parameter refused?

Compared with elements counted one by one.
"""

import itertools
import random

import pytest
import torch

from chatlearn_vllm.layouts import Block, ParamLayout
from chatlearn_vllm.layouts.blocks import (
    Rect,
    find_overlap,
    intersect,
    shard_range,
    shift,
    stack,
    vocab_shard,
)


def cells(rect: Rect) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(start, stop) for start, stop in rect)))


def random_rect(rng: random.Random, num_dims: int, size: int = 6) -> Rect:
    starts = [rng.randrange(size) for _ in range(num_dims)]
    return tuple((start, rng.randint(start + 1, size)) for start in starts)


@pytest.mark.parametrize("num_dims", [1, 2, 3])
def test_common_rectangles_hold_the_common_elements(num_dims) -> None:
    for seed in range(200):
        rng = random.Random(seed)
        a, b = random_rect(rng, num_dims), random_rect(rng, num_dims)
        common = intersect(a, b)
        assert (cells(common) if common else set()) == cells(a) & cells(b)


def test_rectangles_of_different_numbers_of_dimensions_have_nothing_to_do_with_each_other() -> None:
    row, vector = ((0, 1), (0, 8)), ((0, 8),)
    for a, b in ((row, vector), (vector, row)):
        with pytest.raises(ValueError, match="zip"):
            intersect(a, b)
    with pytest.raises(ValueError, match="zip"):
        shift(vector, row, ((5, 6), (0, 8)))


@pytest.mark.parametrize("num_dims", [1, 2, 3])
def test_an_overlap_is_found_wherever_there_is_one(num_dims) -> None:
    counts = {True: 0, False: 0}
    for seed in range(600):
        rng = random.Random(seed)
        rects = [random_rect(rng, num_dims) for _ in range(rng.randint(1, 5))]
        found = find_overlap(rects)
        pairs = itertools.combinations(rects, 2)
        assert (found is not None) == any(cells(a) & cells(b) for a, b in pairs), rects
        if found:
            assert cells(found[0]) & cells(found[1])
        counts[found is not None] += 1
    assert min(counts.values()) > 50


def test_a_rectangle_is_moved_to_the_same_place_in_another() -> None:
    origin, target = ((2, 8), (10, 20)), ((5, 11), (0, 10))
    assert shift(((3, 5), (12, 19)), origin, target) == ((6, 8), (2, 9))
    assert shift(origin, origin, target) == target
    slot = ((3, 4), *target)
    assert shift(((3, 5), (12, 19)), origin, slot) == ((3, 4), (6, 8), (2, 9))
    assert shift(origin, origin, slot) == slot


def test_equal_parts_follow_one_another() -> None:
    assert [shard_range(12, rank, 3) for rank in range(3)] == [(0, 4), (4, 8), (8, 12)]
    with pytest.raises(ValueError, match="^12 elements cannot be cut in 5 equal parts$"):
        shard_range(12, 0, 5)


def test_a_window_of_a_stack_holds_its_rows_and_no_others() -> None:
    pieces = [("a", ((3, 8), (1, 4))), ("b", ((0, 2), (5, 8))), ("c", ((7, 11), (0, 3)))]
    rows = [(name, row) for name, ((start, stop), _) in pieces for row in range(start, stop)]
    columns = {name: rect[1] for name, rect in pieces}
    for first, last in [(None, None), *itertools.combinations(range(len(rows) + 1), 2)]:
        window = None if first is None else (first, last)
        held: dict[int, tuple[str, int]] = {}
        for block in stack(pieces, window):
            (start, stop), *rest = block.local
            assert rest == [(0, 3)] and block.logical[1] == columns[block.tensor]
            for local, logical in zip(range(start, stop), range(*block.logical[0]), strict=True):
                assert local not in held
                held[local] = block.tensor, logical
        expected = rows[first:last]
        assert [held[row] for row in sorted(held)] == expected
        assert sorted(held) == list(range(len(expected)))


def test_each_rank_holds_its_rows_of_a_padded_vocabulary() -> None:
    for vocab_size, num_ranks in itertools.product((1, 5, 6, 8, 11, 12), (1, 2, 3, 4)):
        rows = 12 // num_ranks
        for rank in range(num_ranks):
            layout = vocab_shard("local", "table", vocab_size, (rows, 2), rank)
            found = torch.full((rows, 2), -2)
            for block in layout.blocks:
                (start, stop), columns = block.logical
                assert columns == (0, 2)
                found[slice(*block.local[0])] = torch.arange(start, stop)[:, None]
            for rect in layout.padding:
                found[slice(*rect[0]), slice(*rect[1])] = -1
            own = torch.arange(rank * rows, (rank + 1) * rows)
            expected = torch.where(own < vocab_size, own, -1)
            assert torch.equal(found, expected[:, None].expand(-1, 2))


WHOLE = ((0, 4), (0, 6))


@pytest.mark.parametrize(
    "rects",
    [
        [((0, 4), (0, 7))],
        [((0, 5), (0, 6))],
        [((-1, 4), (0, 6))],
        [((0, 4), (-1, 6))],
        [((0, 0), (0, 6)), WHOLE],  # empty
        [((0, 4), (6, 6)), WHOLE],
        [((0, 4),)],
        [((0, 1), *WHOLE)],
    ],
)
def test_a_rectangle_that_leaves_its_parameter_is_refused(rects) -> None:
    blocks = tuple(Block("t", rect, rect) for rect in rects)
    with pytest.raises(ValueError, match=r"p \(4, 6\): rectangle .* is not inside it"):
        ParamLayout("p", (4, 6), blocks)
    if len(rects) == 1:
        with pytest.raises(ValueError, match=r"p \(4, 6\): rectangle .* is not inside it"):
            ParamLayout("p", (4, 6), (), tuple(rects))


def test_weights_under_padding_are_refused_and_so_is_a_gap_between_them() -> None:
    weights = Block("t", ((0, 3), (0, 6)), ((0, 3), (0, 6)))
    assert ParamLayout("p", (4, 6), (weights,), (((3, 4), (0, 6)),)).blocks == (weights,)
    with pytest.raises(ValueError, match="overlap"):
        ParamLayout("p", (4, 6), (weights,), (((2, 4), (0, 6)),))
    with pytest.raises(ValueError, match="1 elements in no block"):
        ParamLayout("p", (4, 6), (weights,), (((3, 4), (0, 5)),))
    with pytest.raises(ValueError, match="24 elements in no block"):
        ParamLayout("p", (4, 6), ())


@pytest.mark.parametrize(
    "logical, local",
    [
        (((0, 4), (0, 1)), WHOLE),  # one column, for all
        (((0, 1), (0, 6)), WHOLE),
        (((0, 6), (0, 4)), WHOLE),
        (((0, 6),), WHOLE),
        (((0, 1), *WHOLE), WHOLE),
    ],
)
def test_a_block_of_other_sizes_than_it_holds_is_refused(logical, local) -> None:
    with pytest.raises(ValueError, match=r"p \(4, 6\): rectangle .* has other sizes than .* of t"):
        ParamLayout("p", (4, 6), (Block("t", logical, local),))


def test_a_slot_may_hold_a_matrix() -> None:
    blocks = tuple(Block(f"t{i}", ((5, 9), (0, 6)), ((i, i + 1), *WHOLE)) for i in range(2))
    assert ParamLayout("p", (2, 4, 6), blocks).blocks == blocks
    both = Block("t", ((5, 9), (0, 6)), ((0, 2), *WHOLE))
    with pytest.raises(ValueError, match="has other sizes"):
        ParamLayout("p", (2, 4, 6), (both,))
