"""Do the estimators of the KL divergence equal numbers worked out by hand?"""

import math

import pytest
import torch

from chatlearn_vllm.algorithms.kl import kl_penalty

LN2 = math.log(2.0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [LN2, -LN2, 0.0]),
        ("k2", [LN2**2 / 2, LN2**2 / 2, 0.0]),
        ("k3", [0.5 - 1 + LN2, 2 - 1 - LN2, 0.0]),
    ],
)
def test_estimators_at_probability_ratios_of_two_and_a_half(kind, expected):
    logprobs = torch.tensor([LN2, -LN2, -1.0])
    reference = torch.tensor([0.0, 0.0, -1.0])
    torch.testing.assert_close(kl_penalty(logprobs, reference, kind), torch.tensor(expected))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_average_to_the_exact_divergence(kind):
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    estimates = kl_penalty(policy.log(), reference.log(), kind)
    torch.testing.assert_close((policy * estimates).sum(), exact)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_k2_and_k3_are_never_negative(kind):
    differences = torch.linspace(-5, 5, 101)
    assert (kl_penalty(differences, torch.zeros(101), kind) >= 0).all()


def test_an_unknown_estimator_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="kl_estimator='k4' must be one of k1, k2, k3"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")
