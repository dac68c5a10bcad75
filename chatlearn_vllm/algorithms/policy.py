"""How does a policy become better than the one that sampled, without moving far from it?

* Clipped objective: J. Schulman et al. 2017, "Proximal Policy Optimization Algorithms",
  arXiv:1707.06347, equation 7.
* Two clip ranges: Q. Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at
  Scale", arXiv:2503.14476 (clip-higher).
* Dual clip: D. Ye et al. 2019, "Mastering Complex Control in MOBA Games with Deep Reinforcement
  Learning", arXiv:1912.09729, equation 5.
* Sequence ratio: C. Zheng et al. 2025, "Group Sequence Policy Optimization", arXiv:2507.18071,
  equations 5 to 7.

`logprobs`, `old_logprobs` and `mask` here are [..., T] over predictions: with a batch of
`data/batch.py`, T = S - 1 and `mask = loss_mask[:, 1:]`.
"""

import torch

RATIO_LEVELS = ("token", "sequence")


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    ratio_level: str = "token",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the clipped policy loss of every token, and what clipping did.

    With d = logprobs - old_logprobs, and the ratio r of a token's or of its sequence's
    probabilities,

        r = exp(d)                            ratio_level "token"
        r = exp(mean of d over the sequence)  ratio_level "sequence", the same for all its tokens

        loss = -min(r * A, clamp(r, 1 - cliprange, 1 + cliprange_high) * A)

    Where A < 0 that clamp does not bound the loss of large ratios; with `dual_clip` = c it is then
    at most -c * A.

    With "sequence", `aggregate` by "seq-mean" gives the objective of GSPO: every token's gradient
    is r * A divided by the length of its sequence. Its clip ranges are small (the paper's: 3e-4
    below and 4e-4 above 1), for the mean evens the ratios of the tokens out.

    Args:
        logprobs: [..., T] under the weights being trained; the loss is differentiable in them.
        old_logprobs: [..., T] under the weights before the first update on these samples.
        advantages: [...], one per sequence, or with ratio_level "token" also [..., T].
        mask: [..., T], nonzero on tokens that count; elsewhere the inputs may hold anything.
        cliprange: distance from 1 at which the ratio is clipped.
        cliprange_high: the same above 1, where it should differ (DAPO); None means `cliprange`.
        dual_clip: ratio above which a negative advantage no longer counts more, larger than 1
            (the paper's: 3); None means no such bound.
        ratio_level: "token" or "sequence".

    Returns:
        The loss [..., T], 0 outside the mask, and sums over the mask (detached scalars), to be
        added over micro-batches and ranks and then divided by "tokens":

        * "tokens": number of tokens in the mask;
        * "ratio": sum of r;
        * "clipped": number of tokens whose gradient clipping removed;
        * "dual_clipped": those of them that `dual_clip` clipped; only if it is set;
        * "approx_kl": sum of the k3 estimate of KL(old || new) at every token, in nats.

    Raises:
        ValueError: another `ratio_level`, advantages per token with ratio_level "sequence", or a
            `dual_clip` that is not larger than 1.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be larger than 1, or None")
    if advantages.dim() == logprobs.dim() - 1:
        advantages = advantages.unsqueeze(-1)  # [...] -> [..., 1]
    elif ratio_level == "sequence":
        raise ValueError(
            "ratio_level='sequence' needs one advantage per sequence, got advantages of shape "
            f"{list(advantages.shape)} for logprobs of shape {list(logprobs.shape)}"
        )
    if cliprange_high is None:
        cliprange_high = cliprange
    counts = mask != 0
    # Masked before exp: an overflow outside the mask would turn the gradient into NaN.
    log_ratio = torch.where(counts, logprobs - old_logprobs, 0.0)
    ratio = _ratio(log_ratio, counts, ratio_level)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    is_clipped = counts & (clipped < unclipped)
    stats = {}
    if dual_clip is not None:
        floor = dual_clip * advantages
        is_dual_clipped = counts & (advantages < 0) & (objective < floor)
        objective = torch.where(is_dual_clipped, floor, objective)
        is_clipped = is_clipped | is_dual_clipped
        stats["dual_clipped"] = is_dual_clipped.sum()
    token_loss = torch.where(counts, -objective, 0.0)

    with torch.no_grad():
        stats |= {
            "tokens": counts.sum(),
            "ratio": torch.where(counts, ratio, 0.0).sum(),
            "clipped": is_clipped.sum(),
            "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
        }
    return token_loss, stats


def _ratio(log_ratio: torch.Tensor, counts: torch.Tensor, level: str) -> torch.Tensor:
    """The ratio of every token [..., T], from log ratios that are 0 outside the mask."""
    if level == "token":
        return log_ratio.exp()
    if level == "sequence":
        lengths = counts.sum(-1, keepdim=True).clamp(min=1)
        mean = log_ratio.sum(-1, keepdim=True) / lengths  # [..., 1]
        return mean.exp().expand_as(log_ratio)
    raise ValueError(f"ratio_level={level!r} must be one of {', '.join(RATIO_LEVELS)}")
