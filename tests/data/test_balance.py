"""Do data parallel ranks get equally many rows and about as many tokens?"""

import random

import pytest
import torch

from chatlearn_vllm.data.balance import balanced, row_lengths


def tokens(rows: list[int], lengths: list[int]) -> int:
    return sum(lengths[row] for row in rows)


def test_long_and_short_rows_are_paired():
    # by position the first rank would have 180 tokens, the second 30
    assert balanced([100, 80, 20, 10], num_ranks=2, rows_per_step=4) == [[0, 3], [1, 2]]


def test_every_step_keeps_its_rows():
    lengths = random.Random(1).choices(range(2, 500), k=24)
    ranks = balanced(lengths, num_ranks=4, rows_per_step=8)
    for step in range(3):
        parts = [rows[2 * step : 2 * step + 2] for rows in ranks]
        assert all(part == sorted(part) for part in parts)
        assert sorted(sum(parts, [])) == list(range(8 * step, 8 * step + 8))


def test_a_last_step_with_fewer_rows_is_spread_too():
    ranks = balanced([5, 9, 2, 4, 8, 3], num_ranks=2, rows_per_step=4)
    assert [rows[:2] for rows in ranks] == [[1, 2], [0, 3]]
    assert [rows[2:] for rows in ranks] == [[4], [5]]


def test_tokens_differ_by_less_than_the_lengths_of_one_round():
    generator = random.Random(2)
    for num_ranks in (2, 3, 8):
        lengths = [int(2 + 2000 * generator.random() ** 4) for _ in range(num_ranks * 16)]
        ranks = balanced(lengths, num_ranks, rows_per_step=len(lengths))
        totals = [tokens(rows, lengths) for rows in ranks]
        longest = sorted(lengths, reverse=True)
        rounds = [longest[i : i + num_ranks] for i in range(0, len(lengths), num_ranks)]
        assert {len(rows) for rows in ranks} == {16}
        assert max(totals) - min(totals) <= max(r[0] - r[-1] for r in rounds)
        by_position = [
            tokens(range(rank * 16, rank * 16 + 16), lengths) for rank in range(num_ranks)
        ]
        assert max(totals) - min(totals) < 0.5 * (max(by_position) - min(by_position))


def test_equal_lengths_and_one_rank_are_no_special_case():
    assert balanced([7] * 4, num_ranks=2, rows_per_step=4) == [[0, 2], [1, 3]]
    assert balanced([3, 9, 5], num_ranks=1, rows_per_step=2) == [[0, 1, 2]]
    assert balanced([], num_ranks=2, rows_per_step=4) == [[], []]


def test_rows_that_ranks_cannot_share_evenly_are_refused():
    with pytest.raises(ValueError, match="on 2 of 6 rows .* num_ranks=4"):
        balanced([1] * 6, num_ranks=4, rows_per_step=4)


def test_a_row_ends_with_its_last_marked_token():
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.float32)
    batch = {"all_tokens": torch.zeros(3, 5, dtype=torch.int64), "loss_mask": mask}
    assert row_lengths(batch) == [3, 4, 2]
    assert row_lengths({"all_tokens": batch["all_tokens"]}) == [5, 5, 5]
