"""How do two rows that are compared with each other lie in a batch?

Rows 2 i and 2 i + 1 are the better and the worse response of pair i, and stay in one micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chatlearn_vllm.data.batch import Batch

if TYPE_CHECKING:
    from chatlearn_vllm.modules.base import BaseModule

CHOSEN, REJECTED = "chosen_", "rejected_"
"""What the keys of a pair's two rows begin with, where a row of a batch is a whole pair."""


def interleave_pairs(data: Batch) -> Batch:
    """[P, ...] with keys `chosen_<key>`, `rejected_<key>` -> [2 P, ...] with keys `<key>`.

    Rows 2 i and 2 i + 1 are those of pair i. Other keys are left out.

    Raises:
        ValueError: the two sides differ in keys or shapes.
    """
    chosen, rejected = (
        {key.removeprefix(side): value for key, value in data.items() if key.startswith(side)}
        for side in (CHOSEN, REJECTED)
    )
    shapes = [
        {key: tuple(value.shape) for key, value in side.items()} for side in (chosen, rejected)
    ]
    if shapes[0] != shapes[1] or not chosen:
        raise ValueError(
            f"pairs need the same keys and shapes on both sides: {CHOSEN}... are {shapes[0]}, "
            f"{REJECTED}... are {shapes[1]}"
        )
    return {
        key: torch.stack([value, rejected[key]], dim=1).flatten(0, 1)
        for key, value in chosen.items()
    }


def is_pair(batch: Batch) -> torch.Tensor:
    """[p] whether a pair has any token that counts; a filler (`micro_batches.take`) has none."""
    return (batch["loss_mask"] != 0).any(1).view(-1, 2).any(1)


def check_room_for_pairs(module: BaseModule) -> None:
    """Check that the two longest rows possible fit into one micro-batch of the module.

    Raises:
        ValueError: they do not.
    """
    args = module.model_args
    limit, least = args.max_tokens_per_micro_batch, 2 * args.seq_length
    if limit is not None and limit < least:
        raise ValueError(
            f"models.{module.name}: max_tokens_per_micro_batch={limit} must be at least "
            f"2 x seq_length = {least}: the two rows of a pair go through the model together"
        )
