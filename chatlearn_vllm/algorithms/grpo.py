"""How rewards of a group of responses become a loss: group relative policy optimization.

Z. Shao et al. 2024, "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language
Models", arXiv:2402.03300, section 4.1. The clipped objective is that of J. Schulman et al. 2017,
"Proximal Policy Optimization Algorithms", arXiv:1707.06347, equation 7.

`logprobs`, `old_logprobs` and `mask` here are [..., T] over predictions: with a batch of
`data/batch.py`, T = S - 1 and `mask = loss_mask[:, 1:]`.
"""

import torch

LOSS_AGGREGATIONS = ("token-mean", "seq-mean")


def group_advantages(
    rewards: torch.Tensor, groups: torch.Tensor, *, normalize_std: bool = True, eps: float = 1e-6
) -> torch.Tensor:
    """Compare every response with the others to the same prompt.

    A_i = (r_i - mean(r)) / (std(r) + eps) over the rows of i's group, with the population
    standard deviation (divided by the group's size G, not G - 1). A group whose rewards are all
    equal, so also a group of one, gets 0.

    Args:
        rewards: [B] float.
        groups: [B] int; rows with equal values form a group, in any order.
        normalize_std: False leaves the division out (Z. Liu et al. 2025, "Understanding
            R1-Zero-Like Training", arXiv:2503.20783).
        eps: added to the standard deviation, in units of the reward.

    Returns:
        [B] float32 on the device of `rewards`.

    Raises:
        ValueError: the shapes are not both [B].
    """
    if rewards.dim() != 1 or rewards.shape != groups.shape:
        raise ValueError(
            f"rewards and groups must both be [B], got {list(rewards.shape)} and "
            f"{list(groups.shape)}"
        )
    # float64: equal rewards then have an advantage of 0 up to 1e-10, whatever their value
    values = rewards.double()
    group_ids, row_group = groups.to(values.device).unique(return_inverse=True)

    def group_mean(entries: torch.Tensor) -> torch.Tensor:
        sums = entries.new_zeros(len(group_ids)).index_add_(0, row_group, entries)
        return (sums / row_group.bincount(minlength=len(group_ids)))[row_group]

    advantages = values - group_mean(values)
    if normalize_std:
        advantages = advantages / (group_mean(advantages.square()).sqrt() + eps)
    return advantages.float()


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the clipped policy loss of every token, and what clipping did.

    With r = exp(logprobs - old_logprobs):

        loss = -min(r * A, clamp(r, 1 - cliprange, 1 + cliprange_high) * A)

    Args:
        logprobs: [..., T] under the weights being trained; the loss is differentiable in them.
        old_logprobs: [..., T] under the weights before the first update on these samples.
        advantages: [...], one per sequence, or [..., T].
        mask: [..., T], nonzero on tokens that count; elsewhere the inputs may hold anything.
        cliprange: distance from 1 at which the ratio is clipped.
        cliprange_high: the same above 1, where it should differ (Q. Yu et al. 2025, "DAPO",
            arXiv:2503.14476); None means `cliprange`.

    Returns:
        The loss [..., T], 0 outside the mask, and sums over the mask (detached scalars), to be
        added over micro-batches and ranks and then divided by "tokens":

        * "tokens": number of tokens in the mask;
        * "ratio": sum of r;
        * "clipped": number of tokens whose gradient clipping removed;
        * "approx_kl": sum of the k3 estimate of KL(old || new), in nats.
    """
    if advantages.dim() == logprobs.dim() - 1:
        advantages = advantages.unsqueeze(-1)  # [...] -> [..., 1]
    if cliprange_high is None:
        cliprange_high = cliprange
    counts = mask != 0
    # Masked before exp: an overflow outside the mask would turn the gradient into NaN.
    log_ratio = torch.where(counts, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange_high) * advantages
    token_loss = torch.where(counts, -torch.minimum(unclipped, clipped), 0.0)

    with torch.no_grad():
        stats = {
            "tokens": counts.sum(),
            "ratio": torch.where(counts, ratio, 0.0).sum(),
            "clipped": (counts & (clipped < unclipped)).sum(),
            "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
        }
    return token_loss, stats


def aggregate(
    token_loss: torch.Tensor,
    mask: torch.Tensor,
    how: str,
    *,
    denominator: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Reduce a loss per token to one number.

    * "token-mean": every token weighs the same, sum / number of tokens (DAPO);
    * "seq-mean": every sequence weighs the same, its weight shared by its tokens (GRPO as
      published: 1/G sum_i 1/|o_i| sum_t).

    Args:
        token_loss: [B, T].
        mask: [B, T], nonzero on tokens that count.
        how: "token-mean" or "seq-mean".
        denominator: the number of tokens or of sequences to divide by, where the mean goes over
            more than this call sees: the global batch of which this is a micro-batch. The sum of
            the results over all micro-batches is then the mean over the global batch. None
            means this call's own number (of sequences with at least one token).

    Returns:
        A scalar; 0 if the mask is empty.

    Raises:
        ValueError: another `how`.
    """
    counts = (mask != 0).to(token_loss.dtype)
    masked = torch.where(mask != 0, token_loss, 0.0)
    if how == "token-mean":
        total, own_number = masked.sum(), counts.sum()
    elif how == "seq-mean":
        lengths = counts.sum(-1)
        total = (masked.sum(-1) / lengths.clamp(min=1)).sum()
        own_number = (lengths > 0).sum()
    else:
        raise ValueError(f"loss_agg={how!r} must be one of {', '.join(LOSS_AGGREGATIONS)}")
    if denominator is None:
        denominator = own_number.clamp(min=1)
    return total / denominator
