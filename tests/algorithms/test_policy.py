"""Do policy losses and their gradients equal numbers worked out by hand?"""

import math

import pytest
import torch

from chatlearn_vllm.algorithms.aggregation import aggregate
from chatlearn_vllm.algorithms.kl import kl_penalty
from chatlearn_vllm.algorithms.policy import policy_loss

LN2 = math.log(2.0)
NAN, INF = float("nan"), float("inf")


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
    # ratios 2 and 1/2: min(2, 1.5) for A = 1, min(-0.5, -0.8) for A = -1
    logprobs = torch.tensor([[LN2], [-LN2]])
    loss, _ = policy_loss(
        logprobs,
        torch.zeros(2, 1),
        torch.tensor([1.0, -1.0]),
        torch.ones(2, 1),
        cliprange_high=0.5,
    )
    torch.testing.assert_close(loss, torch.tensor([[-1.5], [0.8]]))


def test_the_gradient_of_the_policy_loss_is_ratio_times_advantage_unless_clipped():
    # d/dlogp of -r * A = -r * A where not clipped, 0 where clipped
    logprobs = torch.tensor([[LN2, -LN2, 0.05]], requires_grad=True)
    mask = torch.ones(1, 3)
    loss, _ = policy_loss(logprobs, torch.zeros(1, 3), torch.tensor([3.0]), mask)
    loss.sum().backward()
    expected = torch.tensor([[0.0, -0.5 * 3, -math.exp(0.05) * 3]])
    torch.testing.assert_close(logprobs.grad, expected)


def test_dual_clip_bounds_the_loss_of_negative_advantages_only():
    # ratios 4, 2, 1/2 and c = 3: A = -2 gives min(8, 6), 4 and the ordinary clip 0.8 * 2;
    # A = 1/2 gives what it gives without c
    logprobs = torch.tensor([[2 * LN2, LN2, -LN2]] * 2, requires_grad=True)
    advantages, mask = torch.tensor([-2.0, 0.5]), torch.ones(2, 3)
    loss, stats = policy_loss(logprobs, torch.zeros(2, 3), advantages, mask, dual_clip=3.0)
    torch.testing.assert_close(loss, torch.tensor([[6.0, 4.0, 1.6], [-0.6, -0.6, -0.25]]))
    assert stats["dual_clipped"] == 1
    assert stats["clipped"] == 1 + 1 + 2
    loss.sum().backward()
    # r * -A where nothing clips
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 4.0, 0.0], [0.0, 0.0, -0.25]]))


def test_without_dual_clip_it_is_not_counted():
    _, stats = policy_loss(
        torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([1.0]), torch.ones(1, 1)
    )
    assert stats.keys() == {"tokens", "ratio", "clipped", "approx_kl"}


@pytest.mark.parametrize("dual_clip", [1.0, 0.5])
def test_a_dual_clip_inside_the_ordinary_one_is_refused(dual_clip):
    with pytest.raises(ValueError, match=f"dual_clip={dual_clip} must be larger than 1"):
        policy_loss(
            torch.zeros(1, 1),
            torch.zeros(1, 1),
            torch.zeros(1),
            torch.ones(1, 1),
            dual_clip=dual_clip,
        )


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    # log ratios ln 4 and 0 -> 2, clipped to 1.5 for A = 1; -ln 4, 0 and ln 2 -> 2^(-1/3)
    logprobs = torch.tensor([[NAN, 2 * LN2, 0.0, INF], [-2 * LN2, 0.0, LN2, 500.0]])
    old = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -500.0]])
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]])
    loss, stats = policy_loss(
        logprobs, old, torch.tensor([1.0, 3.0]), mask, cliprange=0.5, ratio_level="sequence"
    )
    second = 0.79370052598  # 2^(-1/3), inside [0.5, 1.5]
    torch.testing.assert_close(
        loss,
        torch.tensor([[0.0, -1.5, -1.5, 0.0], [-3 * second, -3 * second, -3 * second, 0.0]]),
    )
    assert stats["clipped"] == 2
    torch.testing.assert_close(stats["ratio"], torch.tensor(2 * 2 + 3 * second))
    # of tokens: 4 - 1 - ln 4, 0; 1/4 - 1 + ln 4, 0, 2 - 1 - ln 2
    torch.testing.assert_close(stats["approx_kl"], torch.tensor(3 - 0.75 + 1 - LN2))


def test_tokens_outside_the_mask_of_a_clipped_sequence_are_not_counted():
    # s = 4: above 1.2 for A = 1, above c = 3 for A = -1
    logprobs = torch.full((2, 3), 2 * LN2)
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    loss, stats = policy_loss(
        logprobs,
        torch.zeros(2, 3),
        torch.tensor([1.0, -1.0]),
        mask,
        dual_clip=3.0,
        ratio_level="sequence",
    )
    torch.testing.assert_close(loss, torch.tensor([[-1.2, -1.2, 0.0], [0.0, 3.0, 0.0]]))
    assert stats["clipped"] == 3
    assert stats["dual_clipped"] == 1


def test_the_gradient_of_a_sequence_is_shared_by_its_tokens():
    # mean over 2 sequences of -s * A: s * A / (2 * length), with s = 2 and 1/2, A = 3 and -5
    logprobs = torch.tensor([[2 * LN2, 0.0, NAN], [-LN2, -LN2, -LN2]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    loss, _ = policy_loss(
        logprobs,
        torch.zeros(2, 3),
        torch.tensor([3.0, -5.0]),
        mask,
        cliprange=1.0,
        ratio_level="sequence",
    )
    total = aggregate(loss, mask, "seq-mean")
    torch.testing.assert_close(total, torch.tensor((-2 * 3 + 5 / 2) / 2))
    total.backward()
    first, second = -2 * 3 / (2 * 2), 0.5 * 5 / (2 * 3)
    torch.testing.assert_close(
        logprobs.grad, torch.tensor([[first, first, 0.0], [second, second, second]])
    )


def test_advantages_per_token_have_no_sequence_ratio():
    tokens = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"one advantage per sequence, got .* \[1, 2\]"):
        policy_loss(tokens, tokens, tokens, torch.ones(1, 2), ratio_level="sequence")


def test_an_unknown_ratio_level_is_refused_with_the_known_ones():
    tokens = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="ratio_level='word' must be one of token, sequence"):
        policy_loss(tokens, tokens, torch.zeros(1), torch.ones(1, 2), ratio_level="word")


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("how", ["token-mean", "seq-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_gradient_of_the_whole_loss_agrees_with_finite_differences(ratio_level, how, kind):
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    old = logprobs.detach() + 0.5 * torch.randn(3, 4, dtype=torch.float64, generator=generator)
    reference = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    advantages = torch.tensor([1.5, -0.5, 2.0], dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.float64)

    def loss(values):
        token_loss, _ = policy_loss(
            values, old, advantages, mask, ratio_level=ratio_level, dual_clip=1.3
        )
        token_loss = token_loss + 0.3 * kl_penalty(values, reference, kind)
        return aggregate(token_loss, mask, how, max_length=7)

    assert torch.autograd.gradcheck(loss, logprobs)


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_values_outside_the_mask_touch_neither_loss_nor_gradient(ratio_level):
    logprobs = torch.tensor([[-1.0, 500.0, NAN, INF], [NAN] * 4], requires_grad=True)
    old = torch.tensor([[-1.0, -500.0, 0.0, INF], [NAN] * 4])
    mask = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0] * 4])
    loss, stats = policy_loss(
        logprobs, old, torch.tensor([2.0, NAN]), mask, ratio_level=ratio_level, dual_clip=3.0
    )
    aggregate(loss, mask, "token-mean").backward()
    assert loss.tolist() == [[-2.0, 0.0, 0.0, 0.0], [0.0] * 4]
    assert logprobs.grad.tolist() == [[-2.0, 0.0, 0.0, 0.0], [0.0] * 4]
    assert {key: float(value) for key, value in stats.items()} == {
        "tokens": 1,
        "ratio": 1,
        "clipped": 0,
        "dual_clipped": 0,
        "approx_kl": 0,
    }


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_one_sequence_needs_no_batch(ratio_level):
    logprobs, old, mask = torch.tensor([1.0, -0.5, 0.1]), torch.zeros(3), torch.tensor([0, 1, 1])
    loss, _ = policy_loss(logprobs, old, torch.tensor(2.0), mask, ratio_level=ratio_level)
    mean = -0.4 / 2
    ratios = {"token": (math.exp(-0.5), math.exp(0.1)), "sequence": (math.exp(mean),) * 2}
    first, second = ratios[ratio_level]
    torch.testing.assert_close(loss, torch.tensor([0.0, -2 * first, -2 * second]))


def test_advantages_may_be_given_per_token():
    loss, _ = policy_loss(
        torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[1.0, -2.0]]), torch.ones(1, 2)
    )
    assert loss.tolist() == [[-1.0, 2.0]]


def test_garbage_advantages_outside_the_mask_leave_the_gradient_alone():
    logprobs = torch.zeros(1, 3, requires_grad=True)
    loss, _ = policy_loss(
        logprobs, torch.zeros(1, 3), torch.tensor([[NAN, 2.0, INF]]), torch.tensor([[0, 1, 0]])
    )
    loss.sum().backward()
    assert loss.tolist() == [[0.0, -2.0, 0.0]]
    assert logprobs.grad.tolist() == [[0.0, -2.0, 0.0]]


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_losses_and_sums_do_not_depend_on_micro_batches(ratio_level):
    logprobs = torch.tensor([[LN2, -LN2, 0.0], [0.1, 3.0, -0.3], [1.0, 2.0, 3.0]])
    advantages, mask = torch.tensor([3.0, -3.0, 1.0]), torch.tensor([[1, 1, 1], [1, 1, 0], [0] * 3])

    def on(rows):
        old = torch.zeros_like(logprobs[rows])
        return policy_loss(
            logprobs[rows],
            old,
            advantages[rows],
            mask[rows],
            ratio_level=ratio_level,
            dual_clip=3.0,
        )

    loss, stats = on(slice(None))
    parts = [on(slice(row, row + 1)) for row in range(3)]
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), loss)
    for name, total in stats.items():
        torch.testing.assert_close(sum(part[name] for _, part in parts), total)
