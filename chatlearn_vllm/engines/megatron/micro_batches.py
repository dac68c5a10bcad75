"""How is a batch cut into equal micro-batches, no longer than their longest sequence?"""

from typing import Any

import torch

from chatlearn_vllm.data.batch import Batch, batch_size, split


def cut_micro_batches(batch: Batch, max_rows: int, *, multiple_of: int = 1) -> list[Batch]:
    """Cut a batch into micro-batches of one size, in order.

    Pipeline stages exchange tensors of one shape, so a smaller last micro-batch is not possible:
    the number of micro-batches is the least that divides the rows evenly.

    Args:
        batch: see data/batch.py.
        max_rows: most rows of a micro-batch.
        multiple_of: the number of micro-batches must be a multiple of this (the interleaved
            schedule asks for the pipeline parallel size).

    Raises:
        ValueError: no number of micro-batches fits.
    """
    rows = batch_size(batch)
    for count in range(-(-rows // max_rows), rows + 1):
        if rows % count == 0 and count % multiple_of == 0:
            return split(batch, count)
    raise ValueError(
        f"{rows} rows cannot be cut into equal micro-batches of at most {max_rows} rows whose "
        f"number is a multiple of {multiple_of} (virtual pipeline stages ask for that)"
    )


def trim(batches: list[Batch]) -> tuple[list[Batch], int]:
    """Cut padding that no row needs off the right of every tensor.

    What `loss_mask` marks decides: later positions can have no effect, attention being causal.
    Tensors of width S become S', those of width S - 1 become S' - 1.

    Returns:
        The trimmed batches and S', at least 2; the batches as they are where one of them has no
        `loss_mask`.
    """
    width = batches[0]["all_tokens"].size(1)
    length = width
    if all("loss_mask" in batch for batch in batches):
        used = torch.stack([batch["loss_mask"].any(0) for batch in batches]).any(0).nonzero()
        length = max(2, int(used[-1]) + 1) if len(used) else 2

    def cut(value: Any) -> Any:
        if not torch.is_tensor(value) or value.dim() < 2 or width - value.size(1) not in (0, 1):
            return value
        return value[:, : length - (width - value.size(1))]

    return [{key: cut(value) for key, value in batch.items()} for batch in batches], length


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch; lists stay as they are."""
    return {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
        for key, value in batch.items()
    }
