"""How do rewards and predicted values become an advantage of every token?

* Generalized advantage estimation: J. Schulman et al. 2015, "High-Dimensional Continuous Control
  Using Generalized Advantage Estimation", arXiv:1506.02438, equation 16.
* The reward of a token: D. Ziegler et al. 2019, "Fine-Tuning Language Models from Human
  Preferences", arXiv:1909.08593, equation 2; L. Ouyang et al. 2022, "Training language models to
  follow instructions with human feedback", arXiv:2203.02155, equation 2.

Tensors [B, T] and their mask are over predictions: with a batch of `data/batch.py`, T = S - 1 and
`mask = loss_mask[:, 1:]`. Results are targets of training, so none is differentiable.
"""

import torch


@torch.no_grad()
def token_rewards(
    rewards: torch.Tensor,
    kl: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl_coef: float,
    clip: float | None = None,
) -> torch.Tensor:
    """Spread the reward of a response over its tokens.

    r_t = -kl_coef * kl_t, and on the last token of the response its score in addition.

    Args:
        rewards: [B] score of the whole response; that of a row without tokens is lost.
        kl: [B, T] in nats, as `kl_penalty` estimates it; the papers take k1.
        mask: [B, T], nonzero on tokens that count; elsewhere `kl` may hold anything.
        kl_coef: reward that one nat costs.
        clip: scores are clipped to [-clip, clip], the KL is not; None leaves them as they are.

    Returns:
        [B, T] float32, 0 outside the mask.

    Raises:
        ValueError: `rewards` is not [B].
    """
    if rewards.shape != kl.shape[:1]:
        raise ValueError(
            f"rewards must be [B] where kl is [B, T], got {list(rewards.shape)} and "
            f"{list(kl.shape)}"
        )
    counts = mask != 0
    scores = rewards.float()
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    num_left = counts.flip(-1).cumsum(-1).flip(-1)
    is_last = counts & (num_left == 1)
    penalty = torch.where(counts, kl_coef * kl.float(), 0.0)
    return torch.where(is_last, scores.unsqueeze(-1), 0.0) - penalty


@torch.no_grad()
def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate how much better than expected every token turned out.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lam * A_{t+1}
        R_t     = A_t + V_t

    A response ends with its last token: V and A after it are 0. V_t is the value before token t
    is chosen. Tokens outside the mask are not the policy's: t + 1 is the next token inside it.

    Args:
        rewards: [B, T] float.
        values: [B, T] float, predicted by the value model that is about to be trained.
        mask: [B, T], nonzero on tokens that count; elsewhere the inputs may hold anything.
        gamma: discount per token, in [0, 1].
        lam: in [0, 1]; 0 trusts the values, 1 the rewards.

    Returns:
        Advantages A and returns R, both [B, T] float32, 0 outside the mask.
    """
    counts = mask != 0
    # float64: errors of rounding would add up over thousands of tokens.
    rewards = rewards.double()
    values = torch.where(counts, values.double(), 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(counts[:, t], advantage, 0.0)
        next_value = torch.where(counts[:, t], values[:, t], next_value)
        next_advantage = torch.where(counts[:, t], advantage, next_advantage)
    return advantages.float(), (advantages + values).float()


@torch.no_grad()
def moments(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What `whiten` must know of all values, in a form that adds up over shards.

    Args:
        values: [B, T] float.
        mask: [B, T], nonzero on tokens that count; elsewhere `values` may hold anything.

    Returns:
        [3] float64: number of tokens, sum of their values, sum of the squares; to be added over
        micro-batches and data parallel ranks.
    """
    counted = values[mask != 0].double()
    return torch.stack([counted.new_tensor(len(counted)), counted.sum(), counted.square().sum()])


@torch.no_grad()
def whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    sums: torch.Tensor,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> torch.Tensor:
    """Shift and scale values to mean 0 and variance 1 over all tokens that `sums` saw.

    (x - mean) / sqrt(variance + eps), with the population variance (divided by the number of
    tokens n, not n - 1). Equal values all become 0.

    Args:
        values: [B, T] float.
        mask: [B, T], nonzero on tokens that count; elsewhere `values` may hold anything.
        sums: [3] of `moments`, added over everything that shares mean and variance.
        shift_mean: False adds the mean back, so that only the spread changes.
        eps: added to the variance, in squared units of the values.

    Returns:
        [B, T] float32, 0 outside the mask.
    """
    num_tokens, total, total_of_squares = sums.to(values.device).double()
    mean = total / num_tokens
    # Rounding can make the difference of the two a little negative.
    variance = (total_of_squares / num_tokens - mean.square()).clamp(min=0)
    whitened = (values.double() - mean) / (variance + eps).sqrt()
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask != 0, whitened, 0.0).float()
