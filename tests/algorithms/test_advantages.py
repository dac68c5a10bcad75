"""Do advantages without a value model equal numbers worked out by hand?"""

import math

import pytest
import torch

from chatlearn_vllm.algorithms.advantages import (
    discounted_returns,
    group_advantages,
    rloo_advantages,
)
from chatlearn_vllm.algorithms.gae import moments, token_rewards, whiten

NAN, INF = float("nan"), float("inf")


def test_advantages_compare_rows_within_their_group():
    # group 3: rewards 0, 3, 3 -> mean 2, variance (4 + 1 + 1) / 3 = 2
    # group 8: rewards 5, 1 -> mean 3, variance 4
    rewards = torch.tensor([0.0, 5.0, 3.0, 1.0, 3.0])
    groups = torch.tensor([3, 8, 3, 8, 3])
    root2 = math.sqrt(2.0)
    expected = torch.tensor([-2 / root2, 1.0, 1 / root2, -1.0, 1 / root2])
    torch.testing.assert_close(group_advantages(rewards, groups), expected)
    torch.testing.assert_close(
        group_advantages(rewards, groups, normalize_std=False),
        torch.tensor([-2.0, 2.0, 1.0, -2.0, 1.0]),
    )


def test_eps_is_added_to_the_standard_deviation():
    advantages = group_advantages(torch.tensor([0.0, 2.0]), torch.tensor([0, 0]), eps=1.0)
    assert advantages.tolist() == [-0.5, 0.5]  # 1 / (1 + 1)
    # of 1e-6 where nothing is said: 1e-6 / (1e-6 + 1e-6)
    advantages = group_advantages(torch.tensor([0.0, 2e-6]), torch.tensor([0, 0]))
    torch.testing.assert_close(advantages, torch.tensor([-0.5, 0.5]))


def test_a_group_of_equal_rewards_has_no_advantage():
    # the float32 mean of seven times 0.7 is not 0.7
    rewards = torch.tensor([0.7] * 7 + [5.0])
    advantages = group_advantages(rewards, torch.tensor([0] * 7 + [1]))
    assert advantages.abs().max() < 1e-9
    assert advantages.dtype == torch.float32


def test_leave_one_out_compares_a_row_with_the_others_of_its_group():
    # group 3: 0 - (3 + 6) / 2, 3 - (0 + 6) / 2, 6 - (0 + 3) / 2; group 8: 5 - 1, 1 - 5
    rewards = torch.tensor([0.0, 5.0, 3.0, 1.0, 6.0])
    groups = torch.tensor([3, 8, 3, 8, 3])
    advantages = rloo_advantages(rewards, groups)
    torch.testing.assert_close(advantages, torch.tensor([-4.5, 4.0, 0.0, -4.0, 4.5]))
    assert advantages.dtype == torch.float32


def test_leave_one_out_gives_a_lone_row_and_equal_rewards_nothing():
    advantages = rloo_advantages(torch.tensor([5.0] + [0.7] * 7), torch.tensor([0] + [1] * 7))
    assert advantages[0] == 0
    assert advantages.abs().max() < 1e-9


@pytest.mark.parametrize("advantages", [group_advantages, rloo_advantages])
def test_rewards_and_groups_that_are_not_one_per_row_are_refused(advantages):
    with pytest.raises(ValueError, match=r"both be \[B\], got \[2\] and \[3\]"):
        advantages(torch.zeros(2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"both be \[B\], got \[2, 1\] and \[2, 1\]"):
        advantages(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64))


def test_returns_add_up_what_is_still_to_come():
    # 8; 4 + 8 / 2; 2 + 8 / 2 -- and 1 + 0 after a hole in the mask, which takes no time
    rewards = torch.tensor([[NAN, 2.0, 4.0, 8.0, INF], [1.0, NAN, 6.0, NAN, NAN]])
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 1, 0, 0]])
    returns = discounted_returns(rewards, mask, gamma=0.5)
    assert returns.tolist() == [[0, 6, 8, 8, 0], [4, 0, 6, 0, 0]]
    undiscounted = discounted_returns(rewards, mask)
    assert undiscounted.tolist() == [[0, 14, 12, 8, 0], [7, 0, 6, 0, 0]]


def test_reinforce_plus_plus_is_normalised_over_tokens_of_all_prompts():
    # rewards -0.5 | 4 - 0.5 and -2 | 0, so returns 3, 3.5 and -2, 0: of the 4 tokens the mean is
    # 4.5 / 4 = 1.125 and the variance (9 + 12.25 + 4 + 0) / 4 - 1.125^2 = 5.046875
    mask = torch.ones(2, 2)
    kl = torch.tensor([[1.0, 1.0], [4.0, 0.0]])
    rewards = token_rewards(torch.tensor([4.0, 0.0]), kl, mask, kl_coef=0.5)
    returns = discounted_returns(rewards, mask)
    advantages = whiten(returns, mask, moments(returns, mask))
    expected = torch.tensor([[1.875, 2.375], [-3.125, -1.125]]) / math.sqrt(5.046875)
    torch.testing.assert_close(advantages, expected)
