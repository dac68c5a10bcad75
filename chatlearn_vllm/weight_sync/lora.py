"""How is a low-rank change added to a weight, or to any rectangle of it?

    W' = W + scale * B @ A        A [r, in], B [out, r], W [out, in]

Element (i, j) of the change needs row i of B and column j of A only, so a rectangle of W' is
computed from the same rectangle of W, some rows of B and some columns of A. W itself is never
written: each merge starts from it, and nothing drifts however many follow.
"""

from collections.abc import Iterable, Mapping

import torch

from chatlearn_vllm.layouts import LowRank
from chatlearn_vllm.layouts.blocks import whole
from chatlearn_vllm.weight_sync.pieces import view_of
from chatlearn_vllm.weight_sync.planner import Copy, in_order

MERGE_BYTES = 64 * 2**20
"""Bound of the float32 temporary of a merge."""


@torch.no_grad()
def merge_into(
    target: torch.Tensor,
    B_rows: torch.Tensor,
    A_cols: torch.Tensor,
    scale: float,
    *,
    max_bytes: int = MERGE_BYTES,
) -> None:
    """Add `scale * B_rows @ A_cols` to a rectangle that holds the unchanged weight.

    Computed in float32 and rounded once. The temporary holds one row of the target at least, and
    no more than `max_bytes` otherwise.

    Args:
        target: [rows, cols], changed in place; may be a view with any strides.
        B_rows: [rows, r], the target's rows of B.
        A_cols: [r, cols], the target's columns of A.
        scale: alpha / r.
        max_bytes: bound of the float32 temporary.
    """
    num_rows, num_cols = target.shape
    A = A_cols.float()
    rows_per_chunk = max(1, max_bytes // (4 * num_cols))
    for start in range(0, num_rows, rows_per_chunk):
        rows = slice(start, start + rows_per_chunk)
        changed = target[rows].float()  # float32: the target itself
        changed.addmm_(B_rows[rows].float(), A, alpha=scale)
        target[rows].copy_(changed)


def merged(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """A copy of `weight` [out, in] with the change of A [r, in] and B [out, r] added."""
    copy = weight.detach().clone()
    merge_into(copy, B, A, scale)
    return copy


def adapter_names(param: str) -> tuple[str, str]:
    """Names under which a training rank shows A and B of a parameter."""
    return f"{param}.lora_a", f"{param}.lora_b"


_SCRATCH = "scratch: "


def is_scratch(name: str) -> bool:
    """Whether a target is no parameter, but A or B, kept until they are merged."""
    return name.startswith(_SCRATCH)


def with_adapters(
    copies: Iterable[Copy], low_rank: LowRank | None, shapes: Mapping[str, tuple[int, ...]]
) -> list[Copy]:
    """Add to copies of base weights what the reader needs to merge.

    Args:
        copies: from one training rank.
        low_rank: which parameters have adapters; None for none.
        shapes: of that rank's parameters, by name.

    Returns:
        The copies, and one of the whole A and B of each adapted parameter that is read, `in_order`.
    """
    if low_rank is None:
        return in_order(copies)
    copies = list(copies)
    adapted = {(c.source_rank, c.source_param) for c in copies if low_rank.adapts(c.source_param)}
    for rank, param in adapted:
        rows, columns = shapes[param]
        forms = whole((low_rank.r, columns)), whole((rows, low_rank.r))
        for name, form in zip(adapter_names(param), forms, strict=True):
            copies.append(Copy(rank, name, form, _scratch_name(rank, name), form))
    return in_order(copies)


def merged_into(copies: Iterable[Copy]) -> dict[str, str]:
    """By target name of A or B, the parameter that they are merged into; it decides their dtype.

    Args:
        copies: made by `with_adapters`, in that order, so that both sides find the same one.
    """
    found: dict[str, str] = {}
    for copy in copies:
        for name in adapter_names(copy.source_param):
            found.setdefault(_scratch_name(copy.source_rank, name), copy.target_param)
    return found


def merge_copies(
    copies: Iterable[Copy], low_rank: LowRank, targets: Mapping[str, torch.Tensor]
) -> None:
    """Merge adapters into what copies of base weights have just written.

    Args:
        copies: made by `with_adapters`, done and not merged yet.
        low_rank: which parameters have adapters.
        targets: the engine's parameters, and A and B under their scratch names.
    """
    for copy in copies:
        if low_rank.adapts(copy.source_param):
            A, B = (
                targets[_scratch_name(copy.source_rank, name)]
                for name in adapter_names(copy.source_param)
            )
            rows, columns = (slice(*bounds) for bounds in copy.source)
            target = view_of(targets[copy.target_param], copy.target, 2)
            merge_into(target, B[rows], A[:, columns], low_rank.scale)


def _scratch_name(rank: int, name: str) -> str:
    return f"{_SCRATCH}{name} of training rank {rank}"
