"""Which micro-batches do the ranks of a model agree on?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from chatlearn_vllm.data.balance import row_lengths
from chatlearn_vllm.data.batch import batch_size
from chatlearn_vllm.engines.megatron.micro_batches import (
    ModelInput,
    equal_groups,
    groups_by_tokens,
    trim,
)

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from chatlearn_vllm.config import ModelArgs
    from chatlearn_vllm.data.batch import Batch


class Batching:
    """How one rank's rows become micro-batches that fit those of the other ranks."""

    def __init__(self, args: ModelArgs, config: TransformerConfig, device: torch.device) -> None:
        """Keep the settings.

        Args:
            args: of the model.
            config: megatron-core's.
            device: on which ranks exchange lengths.
        """
        self._args = args
        self._config = config
        self._device = device

    @property
    def has_own_lengths(self) -> bool:
        """Whether each micro-batch has a length of its own, not that of the longest of a call."""
        return self._args.max_tokens_per_micro_batch is not None or self._args.sequence_packing

    @property
    def _multiple(self) -> int:
        """What the number of micro-batches of a call must be a multiple of."""
        is_interleaved = bool(self._config.virtual_pipeline_model_parallel_size)
        return self._config.pipeline_model_parallel_size if is_interleaved else 1

    def group_rows(
        self, batch: Batch, max_rows: int, *, is_optimizer_step: bool, together: int = 1
    ) -> list[list[int]]:
        """Decide which rows of a batch make each micro-batch.

        With max_tokens_per_micro_batch, data parallel ranks group alike in an optimizer step, and
        always where the model has experts: as if the longest row of each were as long as that of
        any of them, the second longest likewise, and so on. So all have equally many micro-batches,
        and the first ones have equally many rows, the second ones too, and so on. In these cases,
        collective over the data parallel group.

        Args:
            batch: this data parallel rank's rows.
            max_rows: most rows of a micro-batch where max_tokens_per_micro_batch is not set;
                counts so many rows `together` as one.
            is_optimizer_step: whether they are for `train_step`, not for `forward_only`.
            together: so many rows, one after the other, stay in one micro-batch; divides the number
                of rows. 2 where each row is compared with its neighbour.

        Returns:
            The rows of each micro-batch. Some may have none, see `micro_batches.take`: virtual
            pipeline stages ask for at least as many micro-batches as there are stages.

        Raises:
            ValueError: a row is too long, or data parallel ranks have different numbers of rows.
        """
        limit = self._args.max_tokens_per_micro_batch
        if limit is None:
            units = equal_groups(
                batch_size(batch) // together, max_rows, multiple_of=self._multiple
            )
            return _rows_of_units(units, together)
        own = self._unit_lengths(batch, together)
        longest_first = sorted(range(len(own)), key=lambda unit: -own[unit])
        lengths = [own[unit] for unit in longest_first]
        if is_optimizer_step or self._config.num_moe_experts:
            lengths = self._agree_on_row_lengths(lengths)
        if lengths[0] > limit:
            what, least = "a sequence takes", "seq_length"
            if together > 1:
                what = f"{together} sequences that belong together take"
                least = f"{together} x {least}"
            parts = self._ranks_of_a_sequence
            padded = f", each a multiple of the {parts} tensor parallel ranks" if parts > 1 else ""
            raise ValueError(
                f"{what} {lengths[0]} tokens, more than max_tokens_per_micro_batch={limit}; "
                f"raise that key to at least {least}{padded}"
            )
        groups = groups_by_tokens(
            lengths,
            limit,
            is_packed=self._args.sequence_packing,
            multiple_of=self._multiple,
        )
        units = [[longest_first[place] for place in group] for group in groups]
        return _rows_of_units(units, together)

    def _unit_lengths(self, batch: Batch, together: int) -> list[int]:
        """Tokens that each unit of `together` rows takes in a micro-batch that it begins."""
        lengths = [self._padded(length) for length in row_lengths(batch)]
        units = [lengths[first : first + together] for first in range(0, len(lengths), together)]
        if self._args.sequence_packing:
            return [sum(unit) for unit in units]
        return [together * max(unit) for unit in units]

    def _agree_on_row_lengths(self, lengths: list[int]) -> list[int]:
        """Place by place the longest of all data parallel ranks."""
        most, fewest = self._largest_of_ranks([len(lengths), -len(lengths)])
        if most != -fewest:
            raise ValueError(
                f"data parallel ranks have {-fewest} to {most} rows; each needs equally many where "
                "max_tokens_per_micro_batch is set"
            )
        return self._largest_of_ranks(lengths)

    def model_inputs(self, micro_batches: list[Batch]) -> list[ModelInput]:
        """Micro-batches as the model takes them: trimmed, of lengths that the ranks agree on."""
        if self.has_own_lengths:
            batches = [trim([batch])[0][0] for batch in micro_batches]
        else:
            batches, _ = trim(micro_batches)
        inputs = [
            ModelInput.packed(batch) if self._args.sequence_packing else ModelInput.padded(batch)
            for batch in batches
        ]
        if self._config.num_moe_experts:
            inputs = self._agree_on_lengths(inputs)
        return [each.lengthened(self._padded(each.length)) for each in inputs]

    def _padded(self, length: int) -> int:
        """What sequence parallel ranks can hold equal parts of."""
        parts = self._ranks_of_a_sequence
        return -(-length // parts) * parts

    @property
    def _ranks_of_a_sequence(self) -> int:
        return self._config.tensor_model_parallel_size if self._config.sequence_parallel else 1

    def _agree_on_lengths(self, inputs: list[ModelInput]) -> list[ModelInput]:
        """Lengthen to the longest of all data parallel ranks, micro-batch by micro-batch.

        These ranks pass tokens through each other's experts.

        Raises:
            ValueError: on all ranks, if they have different numbers of micro-batches or rows: some
                would wait for ever.
        """
        count = len(inputs)
        rows = [micro_batch.shape[0] for micro_batch in inputs]
        most, fewest, most_rows, fewest_rows = self._largest_of_ranks(
            [count, -count, max(rows), -min(rows)]
        )
        has_equal_rows = most == -fewest
        if has_equal_rows:
            lengths = [micro_batch.length for micro_batch in inputs]
            largest = self._largest_of_ranks([*lengths, *rows, *(-number for number in rows)])
            lengths, most_each, fewest_each = (
                largest[i : i + count] for i in range(0, 3 * count, count)
            )
            has_equal_rows = most_each == [-number for number in fewest_each]
        if not has_equal_rows:
            raise ValueError(
                f"a model with experts needs equally many micro-batches of equally many rows on "
                f"all data parallel ranks, but there are {-fewest} to {most} micro-batches of "
                f"{-fewest_rows} to {most_rows} rows"
            )
        return [each.lengthened(length) for each, length in zip(inputs, lengths, strict=True)]

    def _largest_of_ranks(self, values: list[int]) -> list[int]:
        """Value by value the largest of the data parallel ranks."""
        tensor = torch.tensor(values, device=self._device)
        dist.all_reduce(
            tensor, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group()
        )
        return tensor.tolist()


def _rows_of_units(groups: list[list[int]], together: int) -> list[list[int]]:
    """Groups of units of so many rows -> groups of rows."""
    return [
        [row for unit in units for row in range(unit * together, (unit + 1) * together)]
        for units in groups
    ]
