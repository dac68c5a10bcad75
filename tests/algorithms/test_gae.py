"""Do token rewards, advantages and whitened values equal numbers worked out by hand?"""

import math

import pytest
import torch

from chatlearn_vllm.algorithms.gae import gae, moments, token_rewards, whiten

NAN, INF = float("nan"), float("inf")


def test_advantages_are_discounted_sums_of_the_errors_of_the_values():
    # gamma = lam = 1/2
    # delta = 0 + 2/2 - 1 = 0;     1 + 4/2 - 2 = 1; 8 - 4 = 4
    # A     = 0 + 2/4     = 0.5;   1 + 4/4     = 2; 4
    advantages, returns = gae(
        torch.tensor([[0.0, 1.0, 8.0]]),
        torch.tensor([[1.0, 2.0, 4.0]]),
        torch.ones(1, 3),
        gamma=0.5,
        lam=0.5,
    )
    assert advantages.tolist() == [[0.5, 2.0, 4.0]]
    assert returns.tolist() == [[1.5, 4.0, 8.0]]


def test_discount_and_lambda_are_told_apart():
    # gamma 1/2, lam 1/4: delta = 0, 1, 4 as above; A = 1/8 * 1.5, 1 + 1/8 * 4, 4
    rewards, values = torch.tensor([[0.0, 1.0, 8.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    advantages, _ = gae(rewards, values, torch.ones(1, 3), gamma=0.5, lam=0.25)
    assert advantages.tolist() == [[0.1875, 1.5, 4.0]]


def test_lambda_one_returns_are_those_of_the_rewards_whatever_the_values():
    # 0 + 1/2 + 8/4, 1 + 8/2, 8
    rewards, values = torch.tensor([[0.0, 1.0, 8.0]]), torch.tensor([[-7.0, 5.5, 100.0]])
    _, returns = gae(rewards, values, torch.ones(1, 3), gamma=0.5, lam=1.0)
    assert returns.tolist() == [[2.5, 5.0, 8.0]]


def test_responses_may_start_late_end_early_and_have_holes():
    rewards = torch.tensor([[NAN, 0.0, 1.0, 8.0, INF], [0.0, NAN, 1.0, 8.0, NAN]])
    values = torch.tensor([[INF, 1.0, 2.0, 4.0, 9.0], [1.0, -INF, 2.0, 4.0, NAN]])
    mask = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0, 0.0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0, 0.5, 2, 4, 0], [0.5, 0, 2, 4, 0]]
    assert returns.tolist() == [[0, 1.5, 4, 8, 0], [1.5, 0, 4, 8, 0]]


def test_a_row_without_tokens_is_zero_and_one_token_has_no_future():
    rewards, values = torch.tensor([[3.0, NAN], [NAN, NAN]]), torch.tensor([[1.0, NAN], [5.0, NAN]])
    mask = torch.tensor([[1, 0], [0, 0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.9)
    assert advantages.tolist() == [[2, 0], [0, 0]]
    assert returns.tolist() == [[3, 0], [0, 0]]


def test_advantages_are_constants_of_training():
    values, mask = torch.ones(1, 2, requires_grad=True), torch.ones(1, 2)
    rewards = token_rewards(torch.ones(1), values, mask, kl_coef=0.1)
    advantages, returns = gae(torch.ones(1, 2), values, mask, gamma=1.0, lam=1.0)
    sums = moments(values, mask)
    whitened = whiten(values, mask, sums.detach())
    for constant in (rewards, advantages, returns, sums, whitened):
        assert not constant.requires_grad
    assert advantages.dtype == returns.dtype == torch.float32


def test_long_responses_lose_no_precision_on_the_way():
    # 20000 rewards of 0.1 in float32, which is 0.1 + 1.49e-9
    rewards = torch.full((1, 20000), 0.1)
    _, returns = gae(rewards, torch.zeros(1, 20000), torch.ones(1, 20000), gamma=1.0, lam=1.0)
    assert returns[0, 0].item() == pytest.approx(2000.00003, abs=2e-4)


def test_the_score_is_paid_on_the_last_token_and_the_kl_on_every_token():
    kl = torch.tensor([[NAN, 0.5, -1.0, INF], [0.25, 2.0, 1.0, 1.0], [NAN, NAN, NAN, NAN]])
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    rewards = token_rewards(torch.tensor([5.0, -3.0, 9.0]), kl, mask, kl_coef=0.5)
    assert rewards.tolist() == [[0, -0.25, 5.5, 0], [-0.125, -1.0, -0.5, -3.5], [0, 0, 0, 0]]


def test_the_score_is_paid_once_whatever_lies_before_and_between():
    mask = torch.tensor([[0, 0, 1, 0], [1, 0, 1, 0]])
    rewards = token_rewards(torch.tensor([5.0, 3.0]), torch.zeros(2, 4), mask, kl_coef=0.5)
    assert rewards.tolist() == [[0, 0, 5, 0], [0, 0, 3, 0]]


def test_scores_are_clipped_on_both_sides_but_the_kl_is_not():
    scores = torch.tensor([5.0, -3.0, 1.0])
    rewards = token_rewards(scores, torch.full((3, 1), 8.0), torch.ones(3, 1), kl_coef=1.0, clip=2)
    assert rewards.tolist() == [[2.0 - 8], [-2.0 - 8], [1.0 - 8]]


def test_rewards_are_exact_to_float32_whatever_the_inputs_are():
    kl = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16)  # where 0.1 * 3 is 0.30078
    rewards = token_rewards(torch.tensor([2]), kl, torch.ones(1, 2), kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 1.7]]))
    scores, kl = torch.tensor([5.0], dtype=torch.float64), torch.zeros(1, 1)
    assert token_rewards(scores, kl, torch.ones(1, 1), kl_coef=0.1).dtype == torch.float32


def test_scores_per_token_are_refused():
    with pytest.raises(ValueError, match=r"rewards must be \[B\].*got \[2, 1\] and \[2, 3\]"):
        token_rewards(torch.zeros(2, 1), torch.zeros(2, 3), torch.ones(2, 3), kl_coef=0.1)


def test_whitened_values_have_mean_zero_and_variance_one():
    # 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    values = torch.tensor([[1.0, 3.0, NAN], [5.0, INF, 7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    sums = moments(values, mask)
    assert sums.tolist() == [4, 16, 84]
    root5 = math.sqrt(5.0)
    expected = torch.tensor([[-3 / root5, -1 / root5, 0.0], [1 / root5, 0.0, 3 / root5]])
    torch.testing.assert_close(whiten(values, mask, sums), expected)
    shifted_back = torch.where(mask != 0, expected + 4.0, 0.0)
    torch.testing.assert_close(whiten(values, mask, sums, shift_mean=False), shifted_back)


def test_shards_are_whitened_by_the_moments_of_all_of_them():
    values = torch.tensor([[1.0, 3.0, 2.5], [5.0, 0.5, 7.0], [-4.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]])
    sums = sum(moments(values[row : row + 1], mask[row : row + 1]) for row in range(3))
    parts = [whiten(values[row : row + 1], mask[row : row + 1], sums) for row in range(3)]
    assert torch.equal(torch.cat(parts), whiten(values, mask, moments(values, mask)))


def test_eps_is_added_to_the_variance():
    values, mask = torch.tensor([[0.0, 2.0]]), torch.ones(1, 2)
    assert whiten(values, mask, moments(values, mask), eps=3.0).tolist() == [[-0.5, 0.5]]
    # of 1e-8 where nothing is said: 1e-4 / sqrt(1e-8 + 1e-8)
    whitened = whiten(1e-4 * values, mask, moments(1e-4 * values, mask))
    torch.testing.assert_close(whitened, torch.tensor([[-math.sqrt(0.5), math.sqrt(0.5)]]))


@pytest.mark.parametrize("row", [[0.1, 0.1, 0.1], [1e6, 1e6, 1e6], [7.0, NAN, NAN]])
def test_equal_values_become_zero(row):
    values = torch.tensor([row])
    mask = torch.isfinite(values)
    assert whiten(values, mask, moments(values, mask)).abs().max() < 1e-6


def test_a_spread_below_rounding_does_not_make_nan():
    # sum of squares / n - mean^2 is -0.016 here
    values, mask = torch.full((1, 77777), 1e7), torch.ones(1, 77777)
    values[0, 0] += 1
    assert whiten(values, mask, moments(values, mask)).isfinite().all()


def test_no_values_at_all_become_zero():
    values, mask = torch.full((2, 2), NAN), torch.zeros(2, 2)
    assert moments(values, mask).tolist() == [0, 0, 0]
    assert whiten(values, mask, moments(values, mask)).tolist() == [[0, 0], [0, 0]]


def test_a_small_spread_around_a_large_mean_is_kept():
    # float32 has no number between the two, so not their mean either
    values, mask = torch.tensor([[1e7, 1e7 + 1]]), torch.ones(1, 2)
    whitened = whiten(values, mask, moments(values, mask))
    torch.testing.assert_close(whitened, torch.tensor([[-1.0, 1.0]]))
    assert whitened.dtype == torch.float32
