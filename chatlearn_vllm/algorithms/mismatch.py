"""How far are the rollout's log-probabilities from the trainer's, for the same weights and tokens?

Both sides compute log p of the same sampled tokens with different kernels, so they differ by
rounding. More than that means that the samples came from other weights, or from another
distribution, than the trainer believes.

With d = log p_trainer - log p_rollout at a token that the rollout sampled:

    logprob_abs_diff_mean  mean of |d|
    logprob_abs_diff_max   largest |d|
    rollout_kl             mean of exp(d) - 1 - d, the k3 estimate of KL(rollout || trainer), in
                           nats (J. Schulman, "Approximating KL Divergence", 2020,
                           http://joschu.net/blog/kl-approx.html)
    rollout_clip_fraction  share of tokens whose ratio exp(d) lies outside
                           [1 - cliprange, 1 + cliprange], the clip range of the policy loss
                           (J. Schulman et al. 2017, arXiv:1707.06347, equation 7)
"""

import torch

from chatlearn_vllm.algorithms.kl import kl_penalty


def mismatch_sums(
    rollout_logprobs: torch.Tensor,
    trainer_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    cliprange: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare one shard; sums and not means, so that shards of unequal length add up exactly.

    Args:
        rollout_logprobs: [B, T] under the engine that sampled the tokens.
        trainer_logprobs: [B, T] under the weights that are about to be trained.
        mask: [B, T], nonzero on sampled tokens; elsewhere the inputs may hold anything.
        cliprange: distance from 1 at which the policy loss clips the ratio.

    Returns:
        * [4] float64: number of tokens, sums of |d|, of the k3 estimate, and number of tokens
          outside the clip range; to be added over shards;
        * the largest |d|, a float64 scalar, 0 without tokens; to be maximised over shards.
    """
    counts = mask != 0
    # float64: exp() of a large difference stays finite, sums of many small ones stay exact.
    rollout, trainer = rollout_logprobs[counts].double(), trainer_logprobs[counts].double()
    difference = trainer - rollout
    kl = kl_penalty(rollout, trainer, "k3")
    is_clipped = (difference.exp() - 1).abs() > cliprange
    sums = torch.stack(
        [counts.sum().double(), difference.abs().sum(), kl.sum(), is_clipped.sum().double()]
    )
    return sums, torch.cat([difference.abs(), difference.new_zeros(1)]).max()


def mismatch_metrics(sums: list[float], largest: float) -> dict[str, float]:
    """The four metrics of all shards.

    Args:
        sums: of `mismatch_sums`, added over the shards.
        largest: of `mismatch_sums`, the maximum over the shards.
    """
    num_tokens = max(1.0, sums[0])
    return {
        "logprob_abs_diff_mean": sums[1] / num_tokens,
        "logprob_abs_diff_max": largest,
        "rollout_kl": sums[2] / num_tokens,
        "rollout_clip_fraction": sums[3] / num_tokens,
    }


def count_not_finite(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Number of masked tokens per row whose log-probability is NaN or infinite.

    Args:
        logprobs: [B, T].
        mask: [B, T], nonzero on tokens that count.

    Returns:
        [B] int64.
    """
    return (~logprobs.isfinite() & (mask != 0)).sum(dim=1)
