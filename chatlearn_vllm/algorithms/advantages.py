"""How good was a response, or a token of it, without a value model to compare with?

* GRPO: Z. Shao et al. 2024, "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open
  Language Models", arXiv:2402.03300, section 4.1. Without the standard deviation it is Dr. GRPO:
  Z. Liu et al. 2025, "Understanding R1-Zero-Like Training: A Critical Perspective",
  arXiv:2503.20783.
* RLOO: A. Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for
  Learning from Human Feedback in LLMs", arXiv:2402.14740, the leave-one-out estimator.
* REINFORCE++: J. Hu et al. 2025, "REINFORCE++: Stabilizing Critic-Free Policy Optimization with
  Global Advantage Normalization", arXiv:2501.03262.
"""

import torch

from chatlearn_vllm.algorithms.gae import gae
from chatlearn_vllm.algorithms.groups import group_mean, index_groups


def group_advantages(
    rewards: torch.Tensor, groups: torch.Tensor, *, normalize_std: bool = True, eps: float = 1e-6
) -> torch.Tensor:
    """Compare every response with its whole group (GRPO).

    A_i = (r_i - mean(r)) / (std(r) + eps) over the rows of i's group, with the population
    standard deviation (divided by the group's size G, not G - 1). A group whose rewards are all
    equal, so also a group of one, gets 0.

    Args:
        rewards: [B] float.
        groups: [B] int; rows with equal values form a group, in any order.
        normalize_std: False leaves the division out (Dr. GRPO).
        eps: added to the standard deviation, in units of the reward.

    Returns:
        [B] float32 on the device of `rewards`.

    Raises:
        ValueError: the shapes are not both [B].
    """
    row_group, num_groups = index_groups(rewards, groups)
    # float64: equal rewards then have an advantage of 0 up to 1e-10, whatever their value
    values = rewards.double()
    advantages = values - group_mean(values, row_group, num_groups)
    if normalize_std:
        variance = group_mean(advantages.square(), row_group, num_groups)
        advantages = advantages / (variance.sqrt() + eps)
    return advantages.float()


def rloo_advantages(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Compare every response with the others of its group (RLOO).

    A_i = r_i - mean of r_j over the other rows j of i's group, which equals
    G / (G - 1) * (r_i - mean(r)) for a group of G.

    A group of one gets 0: without another response there is no baseline, and the bare reward
    would weigh that row by the scale of the rewards instead of by how good the response is.

    Args:
        rewards: [B] float. The paper subtracts the KL penalty here first, of whole responses:
            `token_rewards(...).sum(1)` of gae.py.
        groups: [B] int; rows with equal values form a group, in any order.

    Returns:
        [B] float32 on the device of `rewards`.

    Raises:
        ValueError: the shapes are not both [B].
    """
    row_group, num_groups = index_groups(rewards, groups)
    values = rewards.double()
    sizes = row_group.bincount()[row_group]
    centred = values - group_mean(values, row_group, num_groups)
    return (centred * sizes / (sizes - 1).clamp(min=1)).float()


def discounted_returns(
    rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float = 1.0
) -> torch.Tensor:
    """Sum up what every token of a response still earns.

    G_t = sum over l >= 0 of gamma^l r_{t+l}, to the last token of the response.

    REINFORCE++ takes them for rewards that contain the KL penalty and normalises them over the
    global batch, tokens of all prompts and ranks together:

        rewards = token_rewards(scores, kl_penalty(logprobs, ref_logprobs, "k1"), mask, kl_coef=c)
        returns = discounted_returns(rewards, mask)
        advantages = whiten(returns, mask, moments(returns, mask))

    Its variant with baseline starts from `group_advantages(..., normalize_std=False)` as scores.

    Args:
        rewards: [B, T] float.
        mask: [B, T], nonzero on tokens that count; elsewhere `rewards` may hold anything, and
            time does not pass there.
        gamma: discount per token, in [0, 1].

    Returns:
        [B, T] float32, 0 outside the mask, detached.
    """
    values = torch.zeros_like(rewards)
    _, returns = gae(rewards, values, mask, gamma=gamma, lam=1.0)
    return returns
