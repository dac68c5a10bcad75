"""Is what a model returned about samples what its role says?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from chatlearn_vllm.data.batch import Batch, batch_size, concat

MAX_REPORTED_ROWS = 5


def joined(name: str, method: str, results: Sequence[Any], sizes: Sequence[int]) -> Batch:
    """Put what a model returned for the parts of a batch below each other.

    Args:
        name: of the model in the yaml.
        method: that was called.
        results: of each part.
        sizes: rows of each part.

    Raises:
        ValueError: a result is no batch or has not one entry for each row of its part, or those of
            two parts do not fit together.
    """
    for result, size in zip(results, sizes, strict=True):
        _require_rows(f"models.{name}: {method}()", result, size)
    try:
        return concat(results)
    except ValueError as error:
        raise ValueError(f"models.{name}: {method}() on parts of a batch: {error}") from None


def required_column(
    name: str, scores: Batch, key: str, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """A column that a role has to return, as float32.

    Args:
        name: of the model in the yaml.
        scores: what its `forward_step` returned.
        key: of the column.
        mask: [B, T], nonzero on predictions that count, where the column has one number for each;
            None where it has one number per row, which may then be a list.

    Raises:
        ValueError: the column is missing, has another shape, or holds NaN or infinity where it
            counts.
    """
    shape = [batch_size(scores)] if mask is None else list(mask.shape)
    rule = f"models.{name}: forward_step() must return {key!r}, finite numbers {shape}"
    if key not in scores:
        raise ValueError(f"{rule}; it returned {', '.join(map(repr, scores))}")
    try:
        column = torch.as_tensor(scores[key]).float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{rule}; torch says of what it returned: {error}") from None
    if list(column.shape) != shape:
        raise ValueError(f"{rule}; it returned {list(column.shape)}")
    is_bad = ~column.isfinite()
    rows = (is_bad if mask is None else (is_bad & (mask != 0)).any(1)).nonzero().flatten().tolist()
    if rows:
        shown = ", ".join(map(str, rows[:MAX_REPORTED_ROWS]))
        more = ", ..." if len(rows) > MAX_REPORTED_ROWS else ""
        raise ValueError(f"{rule}; of {len(rows)} rows it is NaN or infinite: {shown}{more}")
    return column


def _require_rows(call: str, result: Any, num_rows: int) -> None:
    """Check that a call returned a batch with one entry for each row that it was given."""
    if not isinstance(result, Mapping) or not result:
        what = "nothing in its dict" if isinstance(result, Mapping) else type(result).__name__
        raise ValueError(
            f"{call} returned {what}; it returns a dict of columns, tensors or lists with one "
            f"entry for each of the {num_rows} samples"
        )
    for key, column in result.items():
        is_scalar = not hasattr(column, "__len__") or getattr(column, "ndim", 1) == 0
        if is_scalar or len(column) != num_rows:
            size = "a single value" if is_scalar else f"{len(column)} rows"
            raise ValueError(f"{call} returned {size} for {num_rows} samples as {key!r}")


def rollout_logprobs(name: str, batch: Batch, needed_by: str) -> torch.Tensor:
    """[B, S-1] log-probabilities that a rollout came with.

    Args:
        name: of the policy in the yaml.
        batch: what its `decode_internal` made.
        needed_by: what cannot do without.

    Raises:
        ValueError: there are none.
    """
    if "logprobs" not in batch:
        raise ValueError(
            f"models.{name}: decode_internal() must return 'logprobs', which {needed_by} needs; "
            "keep what super().decode_internal() returns"
        )
    return batch["logprobs"]
