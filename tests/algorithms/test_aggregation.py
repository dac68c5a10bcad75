"""Does every way to average a loss weigh tokens and sequences as it says?"""

import pytest
import torch

from chatlearn_vllm.algorithms.aggregation import LOSS_AGGREGATIONS, aggregate

TOKEN_LOSS = torch.tensor([[1.0, 2.0, 3.0], [8.0, float("nan"), float("inf")]])
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("token-mean", (1 + 2 + 3 + 8) / 4),
        ("seq-mean", ((1 + 2 + 3) / 3 + 8) / 2),
        ("seq-mean-token-sum-norm", ((1 + 2 + 3) / 4 + 8 / 4) / 2),
    ],
)
def test_tokens_and_sequences_are_weighed_as_named(how, expected):
    assert aggregate(TOKEN_LOSS, MASK, how, max_length=4) == expected


@pytest.mark.parametrize(
    ("how", "denominator"),
    [("token-mean", 4), ("seq-mean", 2), ("seq-mean-token-sum-norm", 2)],
)
def test_micro_batches_with_a_common_denominator_add_up_to_the_whole(how, denominator):
    parts = [
        aggregate(TOKEN_LOSS[rows], MASK[rows], how, denominator=denominator, max_length=4)
        for rows in (slice(0, 1), slice(1, 2))
    ]
    assert sum(parts) == aggregate(TOKEN_LOSS, MASK, how, max_length=4)


@pytest.mark.parametrize("how", LOSS_AGGREGATIONS)
def test_a_sequence_without_tokens_does_not_count(how):
    token_loss = torch.tensor([[4.0, 2.0], [5.0, 5.0]])
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert aggregate(token_loss, mask, how, max_length=2) == 3.0
    assert aggregate(token_loss, torch.zeros(2, 2), how, max_length=2) == 0.0


@pytest.mark.parametrize(
    ("how", "gradient"),
    [
        ("token-mean", [[0.25, 0.25, 0.25], [0.25, 0.0, 0.0]]),
        ("seq-mean", [[1 / 6, 1 / 6, 1 / 6], [0.5, 0.0, 0.0]]),
        ("seq-mean-token-sum-norm", [[0.125, 0.125, 0.125], [0.125, 0.0, 0.0]]),
    ],
)
def test_the_gradient_is_the_weight_of_the_token(how, gradient):
    token_loss = TOKEN_LOSS.clone().requires_grad_()
    aggregate(token_loss, MASK, how, max_length=4).backward()
    torch.testing.assert_close(token_loss.grad, torch.tensor(gradient))


def test_padding_does_not_change_the_dr_grpo_loss():
    # a batch that happens to be longer must not make tokens weigh less
    padded = torch.nn.functional.pad(TOKEN_LOSS, (0, 5)), torch.nn.functional.pad(MASK, (0, 5))
    how = "seq-mean-token-sum-norm"
    assert aggregate(*padded, how, max_length=4) == aggregate(TOKEN_LOSS, MASK, how, max_length=4)


def test_dr_grpo_takes_responses_of_one_token():
    token_loss = torch.tensor([[3.0], [5.0]])
    how = "seq-mean-token-sum-norm"
    assert aggregate(token_loss, torch.ones(2, 1), how, max_length=1) == 4.0


@pytest.mark.parametrize("max_length", [None, 0])
def test_dr_grpo_needs_a_length(max_length):
    with pytest.raises(ValueError, match=f"needs a max_length of at least 1, got {max_length}"):
        aggregate(TOKEN_LOSS, MASK, "seq-mean-token-sum-norm", max_length=max_length)


def test_an_unknown_aggregation_is_refused_with_the_known_ones():
    allowed = "token-mean, seq-mean, seq-mean-token-sum-norm$"
    with pytest.raises(ValueError, match=f"loss_agg='mean' must be one of {allowed}"):
        aggregate(TOKEN_LOSS, MASK, "mean")
