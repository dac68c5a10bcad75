"""How does a loss per token become one number, and what weighs the same in it?

* "token-mean": Q. Yu et al. 2025, "DAPO", arXiv:2503.14476, equation 8.
* "seq-mean": Z. Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300, equation 3 (GRPO).
* "seq-mean-token-sum-norm": Z. Liu et al. 2025, "Understanding R1-Zero-Like Training: A Critical
  Perspective", arXiv:2503.20783 (Dr. GRPO).
"""

import torch

LOSS_AGGREGATIONS = ("token-mean", "seq-mean", "seq-mean-token-sum-norm")


def aggregate(
    token_loss: torch.Tensor,
    mask: torch.Tensor,
    how: str,
    *,
    denominator: torch.Tensor | float | None = None,
    max_length: int | None = None,
) -> torch.Tensor:
    """Reduce a loss per token to one number.

    * "token-mean": every token weighs the same, sum / number of tokens (DAPO);
    * "seq-mean": every sequence weighs the same, its weight shared by its tokens (GRPO as
      published: 1/G sum_i 1/|o_i| sum_t);
    * "seq-mean-token-sum-norm": every token weighs the same whatever the lengths in the batch,
      mean over sequences of (sum over tokens / max_length), so that long responses are neither
      favoured nor punished (Dr. GRPO).

    Args:
        token_loss: [B, T].
        mask: [B, T], nonzero on tokens that count; elsewhere `token_loss` may hold anything.
        how: one of LOSS_AGGREGATIONS.
        denominator: the number of tokens ("token-mean") or of sequences (the others) to divide
            by, where the mean goes over more than this call sees: the global batch of which this
            is a micro-batch. The sum of the results over all micro-batches is then the mean over
            the global batch. None means this call's own number (of sequences with at least one
            token).
        max_length: the constant of "seq-mean-token-sum-norm", which alone reads it: the largest
            number of tokens that a response may have. It must not depend on the batch.

    Returns:
        A scalar; 0 if the mask is empty.

    Raises:
        ValueError: another `how`, or one that needs a `max_length` of at least 1.
    """
    if how not in LOSS_AGGREGATIONS:
        raise ValueError(f"loss_agg={how!r} must be one of {', '.join(LOSS_AGGREGATIONS)}")
    counts = mask != 0
    lengths = counts.sum(-1)
    sums = torch.where(counts, token_loss, 0.0).sum(-1)  # [B, T] -> [B]
    own_number = (lengths > 0).sum()
    if how == "token-mean":
        own_number = lengths.sum()
    elif how == "seq-mean":
        sums = sums / lengths.clamp(min=1)
    elif max_length is None or max_length < 1:
        raise ValueError(f"loss_agg={how!r} needs a max_length of at least 1, got {max_length}")
    else:
        sums = sums / max_length
    if denominator is None:
        denominator = own_number.clamp(min=1)
    return sums.sum() / denominator
