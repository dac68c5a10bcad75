"""Which rows of a batch does each replica and each data parallel rank get?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def split_evenly(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """Cut items into `parts` consecutive pieces; sizes differ by at most one, larger ones first."""
    small, num_larger = divmod(len(items), parts)
    bounds = [part * small + min(part, num_larger) for part in range(parts + 1)]
    return [items[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]


def train_rows(
    num_rows: int, global_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> list[int]:
    """Rows of an episode that one data parallel rank trains on, optimizer step by optimizer step.

    Step k works on rows [k * G, (k + 1) * G), G = `global_batch_size`; rank r of D works on
    rows [k * G + r * G/D, k * G + (r + 1) * G/D). So each step sees the same rows whatever D is.
    A last step with fewer rows is spread likewise.

    Raises:
        ValueError: D does not divide the rows of some step.
    """
    rows: list[int] = []
    for step_start in range(0, num_rows, global_batch_size):
        num_step_rows = min(global_batch_size, num_rows - step_start)
        if num_step_rows % data_parallel_size:
            raise ValueError(
                f"an optimizer step on {num_step_rows} of the episode's {num_rows} samples cannot "
                f"be spread over {data_parallel_size} data parallel ranks; change "
                f"runtime.train_global_batch_size={global_batch_size} or "
                "runtime.sample_per_episode"
            )
        num_rank_rows = num_step_rows // data_parallel_size
        first = step_start + data_parallel_rank * num_rank_rows
        rows += range(first, first + num_rank_rows)
    return rows
