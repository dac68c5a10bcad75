"""How does a loss allow for samples that another engine's arithmetic drew?

F. Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
https://fengyao.notion.site/off-policy-rl (truncated importance sampling). The ratio of the policy
loss corrects for the updates since `old_logprobs`, which the trainer computes itself; these
weights correct for the difference between trainer and rollout at the same weights.
"""

import torch


@torch.no_grad()
def truncated_weights(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    cap: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weigh every token by how likely the trainer was to sample it, against the rollout.

    w = min(exp(old_logprobs - rollout_logprobs), cap), a constant factor of the policy loss:

        token_loss, sums = policy_loss(logprobs, old_logprobs, advantages, mask)
        weights, weight_sums = truncated_weights(old_logprobs, rollout_logprobs, mask, cap=2.0)
        return token_loss * weights, sums | weight_sums

    Args:
        old_logprobs: [..., T] under the trainer, before the first update on these samples.
        rollout_logprobs: [..., T] under the engine that sampled.
        mask: [..., T], nonzero on tokens that count; elsewhere the inputs may hold anything.
        cap: largest weight, at least 1; bounds the variance at the price of a bias.

    Returns:
        Weights [..., T], 0 outside the mask, and sums over the mask (scalars), to be added over
        micro-batches and ranks and then divided by the number of tokens:

        * "rollout_weight": sum of w;
        * "rollout_weight_truncated": number of tokens whose weight is the cap.

    Raises:
        ValueError: `cap` is less than 1, so that equal policies would get another weight than 1.
    """
    if cap < 1:
        raise ValueError(f"cap={cap} of the importance weights must be at least 1")
    counts = mask != 0
    ratio = torch.where(counts, (old_logprobs - rollout_logprobs).exp(), 0.0)
    weights = ratio.clamp(max=cap)
    return weights, {
        "rollout_weight": weights.sum(),
        "rollout_weight_truncated": (ratio > cap).sum(),
    }
