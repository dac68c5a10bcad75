"""How are copies divided into messages of bounded size? Pure arithmetic: both ends agree."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from chatlearn_vllm.layouts.blocks import Rect, num_elements, shift, whole
from chatlearn_vllm.weight_sync.planner import Copy

ALIGNMENT = 16
"""Bytes; a piece of any dtype may start at a multiple."""


@dataclass(frozen=True)
class Piece:
    """A rectangle that travels in one bucket: a copy, or a part of one that is too large."""

    source_param: str
    source: Rect
    target_param: str
    target: Rect
    dtype: torch.dtype
    """The source's."""
    start: int
    """First byte inside the bucket."""

    @property
    def stop(self) -> int:
        """End inside the bucket in bytes."""
        return self.start + num_elements(self.source) * self.dtype.itemsize

    def packed(self, bucket: torch.Tensor) -> torch.Tensor:
        """The piece as a view of a bucket, uint8 [num_bytes], in the shape of its source."""
        shape = [stop - start for start, stop in self.source]
        return bucket[self.start : self.stop].view(self.dtype).view(shape)


Bucket = tuple[Piece, ...]
"""Pieces that travel together, ascending by `start`."""


def plan_buckets(
    copies: Iterable[Copy], dtypes: Mapping[str, torch.dtype], bucket_bytes: int
) -> list[Bucket]:
    """Divide copies into messages; both ends call it and get the same.

    Args:
        copies: what travels, in any order.
        dtypes: of the source parameters.
        bucket_bytes: upper bound of a message; larger copies are cut by rows, longer rows too.
    """
    buckets: list[Bucket] = []
    pieces: list[Piece] = []
    for copy in sorted(copies):
        dtype = dtypes[copy.source_param]
        for source, target in _parts(copy, bucket_bytes // dtype.itemsize):
            end = pieces[-1].stop if pieces else 0
            start = -(-end // ALIGNMENT) * ALIGNMENT
            if start + num_elements(source) * dtype.itemsize > bucket_bytes:
                buckets.append(tuple(pieces))
                pieces, start = [], 0
            pieces.append(Piece(copy.source_param, source, copy.target_param, target, dtype, start))
    return [*buckets, tuple(pieces)] if pieces else buckets


def cut(shape: tuple[int, ...], max_elements: int) -> list[Rect]:
    """Cut a shape into parts of whole rows, or of parts of a row where one is too large."""
    if not shape:
        return [()]
    num_rows, *columns = shape
    step = max_elements // math.prod(columns)
    if step:
        rest = whole(tuple(columns))
        return [((row, min(row + step, num_rows)), *rest) for row in range(0, num_rows, step)]
    parts = cut(tuple(columns), max_elements)
    return [((row, row + 1), *part) for row in range(num_rows) for part in parts]


def _parts(copy: Copy, max_elements: int) -> Iterator[tuple[Rect, Rect]]:
    """The rectangles of a copy, source and target, cut where too large."""
    num_dims = min(len(copy.source), len(copy.target))  # either may have leading ones
    shape = tuple(stop - start for start, stop in copy.source[len(copy.source) - num_dims :])
    for part in cut(shape, max_elements):
        yield (
            shift(part, whole(shape), copy.source),
            shift(part, whole(shape), copy.target),
        )
