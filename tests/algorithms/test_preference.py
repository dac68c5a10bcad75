"""Do preference losses and pairs equal numbers worked out by hand?"""

import math

import pytest
import torch

from chatlearn_vllm.algorithms.preference import (
    best_and_worst,
    preference_loss,
    sequence_logprobs,
)

NAN, INF = float("nan"), float("inf")
CHOSEN, REF_CHOSEN = torch.tensor([-1.0]), torch.tensor([-2.0])
REJECTED, REF_REJECTED = torch.tensor([-5.0]), torch.tensor([-4.0])
"""h = (-1 + 2) - (-5 + 4) = 2; with beta = 1/2 the margin beta h is 1."""

NOT_SURE = 0.31326169  # -log sigmoid(1) = log(1 + 1/e)
WRONG_WAY = 1.31326169  # -log sigmoid(-1) = log(1 + e)


def loss_of(*, beta=0.5, **settings):
    return preference_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, beta=beta, **settings)


def test_dpo_is_the_log_sigmoid_of_the_margin():
    loss, sums = loss_of()
    torch.testing.assert_close(loss, torch.tensor([NOT_SURE]))
    assert {name: float(value) for name, value in sums.items()} == {
        "pairs": 1.0,
        "chosen_reward": 0.5,
        "rejected_reward": -0.5,
        "reward_margin": 1.0,
        "accuracy": 1.0,
    }


def test_label_smoothing_mixes_in_the_pair_the_wrong_way_round():
    loss, _ = loss_of(label_smoothing=0.25)
    torch.testing.assert_close(loss, torch.tensor([0.75 * NOT_SURE + 0.25 * WRONG_WAY]))


def test_ipo_draws_the_log_ratio_to_its_target():
    assert loss_of(kind="ipo")[0].tolist() == [1.0]  # (2 - 1 / (2 * 0.5))^2
    assert loss_of(kind="ipo", beta=0.25)[0].tolist() == [0.0]  # (2 - 2)^2
    assert loss_of(kind="ipo", beta=0.125)[0].tolist() == [4.0]  # (2 - 4)^2


def test_a_policy_like_its_reference_prefers_nothing():
    logprobs = torch.tensor([-3.0, -7.0])
    loss, sums = preference_loss(logprobs, logprobs - 1, logprobs, logprobs - 1, beta=0.3)
    torch.testing.assert_close(loss, torch.full((2,), math.log(2.0)))
    assert sums["accuracy"] == sums["reward_margin"] == 0
    assert sums["pairs"] == 2


def test_any_margin_above_zero_is_accurate():
    zeros = torch.zeros(4)
    _, sums = preference_loss(torch.tensor([0.01, 0.5, 0.0, -0.5]), zeros, zeros, zeros, beta=0.3)
    assert sums["accuracy"] == 2


def test_a_pair_the_wrong_way_round_is_not_accurate():
    loss, sums = preference_loss(REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN, beta=0.5)
    torch.testing.assert_close(loss, torch.tensor([WRONG_WAY]))
    assert sums["accuracy"] == 0
    assert sums["reward_margin"] == -1


def test_the_gradient_of_dpo_pushes_the_two_apart():
    # beta * sigmoid(-beta h) = 0.5 * 0.26894142
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    loss, sums = preference_loss(chosen, rejected, REF_CHOSEN, REF_REJECTED, beta=0.5)
    loss.sum().backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([-0.13447071]))
    torch.testing.assert_close(rejected.grad, torch.tensor([0.13447071]))
    assert not any(value.requires_grad for value in sums.values())


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_huge_margins_overflow_nowhere(sign):
    chosen = torch.tensor([sign * 5000.0], requires_grad=True)
    zero = torch.zeros(1)
    loss, _ = preference_loss(chosen, zero, zero, zero, beta=0.5)
    loss.sum().backward()
    assert loss.item() == (2500.0 if sign < 0 else 0.0)
    assert chosen.grad.item() == (-0.5 if sign < 0 else 0.0)


@pytest.mark.parametrize(
    "settings", [{"kind": "dpo"}, {"kind": "dpo", "label_smoothing": 0.2}, {"kind": "ipo"}]
)
def test_gradients_through_the_tokens_agree_with_finite_differences(settings):
    generator = torch.Generator().manual_seed(0)
    tokens, reference = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 0]])

    def loss(logprobs):
        policy, frozen = sequence_logprobs(logprobs, mask), sequence_logprobs(reference, mask)
        return preference_loss(
            policy[:2], policy[2:], frozen[:2], frozen[2:], beta=0.4, **settings
        )[0]

    assert torch.autograd.gradcheck(loss, tokens.requires_grad_())


def test_pairs_do_not_depend_on_micro_batches():
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(4, 5, generator=generator)
    loss, sums = preference_loss(*logprobs, beta=0.4)
    parts = [preference_loss(*logprobs[:, rows], beta=0.4) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), loss)
    for name, total in sums.items():
        torch.testing.assert_close(sum(part[name] for _, part in parts), total)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "kto"}, "preference loss 'kto' must be one of dpo, ipo"),
        ({"beta": 0.0}, "beta=0.0 must be larger than 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5 must be in \[0, 0.5\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing=-0.1 must be in \[0, 0.5\)"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing=0.1 must be 0 with .* 'ipo'"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        loss_of(**settings)


def test_responses_are_summed_or_averaged_over_their_own_tokens():
    logprobs = torch.tensor([[NAN, -1.0, -3.0, INF], [-2.0, NAN, -INF, 7.0], [NAN] * 4])
    logprobs.requires_grad_()
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    sums = sequence_logprobs(logprobs, mask)
    assert sums.tolist() == [-4.0, -2.0, 0.0]
    means = sequence_logprobs(logprobs, mask, average=True)
    assert means.tolist() == [-2.0, -2.0, 0.0]
    assert sequence_logprobs(logprobs[0], mask[0]) == -4.0  # one response without its batch
    assert sequence_logprobs(logprobs[0], mask[0], average=True) == -2.0
    (sums + means).sum().backward()
    assert logprobs.grad.tolist() == [[0, 1.5, 1.5, 0], [2, 0, 0, 0], [0, 0, 0, 0]]


def test_best_and_worst_of_every_group_make_a_pair():
    rewards = torch.tensor([0.5, 3.0, -1.0, 2.0, 0.25, 7.0])
    groups = torch.tensor([9, 4, 9, 4, 9, 4])
    chosen, rejected, margin = best_and_worst(rewards, groups)
    assert chosen.tolist() == [5, 0]  # group 4: 3, 2, 7; group 9: 0.5, -1, 0.25
    assert rejected.tolist() == [3, 2]
    assert margin.tolist() == [5.0, 1.5]
    assert margin.dtype == torch.float32


def test_of_equal_rewards_the_first_row_is_taken():
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    chosen, rejected, _ = best_and_worst(rewards, torch.zeros(5, dtype=torch.int64))
    assert (chosen.tolist(), rejected.tolist()) == ([1], [0])


def test_groups_without_a_difference_are_skipped():
    rewards = torch.tensor([2.0, 1.0, 2.0, 0.0, 5.0])
    groups = torch.tensor([0, 1, 0, 1, 2])  # equal; 1 over 0; alone
    chosen, rejected, margin = best_and_worst(rewards, groups)
    assert (chosen.tolist(), rejected.tolist(), margin.tolist()) == ([1], [3], [1.0])
    for nothing in best_and_worst(rewards[:1], groups[:1]):
        assert nothing.shape == (0,)


def test_a_generator_draws_among_equal_rewards_only():
    rewards, groups = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5]), torch.zeros(5, dtype=torch.int64)

    def drawn(seed):
        chosen, rejected, margin = best_and_worst(
            rewards, groups, torch.Generator().manual_seed(seed)
        )
        assert margin.tolist() == [1.0]
        return chosen.item(), rejected.item()

    assert drawn(3) == drawn(3)
    assert {drawn(seed) for seed in range(40)} == {(1, 0), (1, 3), (2, 0), (2, 3)}


def test_drawn_pairs_stay_within_their_group():
    rewards = torch.tensor([1.0, 5.0, 0.0, 5.0, 1.0, 2.0])
    groups = torch.tensor([0, 1, 0, 1, 0, 1])
    seen = set()
    for seed in range(40):
        chosen, rejected, _ = best_and_worst(rewards, groups, torch.Generator().manual_seed(seed))
        assert rejected.tolist() == [2, 5]
        seen.add(tuple(chosen.tolist()))
    assert seen == {(0, 1), (0, 3), (4, 1), (4, 3)}


def test_rewards_and_groups_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"both be \[B\], got \[2\] and \[3\]"):
        best_and_worst(torch.zeros(2), torch.zeros(3, dtype=torch.int64))
