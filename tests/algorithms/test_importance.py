"""Do importance weights against the rollout equal numbers worked out by hand?"""

import math

import pytest
import torch

from chatlearn_vllm.algorithms.importance import truncated_weights
from chatlearn_vllm.algorithms.policy import policy_loss

LN2 = math.log(2.0)
NAN, INF = float("nan"), float("inf")
OLD = torch.tensor([[LN2, -1.0, 3 * LN2, NAN, -INF], [-2.0, 0.0, 200.0, 1.0, NAN]])
ROLLOUT = torch.tensor([[0.0, -1.0 + LN2, 0.0, 0.0, -INF], [-2.0, -2 * LN2, 0.0, NAN, 0.0]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
"""Ratios 2, 1/2, 8; 1, 4 and e^200 on the marked tokens; the others may hold anything."""


def test_weights_are_ratios_up_to_the_cap():
    weights, sums = truncated_weights(OLD, ROLLOUT, MASK, cap=4.0)
    expected = torch.tensor([[2.0, 0.5, 4.0, 0.0, 0.0], [1.0, 4.0, 4.0, 0.0, 0.0]])
    torch.testing.assert_close(weights, expected)
    assert sums["rollout_weight"].item() == pytest.approx(15.5)
    tighter, sums = truncated_weights(OLD, ROLLOUT, MASK, cap=3.0)
    torch.testing.assert_close(tighter, expected.clamp(max=3.0))
    assert sums["rollout_weight_truncated"] == 3  # 8, 4 and e^200


def test_equal_policies_weigh_one_even_with_the_smallest_cap():
    weights, sums = truncated_weights(OLD[:, :3], OLD[:, :3], torch.ones(2, 3), cap=1.0)
    assert weights.tolist() == [[1.0] * 3] * 2
    assert sums["rollout_weight_truncated"] == 0


def test_weights_multiply_the_gradient_and_have_none_of_their_own():
    # -w * r * A with w = 2, 1/2 and r = 1
    old = torch.tensor([[LN2, -1.0]])
    logprobs = old.clone().requires_grad_()
    rollout = torch.tensor([[0.0, -1.0 + LN2]])
    mask = torch.ones(1, 2)
    token_loss, _ = policy_loss(logprobs, old, torch.tensor([3.0]), mask)
    weights, _ = truncated_weights(logprobs, rollout, mask, cap=4.0)
    (token_loss * weights).sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-6.0, -1.5]]))


def test_shards_add_up_and_no_tokens_give_zeros():
    _, whole = truncated_weights(OLD, ROLLOUT, MASK, cap=3.0)
    parts = [
        truncated_weights(OLD[rows], ROLLOUT[rows], MASK[rows], cap=3.0)[1]
        for rows in (slice(0, 1), slice(1, 2))
    ]
    for name, total in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], total)
    weights, empty = truncated_weights(OLD, ROLLOUT, 0 * MASK, cap=3.0)
    assert not weights.any()
    assert set(map(float, empty.values())) == {0.0}


def test_a_cap_below_the_weight_of_equal_policies_is_refused():
    with pytest.raises(ValueError, match=r"cap=0\.9 of the importance weights must be at least 1"):
        truncated_weights(OLD, ROLLOUT, MASK, cap=0.9)
