"""Do overlong punishment and dynamic sampling do what DAPO's equations 13 and 11 say?"""

import pytest
import torch

from chatlearn_vllm.algorithms.dapo import informative_groups, overlong_penalty


def test_the_penalty_grows_over_the_buffer_and_stops_at_minus_one():
    # 100 - 20 = 80 tokens are free, then -1/20 per token
    lengths = torch.tensor([0, 79, 80, 81, 90, 99, 100, 500])
    penalty = overlong_penalty(lengths, max_length=100, buffer=20)
    expected = torch.tensor([0.0, 0.0, 0.0, -0.05, -0.5, -0.95, -1.0, -1.0])
    torch.testing.assert_close(penalty, expected)
    assert penalty.dtype == torch.float32


def test_the_buffer_may_be_the_whole_length():
    lengths = torch.tensor([0, 1, 4])
    assert overlong_penalty(lengths, max_length=4, buffer=4).tolist() == [0.0, -0.25, -1.0]


def test_the_buffer_may_be_one_token():
    lengths = torch.tensor([2, 3, 4, 5])
    assert overlong_penalty(lengths, max_length=4, buffer=1).tolist() == [0.0, 0.0, -1.0, -1.0]


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_a_buffer_that_does_not_fit_is_refused(buffer):
    with pytest.raises(ValueError, match=rf"buffer={buffer} must be in \[1, max_length=100\]"):
        overlong_penalty(torch.tensor([1]), max_length=100, buffer=buffer)


def test_groups_with_different_rewards_are_kept_whole():
    rewards = torch.tensor([1.0, 0.5, 1.0, 0.5, 0.0, -3.0, 0.5])
    groups = torch.tensor([7, 2, 7, 2, 7, 9, 2])
    # group 7: 1, 1, 0; group 2: all 0.5; group 9: one row
    kept = informative_groups(rewards, groups)
    assert kept.tolist() == [True, False, True, False, True, False, False]


def test_small_differences_count_and_accuracies_may_be_bool():
    groups = torch.tensor([0, 0, 1, 1])
    rewards = torch.tensor([100.0, 100.00001, -1.0, -1.0])
    assert informative_groups(rewards, groups).tolist() == [True, True, False, False]
    accurate = torch.tensor([True, True, False, True])
    assert informative_groups(accurate, groups).tolist() == [False, False, True, True]


def test_rewards_and_groups_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"both be \[B\], got \[2\] and \[3\]"):
        informative_groups(torch.zeros(2), torch.zeros(3, dtype=torch.int64))
