"""Which responses teach nothing, and what does it cost to be too long?

Q. Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
arXiv:2503.14476. Its other two parts are `cliprange_high` of policy.py (clip-higher) and
"token-mean" of aggregation.py (token-level loss).
"""

import torch

from chatlearn_vllm.algorithms.groups import group_range, index_groups


def overlong_penalty(lengths: torch.Tensor, *, max_length: int, buffer: int) -> torch.Tensor:
    """Punish responses that come close to the limit (soft overlong punishment, equation 13).

    0 up to max_length - buffer tokens, then falling by 1 / buffer with every token, -1 from
    max_length on. It is added to the reward.

    Args:
        lengths: [B] number of tokens of every response.
        max_length: number of tokens at which the penalty is complete.
        buffer: number of tokens over which it grows, from 1 to `max_length`.

    Returns:
        [B] float32 in [-1, 0].

    Raises:
        ValueError: `buffer` is not in [1, max_length].
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer={buffer} must be in [1, max_length={max_length}]")
    return ((max_length - buffer - lengths).float() / buffer).clamp(-1.0, 0.0)


def informative_groups(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Find the rows whose group has more than one reward (dynamic sampling, equation 11).

    All advantages of the others are 0. They would only make the gradient of their batch smaller,
    so the paper goes on sampling prompts until it has enough informative groups.

    Args:
        rewards: [B]. The paper compares only whether answers are right: pass 1 and 0 for that,
            so that a group of right answers is not kept for a penalty on some of them.
        groups: [B] int; rows with equal values form a group, in any order.

    Returns:
        [B] bool, the same for all rows of a group; False for a group of one.

    Raises:
        ValueError: the shapes are not both [B].
    """
    row_group, num_groups = index_groups(rewards, groups)
    lowest, highest = group_range(rewards.double(), row_group, num_groups)
    return (highest > lowest)[row_group]
