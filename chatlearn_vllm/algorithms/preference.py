"""How does a policy learn that one response is better than another to the same prompt?

* DPO: R. Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a
  Reward Model", arXiv:2305.18290, equation 7.
* Label smoothing: E. Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO",
  https://ericmitchell.ai/cdpo.pdf (conservative DPO).
* IPO: M. G. Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human
  Preferences", arXiv:2310.12036, equation 17.

Online DPO takes the pairs from the policy's own responses, ranked by their rewards: S. Guo et al.
2024, "Direct Language Model Alignment from Online AI Feedback", arXiv:2402.04792.
"""

import torch
import torch.nn.functional as F

from chatlearn_vllm.algorithms.groups import group_range, index_groups

PREFERENCE_LOSSES = ("dpo", "ipo")


def best_and_worst(
    rewards: torch.Tensor, groups: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pair the highest and the lowest rewarded response of every group.

    A group whose rewards are all equal, so also a group of one, gives no pair.

    Args:
        rewards: [B] float.
        groups: [B] int; rows with equal values form a group, in any order.
        generator: draws which of several equally rewarded rows is taken; None takes the first.
            Rows that are ordered by length or by time would need it.

    Returns:
        For P pairs, in ascending order of the group's id: rows of the chosen responses [P] int64,
        of the rejected ones [P] int64, and the difference of their rewards [P] float32, above 0.

    Raises:
        ValueError: the shapes are not both [B].
    """
    row_group, num_groups = index_groups(rewards, groups)
    values = rewards.double()
    lowest, highest = group_range(values, row_group, num_groups)
    is_pair = highest > lowest
    order = _order(len(values), generator).to(values.device)
    chosen = _first_rows(values == highest[row_group], row_group, num_groups, order)
    rejected = _first_rows(values == lowest[row_group], row_group, num_groups, order)
    return chosen[is_pair], rejected[is_pair], (highest - lowest)[is_pair].float()


def sequence_logprobs(
    logprobs: torch.Tensor, mask: torch.Tensor, *, average: bool = False
) -> torch.Tensor:
    """Log-probability of every response, as `preference_loss` takes it.

    Args:
        logprobs: [..., T] over predictions; with a batch of `data/batch.py`, T = S - 1.
        mask: [..., T], nonzero on tokens that count; elsewhere `logprobs` may hold anything.
        average: divide by the number of tokens.

    Returns:
        [...] in nats, or nats per token; 0 for a row without tokens. Differentiable.
    """
    counts = mask != 0
    sums = torch.where(counts, logprobs, 0.0).sum(-1)
    return sums / counts.sum(-1).clamp(min=1) if average else sums


def preference_loss(
    chosen_logprobs: torch.Tensor,
    rejected_logprobs: torch.Tensor,
    ref_chosen_logprobs: torch.Tensor,
    ref_rejected_logprobs: torch.Tensor,
    *,
    beta: float,
    kind: str = "dpo",
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of every pair, and how well the policy tells the two apart.

    With h = log(p(chosen) / p_ref(chosen)) - log(p(rejected) / p_ref(rejected)):

        "dpo"  -(1 - label_smoothing) log sigmoid(beta h) - label_smoothing log sigmoid(-beta h)
        "ipo"  (h - 1 / (2 beta))^2, where the paper calls beta tau

    The log-probabilities are of whole responses, summed over their tokens, for both. h of IPO then
    has the same target 1 / (2 beta) for short and long responses; averages per token
    (`sequence_logprobs(average=True)`) are what its authors advised implementers of language
    models to take, with the target in nats per token.

    Args:
        chosen_logprobs: [P] of the better responses under the weights being trained; the loss is
            differentiable in them.
        rejected_logprobs: [P] of the worse ones, likewise.
        ref_chosen_logprobs: [P] of the better ones under the reference.
        ref_rejected_logprobs: [P] of the worse ones under the reference.
        beta: strength of the tie to the reference, above 0.
        kind: "dpo" or "ipo".
        label_smoothing: probability that a pair is the wrong way round, in [0, 0.5); of "dpo"
            only.

    Returns:
        The loss [P], and sums over the pairs (detached scalars), to be added over micro-batches
        and ranks and then divided by "pairs":

        * "pairs": number of pairs;
        * "chosen_reward", "rejected_reward": sums of beta log(p / p_ref), the reward that the
          policy stands for;
        * "reward_margin": their difference, the sum of beta h;
        * "accuracy": number of pairs with h > 0.

    Raises:
        ValueError: another `kind`, a `beta` that is not above 0, or a `label_smoothing` that is
            outside [0, 0.5) or not 0 with "ipo".
    """
    if kind not in PREFERENCE_LOSSES:
        raise ValueError(f"preference loss {kind!r} must be one of {', '.join(PREFERENCE_LOSSES)}")
    if beta <= 0:
        raise ValueError(f"beta={beta} must be larger than 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 0.5)")
    if kind == "ipo" and label_smoothing:
        raise ValueError(f"label_smoothing={label_smoothing} must be 0 with the loss 'ipo'")
    chosen = chosen_logprobs - ref_chosen_logprobs
    rejected = rejected_logprobs - ref_rejected_logprobs
    margin = chosen - rejected
    if kind == "ipo":
        loss = (margin - 1 / (2 * beta)).square()
    else:
        right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
        loss = -(1 - label_smoothing) * right - label_smoothing * wrong

    with torch.no_grad():
        sums = {
            "pairs": margin.new_tensor(margin.numel()),
            "chosen_reward": beta * chosen.sum(),
            "rejected_reward": beta * rejected.sum(),
            "reward_margin": beta * margin.sum(),
            "accuracy": (margin > 0).sum(),
        }
    return loss, sums


def _order(num_rows: int, generator: torch.Generator | None) -> torch.Tensor:
    if generator is None:
        return torch.arange(num_rows)
    return torch.randperm(num_rows, generator=generator, device=generator.device)


def _first_rows(
    is_candidate: torch.Tensor, row_group: torch.Tensor, num_groups: int, order: torch.Tensor
) -> torch.Tensor:
    """Every group's candidate that comes first in `order`, [num_groups] int64."""
    # Positions in `order`; a group without a candidate (its rewards are NaN) keeps 0.
    positions = is_candidate[order].nonzero().squeeze(1)
    first = positions.new_zeros(num_groups).scatter_reduce(
        0, row_group[order[positions]], positions, "amin", include_self=False
    )
    return order[first]
