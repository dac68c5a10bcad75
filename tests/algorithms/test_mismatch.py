"""Do the mismatch metrics have the values that their formulas give by hand?"""

import math

import pytest
import torch

from chatlearn_vllm.algorithms.mismatch import count_not_finite, mismatch_metrics, mismatch_sums

NAN = float("nan")
TRAINER = torch.tensor([[-1.0, -2.0, NAN], [-0.5, -3.0, -1.0]])
ROLLOUT = torch.tensor([[-1.0, -2.0 - math.log(2), 0.0], [-0.5 + math.log(1.1), -2.0, 7.0]])
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
"""d = 0, log 2, -log 1.1 and -1 on the four marked tokens; the others may hold anything."""


def metrics_of(*shards, cliprange=0.2):
    found = [mismatch_sums(*shard, cliprange=cliprange) for shard in shards]
    total = sum(sums for sums, _ in found)
    return mismatch_metrics(total.tolist(), max(float(largest) for _, largest in found))


def test_values_by_hand():
    found = metrics_of((ROLLOUT, TRAINER, MASK))

    log2, log11 = math.log(2), math.log(1.1)
    assert found["logprob_abs_diff_mean"] == pytest.approx((log2 + log11 + 1) / 4, rel=1e-6)
    assert found["logprob_abs_diff_max"] == pytest.approx(1.0, rel=1e-6)
    # exp(d) - 1 - d with exp(d) = 1, 2, 1/1.1 and 1/e
    k3 = [0.0, 2 - 1 - log2, 1 / 1.1 - 1 + log11, math.exp(-1) - 1 + 1]
    assert found["rollout_kl"] == pytest.approx(sum(k3) / 4, rel=1e-6)
    # ratios 1 and 0.909 lie inside [0.8, 1.2], ratios 2 and 0.37 outside
    assert found["rollout_clip_fraction"] == 0.5
    for cliprange in (0.05, 0.0):  # equal log-probabilities are inside any range
        found = metrics_of((ROLLOUT, TRAINER, MASK), cliprange=cliprange)
        assert found["rollout_clip_fraction"] == 0.75


def test_shards_of_unequal_length_add_up():
    rows = [
        (ROLLOUT[row : row + 1], TRAINER[row : row + 1], mask)
        for row, mask in enumerate((MASK[:1], torch.tensor([[1.0, 0.0, 0.0]])))
    ]
    mask = torch.cat([shard[2] for shard in rows])

    assert metrics_of(*rows) == pytest.approx(metrics_of((ROLLOUT, TRAINER, mask)), rel=1e-12)


def test_the_kl_is_that_of_the_rollout_to_the_trainer():
    rollout = torch.tensor([0.7, 0.2, 0.1]).log()
    trainer = torch.tensor([0.5, 0.3, 0.2]).log()
    tokens = torch.tensor([0] * 7 + [1] * 2 + [2])  # as often as the rollout samples them
    mask = torch.ones(1, 10)

    found = metrics_of((rollout[tokens][None], trainer[tokens][None], mask))

    exact = (rollout.exp() * (rollout - trainer)).sum().item()
    assert found["rollout_kl"] == pytest.approx(exact, rel=1e-6)


def test_a_lone_token_is_its_own_mean():
    found = metrics_of((ROLLOUT, TRAINER, torch.tensor([[0.0, 0, 0], [0, 1, 0]])))
    assert found == pytest.approx(
        {
            "logprob_abs_diff_mean": 1.0,
            "logprob_abs_diff_max": 1.0,
            "rollout_kl": math.exp(-1),
            "rollout_clip_fraction": 1.0,
        }
    )


def test_a_token_that_the_rollout_all_but_excluded_has_a_finite_kl():
    found = metrics_of((torch.tensor([[-100.0]]), torch.tensor([[0.0]]), torch.ones(1, 1)))
    assert found["rollout_kl"] == pytest.approx(math.exp(100) - 1 - 100)  # too much for float32


def test_no_tokens_give_zeros():
    assert set(metrics_of((ROLLOUT, TRAINER, 0 * MASK)).values()) == {0.0}


def test_only_marked_tokens_can_be_not_finite():
    logprobs = torch.tensor([[NAN, -1.0, 0.0], [-math.inf, math.inf, NAN]])
    mask = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])

    assert count_not_finite(logprobs, mask).tolist() == [0, 2]
