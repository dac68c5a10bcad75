"""Do the value loss and the explained variance equal numbers worked out by hand?"""

import pytest
import torch

from chatlearn_vllm.algorithms.value import explained_variance, value_loss

NAN, INF = float("nan"), float("inf")


def sums_of(values, returns):
    values, returns = torch.tensor([values]), torch.tensor([returns])
    _, sums = value_loss(values, values, returns, torch.ones_like(values), cliprange=None)
    return sums


def test_values_that_came_nearer_than_allowed_have_no_gradient():
    # cliprange 1/2 around 1. Towards R = 3: V = 2 counts as 1.5, V = 1.25 as it is.
    # Away from R = 0: V = 2 counts as it is, for it is the worse of the two. Towards R = 0:
    # V = 0.75 counts as it is.
    values = torch.tensor([[2.0, 1.25, 2.0, 0.75]], requires_grad=True)
    returns = torch.tensor([[3.0, 3.0, 0.0, 0.0]])
    loss, sums = value_loss(values, torch.ones(1, 4), returns, torch.ones(1, 4), cliprange=0.5)
    torch.testing.assert_close(loss, torch.tensor([[1.5**2 / 2, 1.75**2 / 2, 2.0, 0.75**2 / 2]]))
    assert sums["clipped"] == 1
    assert sums["squared_error"] == 1 + 1.75**2 + 4 + 0.75**2
    loss.sum().backward()
    assert values.grad.tolist() == [[0.0, -1.75, 2.0, 0.75]]


def test_values_below_are_clipped_like_values_above():
    loss, sums = value_loss(
        torch.tensor([[-3.0]]),
        torch.zeros(1, 1),
        -torch.ones(1, 1) * 9,
        torch.ones(1, 1),
        cliprange=1,
    )
    assert loss.tolist() == [[32.0]]  # (-1 + 9)^2 / 2 rather than (-3 + 9)^2 / 2
    assert sums["clipped"] == 1


def test_without_a_clip_range_it_is_half_the_squared_error():
    values = torch.tensor([[2.0, 1.0]], requires_grad=True)
    returns = torch.tensor([[5.0, 0.0]])
    loss, sums = value_loss(
        values, torch.full((1, 2), 7.0), returns, torch.ones(1, 2), cliprange=None
    )
    assert loss.tolist() == [[4.5, 0.5]]
    assert sums["clipped"] == 0
    loss.sum().backward()
    assert values.grad.tolist() == [[-3.0, 1.0]]


@pytest.mark.parametrize("cliprange", [None, 0.5])
def test_the_gradient_agrees_with_finite_differences(cliprange):
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 2, 4, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    assert torch.autograd.gradcheck(
        lambda entries: value_loss(entries, old, returns, mask, cliprange=cliprange)[0],
        values.requires_grad_(),
    )


def test_values_outside_the_mask_touch_neither_loss_nor_gradient_nor_sums():
    values = torch.tensor([[2.0, NAN, INF, 1e30]], requires_grad=True)
    garbage = torch.tensor([[1.0, INF, NAN, -1e30]])
    loss, sums = value_loss(values, garbage, garbage, torch.tensor([[1, 0, 0, 0]]), cliprange=0.5)
    loss.sum().backward()
    assert loss.tolist() == [[0.5, 0.0, 0.0, 0.0]]
    assert values.grad.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert {name: float(value) for name, value in sums.items()} == {
        "tokens": 1,
        "clipped": 0,
        "squared_error": 1,
        "returns": 1,
        "returns_squared": 1,
        "values": 2,
        "values_squared": 4,
    }
    assert not any(value.requires_grad for value in sums.values())
    assert {value.dtype for value in sums.values()} == {torch.float64}


def test_losses_and_sums_do_not_depend_on_micro_batches():
    generator = torch.Generator().manual_seed(1)
    values, old, returns = torch.randn(3, 3, 4, generator=generator)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    loss, sums = value_loss(values, old, returns, mask, cliprange=0.3)
    parts = [
        value_loss(values[rows], old[rows], returns[rows], mask[rows], cliprange=0.3)
        for rows in (slice(0, 1), slice(1, 3))
    ]
    assert torch.equal(torch.cat([part for part, _ in parts]), loss)
    for name, total in sums.items():
        torch.testing.assert_close(sum(part[name] for _, part in parts), total)
    assert sums["tokens"] == 5


@pytest.mark.parametrize(
    ("values", "returns", "expected"),
    [
        ([1.0, 3.0], [1.0, 3.0], 1.0),
        ([2.0, 4.0], [1.0, 3.0], 1.0),  # a constant error has no variance
        ([1.0, 2.0], [1.0, 3.0], 0.75),  # errors 0 and 1: 1 - 0.25 / 1
        ([1.0, 4.0], [1.0, 5.0], 0.9375),  # errors 0 and 1: 1 - 0.25 / 4
        ([0.0, 0.0], [1.0, 3.0], 0.0),
        ([3.0, 1.0], [1.0, 3.0], -3.0),  # errors -2 and 2: 1 - 4 / 1
    ],
)
def test_explained_variance(values, returns, expected):
    sums = sums_of(values, returns)
    assert explained_variance(sums) == pytest.approx(expected, abs=1e-12)
    means = {name: float(value) / 2 for name, value in sums.items()}
    assert explained_variance(means) == pytest.approx(expected, abs=1e-12)


def test_rounding_of_float32_sums_is_not_taken_for_variance():
    # two returns of about 100, whose squares add up to 20000 and an error of 1e-7 of that
    sums = {"tokens": 2, "returns": 200.0, "returns_squared": 20000.002, "values": 0.0}
    assert explained_variance(sums | {"squared_error": 20000.0}) == 0.0


@pytest.mark.parametrize(("deviation", "expected"), [(0.9, 0.0), (1.1, 0.75)])
def test_a_spread_above_a_thousandth_of_the_returns_is_variance(deviation, expected):
    # returns of 1000 and an error whose variance is a quarter of theirs
    sums = {"tokens": 1, "returns": 1000.0, "values": 1000.0}
    sums["returns_squared"] = 1e6 + deviation**2
    sums["squared_error"] = deviation**2 / 4
    assert explained_variance(sums) == pytest.approx(expected)


def test_returns_that_do_not_vary_leave_nothing_to_explain():
    assert explained_variance(sums_of([5.0, -2.0, 0.1], [0.1, 0.1, 0.1])) == 0.0
    assert explained_variance(sums_of([5.0, -2.0], [0.0, 0.0])) == 0.0
    _, empty = value_loss(*[torch.full((1, 2), NAN)] * 3, torch.zeros(1, 2), cliprange=0.1)
    assert explained_variance(empty) == 0.0
