"""What are the log-probability of each token and the entropy, when each rank has some logits?

megatron-core's own cross entropies do not fit: the plain one overwrites fp32 logits, both count
the padded vocabulary columns, the fused one rounds the gradient to bf16, none gives the entropy.
"""

from typing import Any

import torch
import torch.distributed as dist

_MAX_CHUNK_ELEMENTS = 2**26
"""Bound of rows x columns of one float32 temporary: 256 MiB."""


def vocab_parallel_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of softmax(logits / temperature), differentiable.

    Collective over `group`. The softmax is recomputed in backward, a few rows at a time, so
    nothing of the size of the logits is kept but the logits themselves.

    Args:
        logits: [..., V / tp] this rank's consecutive columns, padded vocabulary included.
        targets: [...] int64 token ids in [0, vocab_size), the same on all ranks of the group.
        vocab_size: columns of the whole vocabulary that hold a token; later ones do not count.
        temperature: divides the logits; > 0.
        group: the tensor parallel group; None if this rank has all columns.
        chunk_rows: rows handled at a time; None for as many as take 256 MiB.

    Returns:
        (logprobs [...], entropies [...]), float32, in nats, the same on all ranks of the group.
    """
    columns = logits.size(-1)
    if chunk_rows is None:
        chunk_rows = max(1, _MAX_CHUNK_ELEMENTS // columns)
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    logprobs, entropies = _VocabParallelLogprobs.apply(
        logits.reshape(-1, columns), targets.reshape(-1), vocab_size, temperature, group, chunk_rows
    )
    return logprobs.view(targets.shape), entropies.view(targets.shape)


class _VocabParallelLogprobs(torch.autograd.Function):
    """(logits [n, v], targets [n]) -> logprobs [n], entropies [n]."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        vocab_size: int,
        temperature: float,
        group: dist.ProcessGroup | None,
        chunk_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows, columns = logits.shape
        first = 0 if group is None else dist.get_rank(group) * columns
        ctx.settings = (first, vocab_size, temperature, group, chunk_rows)
        logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
        entropies = torch.empty_like(logprobs)
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, start + chunk_rows)
            z, exp_z, sums = _shifted(logits[rows], first, vocab_size, temperature, group)
            local = targets[rows] - first
            is_mine = (local >= 0) & (local < columns)
            picked = z.gather(1, local.clamp(0, columns - 1).unsqueeze(1)).squeeze(1)
            picked = torch.where(is_mine, picked, 0.0)
            # sum_j exp(z_j) z_j; a masked column has exp(z) = 0 and z = -inf
            weighted = (exp_z * z.masked_fill(exp_z == 0, 0.0)).sum(1)
            both = torch.stack([picked, weighted])
            if group is not None:
                dist.all_reduce(both, group=group)
            log_sum = sums.log()
            logprobs[rows] = both[0] - log_sum
            entropies[rows] = log_sum - both[1] / sums
        ctx.save_for_backward(logits, targets, entropies)
        return logprobs, entropies

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        logits, targets, entropies = ctx.saved_tensors
        first, vocab_size, temperature, group, chunk_rows = ctx.settings
        columns = logits.size(1)
        grad = torch.empty_like(logits)
        for start in range(0, logits.size(0), chunk_rows):
            rows = slice(start, start + chunk_rows)
            z, exp_z, sums = _shifted(logits[rows], first, vocab_size, temperature, group)
            p = exp_z / sums.unsqueeze(1)
            # d logprob / d z_j = [j is the target] - p_j
            g = -grad_logprobs[rows].unsqueeze(1) * p
            local = targets[rows] - first
            mine = ((local >= 0) & (local < columns)).nonzero().squeeze(1)
            g[mine, local[mine]] += grad_logprobs[rows][mine]
            # d entropy / d z_j = -p_j (log p_j + entropy)
            log_p = (z - sums.log().unsqueeze(1)).masked_fill(p == 0, 0.0)
            g -= grad_entropies[rows].unsqueeze(1) * p * (log_p + entropies[rows].unsqueeze(1))
            grad[rows] = g / temperature
        return grad, None, None, None, None, None


def _shifted(
    logits: torch.Tensor,
    first: int,
    vocab_size: int,
    temperature: float,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z = logits / temperature - max [n, v], exp(z) [n, v], sum of exp(z) over all ranks [n]."""
    z = logits.float() / temperature  # a new tensor, also for fp32 logits
    if first + z.size(1) > vocab_size:
        z[:, max(0, vocab_size - first) :] = float("-inf")
    maximum = z.max(1, keepdim=True).values
    if group is not None:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    z = z - maximum
    exp_z = z.exp()
    sums = exp_z.sum(1)
    if group is not None:
        dist.all_reduce(sums, group=group)
    return z, exp_z, sums
