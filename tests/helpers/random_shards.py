"""Layouts that no library has: tensors cut at random and stacked in any order on random ranks."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from chatlearn_vllm.layouts import Block, ListedShards, ParamLayout
from chatlearn_vllm.layouts.blocks import Rect


def random_tensors(seed: int, num_tensors: int = 6) -> dict[str, torch.Tensor]:
    """Logical tensors of one and two dimensions with distinct random values."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    shapes = [
        tuple(rng.randint(1, 40) for _ in range(rng.randint(1, 2))) for _ in range(num_tensors)
    ]
    return {f"t{i}": torch.randn(shape, generator=g) for i, shape in enumerate(shapes)}


def random_shards(
    logical: Mapping[str, torch.Tensor], num_ranks: int, rng: random.Random
) -> ListedShards:
    """Cut each tensor in columns and rows; a rank stacks its rows of the same columns.

    Some parameters have a leading dimension of one, like an expert's slot.
    """
    layouts: dict[int, list[ParamLayout]] = {rank: [] for rank in range(num_ranks)}
    for tensor, value in logical.items():
        for columns in _cuts(value.shape[1], rng) if value.dim() == 2 else [None]:
            rows_of = defaultdict(list)
            for rows in rng.sample(cuts := _cuts(value.shape[0], rng), len(cuts)):
                rows_of[rng.randrange(num_ranks)].append(rows)
            for rank, rows in rows_of.items():
                name = f"{tensor}.{columns}"
                layouts[rank].append(_stack(name, tensor, rows, columns, rng.random() < 0.3))
    return ListedShards(layouts)


def assemble(
    layouts: Sequence[ParamLayout], logical: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A rank's parameters, by name."""
    tensors = {}
    for layout in layouts:
        tensors[layout.name] = torch.empty(layout.shape, dtype=dtype)
        for block in layout.blocks:
            values = logical[block.tensor][_slices(block.logical)].to(dtype)
            tensors[layout.name][_slices(block.local)] = values
    return tensors


def _cuts(size: int, rng: random.Random) -> list[tuple[int, int]]:
    points = sorted({0, size, *(rng.randint(0, size) for _ in range(rng.randint(0, 3)))})
    return list(zip(points, points[1:], strict=False))


def _stack(
    name: str, tensor: str, rows: list[tuple[int, int]], columns: tuple[int, int] | None, slot: bool
) -> ParamLayout:
    lead: Rect = ((0, 1),) if slot else ()
    width = () if columns is None else (columns[1] - columns[0],)
    blocks, at = [], 0
    for start, stop in rows:
        logical: Rect = ((start, stop),) if columns is None else ((start, stop), columns)
        local = (*lead, (at, at + stop - start), *((0, size) for size in width))
        blocks.append(Block(tensor, logical, local))
        at += stop - start
    return ParamLayout(name, (*(1 for _ in lead), at, *width), tuple(blocks))


def _slices(rect: Rect) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in rect)
