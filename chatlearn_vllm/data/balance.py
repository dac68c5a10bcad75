"""Which rows does each data parallel rank train on, so that all have about as many tokens?"""

from collections.abc import Sequence

import torch

from chatlearn_vllm.data.batch import Batch, batch_size

MIN_ROW_LENGTH = 2
"""Tokens of a row in which nothing counts: one token has no prediction."""


def row_lengths(batch: Batch) -> list[int]:
    """Tokens of each row that a model has to see: up to the last that `loss_mask` marks.

    Later ones can have no effect, attention being causal. At least 2; all positions where the
    batch has no `loss_mask`.
    """
    width = batch["all_tokens"].size(1)
    if "loss_mask" not in batch:
        return [width] * batch_size(batch)
    places = torch.arange(1, width + 1)
    ends = (batch["loss_mask"].cpu() != 0) * places  # [B, S], 0 where nothing is marked
    return ends.amax(1).clamp(min=MIN_ROW_LENGTH).tolist()


def balanced(lengths: Sequence[int], num_ranks: int, rows_per_step: int) -> list[list[int]]:
    """Spread the rows of each optimizer step over the data parallel ranks by their lengths.

    Step k works on rows [k * G, (k + 1) * G), G = `rows_per_step`, whatever their lengths: these
    only decide which of its rows a rank gets. A last step with fewer rows is spread likewise.

    Every rank gets equally many rows of a step, of about the same lengths: the longest D rows go
    to one rank each, the longest of them to the rank with the fewest tokens so far; then the next
    D, and so on. So within a step the tokens of two ranks differ by no more than the longest and
    the shortest row of some such round do.

    Args:
        lengths: tokens of each row, in the order of the batch; see `row_lengths`.
        num_ranks: D.
        rows_per_step: rows of an optimizer step over all ranks.

    Returns:
        The rows of each rank, G/D of them for each step in turn, ascending within a step.

    Raises:
        ValueError: D does not divide the rows of some step.
    """
    rows_of_rank: list[list[int]] = [[] for _ in range(num_ranks)]
    for start in range(0, len(lengths), rows_per_step):
        rows = range(start, min(start + rows_per_step, len(lengths)))
        if len(rows) % num_ranks:
            raise ValueError(
                f"an optimizer step on {len(rows)} of {len(lengths)} rows "
                f"(rows_per_step={rows_per_step}) cannot be spread over num_ranks={num_ranks}: "
                "each rank needs equally many"
            )
        for mine, of_step in zip(rows_of_rank, _spread(rows, lengths, num_ranks), strict=True):
            mine += sorted(of_step)
    return rows_of_rank


def _spread(rows: Sequence[int], lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """The rows of one step by rank; rounds of one row for each rank, longest first."""
    longest_first = sorted(rows, key=lambda row: -lengths[row])
    parts: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for start in range(0, len(longest_first), num_ranks):
        fewest_first = sorted(range(num_ranks), key=lambda rank: totals[rank])
        for rank, row in zip(fewest_first, longest_first[start : start + num_ranks], strict=True):
            parts[rank].append(row)
            totals[rank] += lengths[row]
    return parts
