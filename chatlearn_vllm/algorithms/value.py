"""How does a value model learn to predict returns, and how well does it?

The loss keeps predictions near those of the last episode, as the policy loss does with ratios:
OpenAI baselines 2017, ppo2; written out in S. Huang et al. 2022, "The 37 Implementation Details of
Proximal Policy Optimization", detail 9,
https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/.

Tensors [..., T] and their mask are over predictions: with a batch of `data/batch.py`, T = S - 1
and `mask = loss_mask[:, 1:]`.
"""

from collections.abc import Mapping

import torch


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    cliprange: float | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the clipped squared error of every token, and sums that describe the fit.

    loss = 1/2 max((V - R)^2, (clamp(V, V_old - cliprange, V_old + cliprange) - R)^2)

    so that a value which has come nearer to its return by more than `cliprange` has no gradient.

    Args:
        values: [..., T] under the weights being trained; the loss is differentiable in them.
        old_values: [..., T] under the weights before the first update on these samples.
        returns: [..., T] as `gae` returns them.
        mask: [..., T], nonzero on tokens that count; elsewhere the inputs may hold anything.
        cliprange: in units of the value; None means that nothing is clipped.

    Returns:
        The loss [..., T], 0 outside the mask, and sums over the mask (detached float64 scalars),
        to be added over micro-batches and ranks and then divided by "tokens":

        * "tokens": number of tokens in the mask;
        * "clipped": number of tokens whose gradient clipping removed;
        * "squared_error": sum of (V - R)^2;
        * "returns", "returns_squared", "values", "values_squared": sums of R, R^2, V and V^2.
    """
    counts = mask != 0
    values, old_values, returns = (
        torch.where(counts, entries, 0.0) for entries in (values, old_values, returns)
    )
    squared_error = (values - returns).square()
    largest = squared_error
    if cliprange is not None:
        nearby = old_values + (values - old_values).clamp(-cliprange, cliprange)
        largest = torch.maximum(squared_error, (nearby - returns).square())

    with torch.no_grad():
        sums = {
            "tokens": counts.double().sum(),
            "clipped": (largest > squared_error).double().sum(),
            "squared_error": squared_error.double().sum(),
            "returns": returns.double().sum(),
            "returns_squared": returns.double().square().sum(),
            "values": values.double().sum(),
            "values_squared": values.double().square().sum(),
        }
    return largest / 2, sums


def explained_variance(sums: Mapping[str, float]) -> float:
    """Share of the returns' variance that the values predict: 1 - Var(R - V) / Var(R).

    1 is a perfect prediction, 0 as good as the mean of the returns, below 0 worse than that.

    Args:
        sums: of `value_loss`, added over all shards; all of them may be divided by one number,
            such as the number of tokens.

    Returns:
        0.0 where returns vary by less than a thousandth of their size (also without tokens):
        nothing is there to be explained, and sums in float32 could not tell.
    """
    num_tokens = float(sums["tokens"])
    if num_tokens == 0:
        return 0.0
    mean_return = float(sums["returns"]) / num_tokens
    mean_square = float(sums["returns_squared"]) / num_tokens
    variance = mean_square - mean_return**2
    if variance <= 1e-6 * mean_square:
        return 0.0
    mean_error = mean_return - float(sums["values"]) / num_tokens
    error_variance = float(sums["squared_error"]) / num_tokens - mean_error**2
    return 1.0 - error_variance / variance
