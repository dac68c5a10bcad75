"""Which number stands for the bytes of a rectangle?

A digest is a 64-bit number made of the bytes of a rectangle, taken as 32-bit words w[0], w[1], ...
in row-major order:

    h[i] = mix(A * w[i] + B * i)        on 32 bits
    mix(x): x ^= x >> 15; x *= B; x ^= x >> 13; x *= C; x ^= x >> 16
    digest = sum of all h[i]            on 64 bits

Each word is bound to its place, so lost, doubled, stale and exchanged words all change it; a wrong
rectangle passes with a chance of about 2**-32 or less. The sum does not depend on an order, so many
threads may form it. `kernels.py` computes the same on a GPU. It guards against faults, not against
an attacker. Constants and mix are those of xxHash32 (Y. Collet).

Reading all bytes once more takes a good part of the time of copying them. So a digest may take a
`Sample` of the rectangle: of its units, whole rows of about 64 KiB, every `stride`-th and at least
one, another set in each sync, so that `stride` syncs in a row cover every byte.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

A, B, C = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D

UNIT_WORDS = 1 << 14
"""A unit is so many words, rounded down to whole rows, or one row where that is longer.

Where rows do not consist of whole words, the rectangle is one unit.
"""

_CHUNK = 1 << 16
_PLACES = np.arange(_CHUNK, dtype=np.uint32) * np.uint32(B)


class Sample(NamedTuple):
    """Which units of each rectangle are digested."""

    stride: int = 1
    """One unit of so many; 1 for all."""
    phase: int = 0
    """Which one of them."""

    def units(self, num_units: int) -> range:
        """Numbers of the chosen ones of a rectangle's units."""
        if num_units <= self.stride:
            chosen = self.phase % num_units
            return range(chosen, chosen + 1)
        return range(self.phase % self.stride, num_units, self.stride)


EVERYTHING = Sample()


def rows_per_unit(row_bytes: int) -> int:
    """Rows of a unit of a rectangle."""
    return max(1, 4 * UNIT_WORDS // row_bytes)


def digests(views: Sequence[torch.Tensor], sample: Sample = EVERYTHING) -> np.ndarray:
    """Digests of tensors of any strides, wherever they lie, computed on the CPU.

    Returns:
        int64 [len(views)].
    """
    sums = [_digest(view, sample) % 2**64 for view in views]
    return np.array(sums, dtype=np.uint64).view(np.int64)


def _digest(view: torch.Tensor, sample: Sample) -> int:
    rows = view.detach()
    while rows.dim() > 2:  # leading dimensions have one element
        rows = rows[0]
    rows = rows.reshape(1, -1) if rows.dim() < 2 else rows
    row_bytes = rows.size(1) * rows.element_size()
    step = rows_per_unit(row_bytes)
    if row_bytes % 4:  # rows do not begin with words: one unit
        step = rows.size(0)
    total = 0
    for unit in sample.units(-(-rows.size(0) // step)):
        part = rows[unit * step : (unit + 1) * step]
        total += _sum_of_hashes(_words(part), unit * step * row_bytes // 4)
    return total


def _words(part: torch.Tensor) -> np.ndarray:
    """uint32 words of a tensor, the last one filled up with zeros."""
    flat = part.cpu().contiguous().view(-1).view(torch.uint8).numpy()
    if flat.size % 4:
        flat = np.concatenate([flat, np.zeros(-flat.size % 4, dtype=np.uint8)])
    return flat.view(np.uint32)


def _sum_of_hashes(words: np.ndarray, first: int) -> int:
    """Sum of h[i] for words that begin at place `first`."""
    total = 0
    for start in range(0, words.size, _CHUNK):
        chunk = words[start : start + _CHUNK]
        h = chunk * np.uint32(A)
        h += _PLACES[: chunk.size]
        h += np.uint32((first + start) * B % 2**32)
        h ^= h >> np.uint32(15)
        h *= np.uint32(B)
        h ^= h >> np.uint32(13)
        h *= np.uint32(C)
        h ^= h >> np.uint32(16)
        total += int(h.sum(dtype=np.uint64))
    return total
