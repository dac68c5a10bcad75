"""Do the estimators of the KL divergence and its coefficients equal numbers worked out by hand?"""

import math

import pytest
import torch

from chatlearn_vllm.algorithms.kl import KL_ESTIMATORS, AdaptiveKL, FixedKL, kl_penalty

LN2 = math.log(2.0)
NAN, INF = float("nan"), float("inf")


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


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
def test_values_outside_the_mask_touch_neither_the_estimate_nor_its_gradient(kind):
    logprobs = torch.tensor([[-500.0, LN2, NAN, INF]], requires_grad=True)
    reference = torch.tensor([[500.0, 0.0, 0.0, INF]])
    kl = kl_penalty(logprobs, reference, kind, mask=torch.tensor([[0, 1, 0, 0]]))
    kl.sum().backward()
    expected = {"k1": (LN2, 1.0), "k2": (LN2**2 / 2, LN2), "k3": (LN2 - 0.5, 0.5)}[kind]
    torch.testing.assert_close(kl, torch.tensor([[0.0, expected[0], 0.0, 0.0]]))
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, expected[1], 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (4.4, 1.05),  # error 0.1, of which 50 of 100 samples count half
        (4.0, 1.0),
        (3.6, 0.95),
        (400.0, 1.1),  # errors are clipped to 0.2
        (0.0, 0.9),
        (-3.0, 0.9),  # k1 may be negative
    ],
)
def test_the_adaptive_coefficient_follows_the_error(kl, factor):
    controller = AdaptiveKL(0.5, target=4.0, horizon=100)
    controller.update(kl, 50)
    assert controller.coef == pytest.approx(0.5 * factor)


def test_changes_of_the_adaptive_coefficient_multiply():
    controller = AdaptiveKL(0.5, target=4.0, horizon=100)
    controller.update(40.0, 100)
    controller.update(40.0, 50)
    assert controller.coef == pytest.approx(0.5 * 1.2 * 1.1)


def test_an_adaptive_coefficient_goes_on_from_its_state():
    controller = AdaptiveKL(0.5, target=4.0, horizon=100)
    controller.update(40.0, 50)
    resumed = AdaptiveKL(0.1, target=4.0, horizon=100)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.coef == controller.coef
    resumed.update(3.3, 7)
    controller.update(3.3, 7)
    assert resumed.coef == controller.coef


def test_a_fixed_coefficient_is_that_of_the_configuration():
    controller = FixedKL(0.02)
    controller.update(100.0, 50)
    assert controller.coef == 0.02
    controller.load_state_dict({"coef": 0.5})
    assert controller.coef == 0.02
    adaptive = AdaptiveKL(0.5, target=4.0, horizon=100)
    adaptive.load_state_dict(controller.state_dict())
    assert adaptive.coef == 0.02


def test_an_adaptive_coefficient_needs_values_above_zero():
    with pytest.raises(ValueError, match="above 0, got init_kl_coef=0.0, target=-1$"):
        AdaptiveKL(0.0, target=-1, horizon=10)


@pytest.mark.parametrize("kl", [NAN, INF, -INF])
def test_a_kl_that_is_not_finite_is_refused(kl):
    controller = AdaptiveKL(0.5, target=4.0, horizon=100)
    with pytest.raises(ValueError, match=f"the KL is {kl}"):
        controller.update(kl, 50)
    assert controller.coef == 0.5


def test_a_horizon_that_could_end_the_penalty_is_refused():
    controller = AdaptiveKL(0.5, target=4.0, horizon=100)
    with pytest.raises(ValueError, match="horizon=100 must be larger than a fifth of the 500"):
        controller.update(4.0, 500)
    controller.update(0.0, 499)
    assert controller.coef == pytest.approx(0.5 * 0.002)
