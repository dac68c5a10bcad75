"""Do advantages and losses equal numbers worked out by hand?"""

import math

import pytest
import torch

from chatlearn_vllm.algorithms.grpo import aggregate, group_advantages, policy_loss
from chatlearn_vllm.algorithms.kl import kl_penalty

LN2 = math.log(2.0)


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


def test_a_group_of_equal_rewards_has_no_advantage():
    rewards = torch.tensor([0.1, 0.1, 0.1, 7.0])
    advantages = group_advantages(rewards, torch.tensor([0, 0, 0, 1]))
    assert advantages.abs().max() < 1e-9
    assert advantages.dtype == torch.float32


def test_rewards_and_groups_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"both be \[B\], got \[2\] and \[3\]"):
        group_advantages(torch.zeros(2), torch.zeros(3, dtype=torch.int64))


def test_the_policy_loss_is_clipped_on_the_side_that_helps():
    # ratios 2, 1/2, 1 with cliprange 0.2 and the advantages +3 and -3
    logprobs = torch.tensor([[LN2, -LN2, 0.0], [LN2, -LN2, 0.0]])
    old = torch.zeros(2, 3)
    loss, stats = policy_loss(logprobs, old, torch.tensor([3.0, -3.0]), torch.ones(2, 3))
    torch.testing.assert_close(
        loss,
        torch.tensor(
            [
                [-1.2 * 3, -0.5 * 3, -3.0],  # min(2 * 3, 1.2 * 3); min(.5 * 3, .8 * 3)
                [2.0 * 3, 0.8 * 3, 3.0],  # min(2 * -3, 1.2 * -3); min(.5 * -3, .8 * -3)
            ]
        ),
    )
    assert stats["tokens"] == 6
    assert stats["clipped"] == 2
    torch.testing.assert_close(stats["ratio"], torch.tensor(7.0))
    # k3 of KL(old || new): r - 1 - log r = 1 - ln 2, -1/2 + ln 2, 0
    torch.testing.assert_close(stats["approx_kl"], torch.tensor(2 * 0.5))


def test_the_upper_clip_may_differ():
    logprobs = torch.tensor([[LN2, LN2]])
    loss, _ = policy_loss(
        logprobs, torch.zeros(1, 2), torch.tensor([1.0]), torch.ones(1, 2), cliprange_high=0.5
    )
    torch.testing.assert_close(loss, torch.tensor([[-1.5, -1.5]]))


def test_the_gradient_of_the_policy_loss_is_ratio_times_advantage_unless_clipped():
    # d/dlogp of -r * A = -r * A where not clipped, 0 where clipped
    logprobs = torch.tensor([[LN2, -LN2, 0.05]], requires_grad=True)
    mask = torch.ones(1, 3)
    loss, _ = policy_loss(logprobs, torch.zeros(1, 3), torch.tensor([3.0]), mask)
    loss.sum().backward()
    expected = torch.tensor([[0.0, -0.5 * 3, -math.exp(0.05) * 3]])
    torch.testing.assert_close(logprobs.grad, expected)


def test_the_gradient_of_the_whole_loss_agrees_with_finite_differences():
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    old = logprobs.detach() + 0.05 * torch.randn(3, 4, dtype=torch.float64, generator=generator)
    reference = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    advantages = torch.tensor([1.5, -0.5, 2.0], dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.float64)

    def loss(values, how, kind):
        token_loss, _ = policy_loss(values, old, advantages, mask)
        return aggregate(token_loss + 0.3 * kl_penalty(values, reference, kind), mask, how)

    for how in ("token-mean", "seq-mean"):
        for kind in ("k1", "k2", "k3"):
            assert torch.autograd.gradcheck(lambda v, h=how, k=kind: loss(v, h, k), logprobs)


def test_values_outside_the_mask_touch_neither_loss_nor_gradient():
    logprobs = torch.tensor([[-1.0, 500.0, float("nan")]], requires_grad=True)
    old = torch.tensor([[-1.0, -500.0, 0.0]])
    mask = torch.tensor([[1.0, 0.0, 0.0]])
    loss, stats = policy_loss(logprobs, old, torch.tensor([2.0]), mask)
    aggregate(loss, mask, "token-mean").backward()
    assert loss.tolist() == [[-2.0, 0.0, 0.0]]
    assert logprobs.grad.tolist() == [[-2.0, 0.0, 0.0]]
    assert {key: float(value) for key, value in stats.items()} == {
        "tokens": 1,
        "ratio": 1,
        "clipped": 0,
        "approx_kl": 0,
    }


def test_advantages_may_be_given_per_token():
    loss, _ = policy_loss(
        torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[1.0, -2.0]]), torch.ones(1, 2)
    )
    assert loss.tolist() == [[-1.0, 2.0]]


def test_token_mean_weighs_tokens_and_seq_mean_weighs_sequences():
    token_loss = torch.tensor([[1.0, 2.0, 3.0], [8.0, 99.0, 99.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    assert aggregate(token_loss, mask, "token-mean") == (1 + 2 + 3 + 8) / 4
    assert aggregate(token_loss, mask, "seq-mean") == ((1 + 2 + 3) / 3 + 8) / 2


@pytest.mark.parametrize(("how", "denominator"), [("token-mean", 4), ("seq-mean", 2)])
def test_micro_batches_with_a_common_denominator_add_up_to_the_whole(how, denominator):
    token_loss = torch.tensor([[1.0, 2.0, 3.0], [8.0, 0.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    parts = [
        aggregate(token_loss[row : row + 1], mask[row : row + 1], how, denominator=denominator)
        for row in range(2)
    ]
    assert sum(parts) == aggregate(token_loss, mask, how)


@pytest.mark.parametrize("how", ["token-mean", "seq-mean"])
def test_a_sequence_without_tokens_does_not_count(how):
    token_loss = torch.tensor([[4.0, 2.0], [5.0, 5.0]])
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert aggregate(token_loss, mask, how) == 3.0
    assert aggregate(token_loss, torch.zeros(2, 2), how) == 0.0


def test_an_unknown_aggregation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="loss_agg='mean' must be one of token-mean, seq-mean"):
        aggregate(torch.zeros(1, 1), torch.ones(1, 1), "mean")
