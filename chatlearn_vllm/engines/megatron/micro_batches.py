"""How is a batch cut into micro-batches, and how do the rows of one lie in the model's input?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from chatlearn_vllm.data.balance import row_lengths
from chatlearn_vllm.data.batch import Batch, select

# ---- which rows go together ---------------------------------------------------------------------


def equal_groups(num_rows: int, max_rows: int, *, multiple_of: int = 1) -> list[list[int]]:
    """Cut rows into groups of one size, in order.

    Pipeline stages exchange tensors of one shape, so a smaller last micro-batch is not possible:
    the number of micro-batches is the least that divides the rows evenly.

    Args:
        num_rows: rows of the batch.
        max_rows: most rows of a micro-batch.
        multiple_of: the number of micro-batches must be a multiple of this (the interleaved
            schedule asks for the pipeline parallel size).

    Raises:
        ValueError: no number of micro-batches fits.
    """
    for count in range(-(-num_rows // max_rows), num_rows + 1):
        if num_rows % count == 0 and count % multiple_of == 0:
            size = num_rows // count
            return [list(range(first, first + size)) for first in range(0, num_rows, size)]
    raise ValueError(
        f"{num_rows} rows cannot be cut into equal micro-batches of at most {max_rows} rows whose "
        f"number is a multiple of {multiple_of} (virtual pipeline stages ask for that)"
    )


def groups_by_tokens(
    lengths: Sequence[int], max_tokens: int, *, is_packed: bool, multiple_of: int = 1
) -> list[list[int]]:
    """Cut rows into few groups, none with more tokens than allowed.

    Each row joins the first group that has room for it, longest first. Packed, a group has the
    tokens of its rows, else as many as if all were as long as its longest: that is what they are
    padded to. The first group has the longest row, so memory that does not suffice shows at once.

    Args:
        lengths: tokens of each row, longest first, none above `max_tokens`.
        max_tokens: most tokens of a group.
        is_packed: whether the rows of a group lie behind each other, without padding.
        multiple_of: the number of groups becomes a multiple of this. Groups with the most rows
            are halved for that; where rows do not suffice, groups without any are added.
    """
    groups: list[list[int]] = []
    tokens: list[int] = []
    for row, length in enumerate(lengths):
        for index, group in enumerate(groups):
            added = length if is_packed else lengths[group[0]]
            if tokens[index] + added <= max_tokens:
                group.append(row)
                tokens[index] += added
                break
        else:
            groups.append([row])
            tokens.append(length)
    while len(groups) % multiple_of:
        largest = max(groups, key=len)
        half = -(-len(largest) // 2)
        groups.append(largest[half:])
        del largest[half:]
    return groups


def take(batch: Batch, rows: Sequence[int], together: int = 1) -> Batch:
    """The micro-batch of some rows; of none: copies of `together` rows in which no token counts."""
    if rows:
        return select(batch, rows)
    filler = select(batch, range(together))
    if "loss_mask" in filler:
        filler["loss_mask"] = torch.zeros_like(filler["loss_mask"])
    return filler


def put_back(
    parts: Sequence[torch.Tensor], groups: Sequence[Sequence[int]], width: int
) -> torch.Tensor:
    """Undo the cut: a result of each micro-batch [b, up to `width`] -> [B, width], 0 elsewhere."""
    result = parts[0].new_zeros(sum(len(rows) for rows in groups), width)
    for part, rows in zip(parts, groups, strict=True):
        result[list(rows), : part.size(1)] = part[: len(rows)]
    return result


# ---- how they lie in the model's input ----------------------------------------------------------


@dataclass(frozen=True)
class ModelInput:
    """One micro-batch as a model takes it."""

    batch: Batch
    """Its rows, cut to S', the longest of them (see `trim`)."""
    length: int
    """Tokens of the model's input [b, length], or [1, length] if packed."""
    row_lengths: list[int] | None = None
    """Packed: tokens of each row, which lie behind each other. None: one row below the other."""

    @classmethod
    def padded(cls, batch: Batch) -> "ModelInput":
        """The rows of a trimmed micro-batch below each other, all S' long."""
        return cls(batch, batch["all_tokens"].size(1))

    @classmethod
    def packed(cls, batch: Batch) -> "ModelInput":
        """The rows of a trimmed micro-batch behind each other, each as long as it is."""
        lengths = row_lengths(batch)
        return cls(batch, sum(lengths), lengths)

    def lengthened(self, length: int) -> "ModelInput":
        """The same with more padding at the end."""
        return replace(self, length=length)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the model's input."""
        return (1 if self.row_lengths else len(self.batch["all_tokens"])), self.length

    @property
    def part_lengths(self) -> list[int]:
        """Packed: `row_lengths`, and behind them what fills up to `length`, if anything does."""
        padding = self.length - sum(self.row_lengths)
        return [*self.row_lengths, padding] if padding else self.row_lengths

    def tokens(self) -> torch.Tensor:
        """The model's input, padded with token 0."""
        rows = self.batch["all_tokens"]  # [b, S']
        if self.row_lengths:
            parts = zip(rows, self.row_lengths, strict=True)
            rows = torch.cat([row[:length] for row, length in parts]).unsqueeze(0)  # [1, t]
        return F.pad(rows, (0, self.length - rows.size(1)))

    def positions(self) -> torch.Tensor:
        """The place of each token of the input in its row."""
        if not self.row_lengths:
            return torch.arange(self.length).expand(self.shape)
        return torch.cat([torch.arange(length) for length in self.part_lengths]).unsqueeze(0)

    def by_row(self, values: torch.Tensor, *, num_left_out: int = 1) -> torch.Tensor:
        """One value for each token of the input -> [b, S' - num_left_out].

        Packed, it is 0 behind a row's last value; else it is what the padding gave.

        Args:
            values: [b, length], or [1, length] if packed.
            num_left_out: so many last tokens of a row have no value: 1 for what predicts the next
                token, 0 for what belongs to the token itself.
        """
        width = self.batch["all_tokens"].size(1) - num_left_out
        if not self.row_lengths:
            return values[:, :width]
        lengths = torch.tensor(self.row_lengths).unsqueeze(1)  # [b, 1]
        starts = lengths.cumsum(0) - lengths
        places = torch.arange(width)
        has_value = (places < lengths - num_left_out).to(values.device)  # [b, width]
        index = (starts + places).clamp(max=self.length - 1).to(values.device)
        return torch.where(has_value, values[0][index], 0.0)


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
