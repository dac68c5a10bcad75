"""How are thousands of rectangles copied, or digested, by one launch on a GPU?

A launch gets a table of spans (addresses, rows, widths, pitches) and a list of tiles, each a piece
of one rectangle. A kernel reads the memory of another GPU as it reads its own, and may write memory
that the driver mapped for vLLM's sleep mode, which a copy from a peer's IPC memory must not. So
nothing is staged, and the host does nothing per parameter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from chatlearn_vllm.weight_sync.digest import EVERYTHING, Sample, rows_per_unit
from chatlearn_vllm.weight_sync.pieces import Spans

_FLAT = {"BLOCK": 1024, "STEPS": 4}
"""Words of one step, and steps, of a tile of a rectangle that is one span."""
_ROWS = {"ROWS": 4, "BLOCK": 1024, "STEPS": 4}
"""Rows and words of one step, and steps, of a tile of any other rectangle."""
_DIGEST_FLAT = {"BLOCK": 4096}
_DIGEST_ROWS = {"ROWS": 4, "BLOCK": 1024}
"""The same of digests, where a tile is a unit."""


@dataclass(frozen=True)
class _Group:
    """Rectangles of one kind and alignment, cut in tiles."""

    is_flat: bool
    align: int
    members: np.ndarray
    """Numbers of the rectangles."""
    tile_piece: torch.Tensor
    """int32 [tiles]: index into `members`."""
    tile_number: torch.Tensor
    """int32 [tiles]: number of the tile inside its rectangle."""


class GroupedCopy:
    """Copies between two lists of rectangles of equal sizes, one launch per kind of rectangle."""

    def __init__(
        self, source: Spans, target: Spans, turn: np.ndarray, device: torch.device
    ) -> None:
        """Cut the rectangles in tiles.

        Args:
            source: where to read.
            target: where to write.
            turn: int64, a number for each rectangle; tiles of rectangles with different numbers
                take turns, in proportion to how many there are.
            device: where the targets are, and the kernel runs.

        Raises:
            ValueError: a rectangle does not consist of aligned 32-bit words.
        """
        source, target = _same_form(source, target)
        self._groups = _groups([source, target], turn, device)
        self._device = device
        self._tables = [self._table(group, source, target) for group in self._groups]

    def run(self) -> None:
        """Launch on the current stream; does not wait."""
        from chatlearn_vllm.weight_sync import triton_kernels

        for group, table in zip(self._groups, self._tables, strict=True):
            read, write, rows, widths, read_pitch, write_pitch = table
            grid, tiles = (len(group.tile_piece),), (group.tile_piece, group.tile_number)
            if group.is_flat:
                triton_kernels.copy_flat[grid](
                    read, write, widths, *tiles, ALIGN=group.align, num_warps=8, **_FLAT
                )
            else:
                triton_kernels.copy_rows[grid](
                    read, write, rows, widths, read_pitch, write_pitch, *tiles,
                    ALIGN=group.align, num_warps=8, **_ROWS,
                )  # fmt: skip

    def _table(self, group: _Group, source: Spans, target: Spans) -> torch.Tensor:
        columns = (
            source.address, target.address, source.rows, source.width, source.pitch, target.pitch,
        )  # fmt: skip
        return _upload(np.stack([column[group.members] for column in columns]), self._device)


class GroupedDigest:
    """Digests of a list of rectangles; the same numbers as `digest.digests`."""

    def __init__(self, spans: Spans, row_bytes: np.ndarray, device: torch.device) -> None:
        """Take the rectangles.

        Args:
            spans: where they are.
            row_bytes: int64, of a row of each rectangle, also where it is one span.
            device: where they are.

        Raises:
            ValueError: a rectangle does not consist of aligned 32-bit words.
        """
        _check_words([spans])
        self._spans, self._device = spans, device
        units = np.array([rows_per_unit(size) for size in row_bytes]) * (row_bytes // 4)
        # Rows that do not begin with words: one unit.
        self._unit_words = np.where(row_bytes % 4, spans.rows * spans.width // 4, units)
        self._groups = [
            (is_flat, align, members, _upload(np.stack([*self._columns(members)]), device))
            for is_flat, align, members in _kinds([spans], 4 * self._unit_words)
        ]
        self._tiles: dict[int, list[torch.Tensor]] = {}

    def run(self, sample: Sample = EVERYTHING) -> torch.Tensor:
        """Launch on the current stream; does not wait.

        Returns:
            int64 [rectangles] on the device.
        """
        from chatlearn_vllm.weight_sync import triton_kernels

        if sample.stride not in self._tiles:
            self._tiles[sample.stride] = self._cut(sample.stride)
        out = torch.zeros(len(self._spans.rows), dtype=torch.int64, device=self._device)
        for (is_flat, align, _, table), (piece, number) in zip(
            self._groups, self._tiles[sample.stride], strict=True
        ):
            address, rows, widths, pitches, unit_words, place = table
            tiles, grid = (unit_words, place, piece, number, out, *sample), (len(piece),)
            if is_flat:
                triton_kernels.digest_flat[grid](
                    address, widths, *tiles, ALIGN=align, num_warps=8, **_DIGEST_FLAT
                )
            else:
                triton_kernels.digest_rows[grid](
                    address, rows, widths, pitches, *tiles,
                    ALIGN=align, num_warps=8, **_DIGEST_ROWS,
                )  # fmt: skip
        return out

    def _columns(self, members: np.ndarray) -> Iterator[np.ndarray]:
        for column in self._spans:
            yield column[members]
        yield self._unit_words[members]
        yield members

    def _cut(self, stride: int) -> list[torch.Tensor]:
        """Tiles of the chosen units of each group; how many there are does not depend on phase."""
        found = []
        for is_flat, _, members, _ in self._groups:
            words = self._spans.width[members] // 4
            num_units = -(-(words * self._spans.rows[members]) // self._unit_words[members])
            across = 1 if is_flat else -(-words // _DIGEST_ROWS["BLOCK"])
            found.append(_tiles(-(-num_units // stride) * across, self._device))
        return found


def _same_form(source: Spans, target: Spans) -> tuple[Spans, Spans]:
    """Cut a rectangle that is one span on one side only like the other side."""
    rows = np.maximum(source.rows, target.rows)
    width = np.minimum(source.width, target.width)
    sides = [
        Spans(side.address, rows, width, np.where(side.rows == rows, side.pitch, width))
        for side in (source, target)
    ]
    return sides[0], sides[1]


def _groups(sides: list[Spans], turn: np.ndarray, device: torch.device) -> list[_Group]:
    _check_words(sides)
    rows, words = sides[0].rows, sides[0].width // 4
    across = -(-words // _ROWS["BLOCK"])
    down = -(-rows // (_ROWS["ROWS"] * _ROWS["STEPS"]))
    num_tiles = np.where(rows == 1, -(-words // (_FLAT["BLOCK"] * _FLAT["STEPS"])), across * down)
    return [
        _Group(is_flat, align, members, *_tiles(num_tiles[members], device, turn[members]))
        for is_flat, align, members in _kinds(sides)
    ]


def _kinds(
    sides: list[Spans], tile_bytes: np.ndarray | int = 0
) -> Iterator[tuple[bool, int, np.ndarray]]:
    """Rectangles that one kernel can work on: whether they are flat, their alignment, numbers.

    Args:
        sides: where the rectangles are.
        tile_bytes: tiles begin at multiples of it, where these are not aligned anyway.
    """
    is_wide = np.logical_and.reduce([side.is_aligned(16) for side in sides])
    is_wide &= tile_bytes % 16 == 0
    for is_flat in (True, False):
        for align in (16, 4):
            chosen = ((sides[0].rows == 1) == is_flat) & (is_wide == (align == 16))
            if chosen.any():
                yield is_flat, align, np.flatnonzero(chosen)


def _tiles(
    counts: np.ndarray, device: torch.device, turn: np.ndarray | None = None
) -> torch.Tensor:
    """int32 [2, tiles]: rectangle of each tile and number in it, given how many each has."""
    piece = np.repeat(np.arange(counts.size), counts)
    number = np.arange(piece.size) - np.repeat(np.cumsum(counts) - counts, counts)
    if turn is not None:
        order = _interleaved(turn[piece])
        piece, number = piece[order], number[order]
    return _upload(np.stack([piece, number]).astype(np.int32), device)


def _interleaved(turn: np.ndarray) -> np.ndarray:
    """An order in which entries of every turn are spread evenly from the first to the last."""
    when = np.empty(turn.size)
    for value in np.unique(turn):
        own = np.flatnonzero(turn == value)
        when[own] = (np.arange(own.size) + 0.5) / own.size
    return np.argsort(when, kind="stable")


def _check_words(sides: list[Spans]) -> None:
    if not np.logical_and.reduce([side.is_aligned(4) for side in sides]).all():
        raise ValueError(
            "on a GPU weights are copied as 32-bit words, but a rectangle of them does not begin "
            "or end with one: an odd size of a 16-bit model is cut by the parallel sizes"
        )


def _upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
