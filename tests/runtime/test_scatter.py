"""Which rows does each rank get?"""

import pytest

from chatlearn_vllm.runtime.scatter import split_evenly, train_rows


def test_each_step_takes_consecutive_rows_and_each_rank_its_part_of_them():
    assert train_rows(8, 4, data_parallel_rank=0, data_parallel_size=2) == [0, 1, 4, 5]
    assert train_rows(8, 4, data_parallel_rank=1, data_parallel_size=2) == [2, 3, 6, 7]


@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
def test_steps_see_the_same_rows_whatever_the_data_parallel_size(data_parallel_size):
    per_rank = 8 // data_parallel_size
    shards = [train_rows(24, 8, rank, data_parallel_size) for rank in range(data_parallel_size)]

    for step in range(3):
        rows = [row for shard in shards for row in shard[step * per_rank : (step + 1) * per_rank]]
        assert rows == list(range(step * 8, (step + 1) * 8))


def test_a_last_smaller_step_is_spread_over_all_ranks():
    assert train_rows(6, 4, data_parallel_rank=0, data_parallel_size=2) == [0, 1, 4]
    assert train_rows(6, 4, data_parallel_rank=1, data_parallel_size=2) == [2, 3, 5]


def test_rows_that_cannot_be_spread_are_refused():
    with pytest.raises(ValueError, match="1 of the episode's 5 samples .* 2 data parallel ranks"):
        train_rows(5, 4, data_parallel_rank=0, data_parallel_size=2)


def test_prompts_are_split_in_order():
    assert split_evenly([1, 2, 3, 4, 5], 2) == [[1, 2, 3], [4, 5]]
    assert split_evenly([1, 2, 3, 4, 5], 4) == [[1, 2], [3], [4], [5]]
    assert split_evenly([1, 2], 3) == [[1], [2], []]
