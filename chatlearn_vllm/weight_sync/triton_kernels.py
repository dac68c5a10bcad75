"""Device code of `kernels.py`; importing it needs Triton.

All kernels work on 32-bit words. A table has one entry per rectangle; a tile is (index of the
rectangle, number of the tile in it). ALIGN is what every address, width and pitch is a multiple of,
in bytes.
"""

import triton
import triton.language as tl

from chatlearn_vllm.weight_sync import digest

_A = tl.constexpr(digest.A)
_B = tl.constexpr(digest.B)
_C = tl.constexpr(digest.C)


@triton.jit
def _hash(word, place):
    h = word.to(tl.uint32, bitcast=True) * _A + place.to(tl.uint32) * _B
    h ^= h >> 15
    h *= _B
    h ^= h >> 13
    h *= _C
    return (h ^ (h >> 16)).to(tl.int64)


@triton.jit
def _pointer(addresses, piece, ALIGN: tl.constexpr):
    return tl.multiple_of(tl.load(addresses + piece).to(tl.pointer_type(tl.int32)), ALIGN)


@triton.jit
def copy_flat(
    source, target, widths, tile_piece, tile_number,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Rectangles that are one span; a tile is BLOCK x STEPS words."""
    piece = tl.load(tile_piece + tl.program_id(0))
    start = tl.load(tile_number + tl.program_id(0)).to(tl.int64) * (BLOCK * STEPS)
    words = tl.multiple_of(tl.load(widths + piece) // 4, ALIGN // 4)
    read = _pointer(source, piece, ALIGN)
    write = _pointer(target, piece, ALIGN)
    for step in range(STEPS):
        at = start + step * BLOCK + tl.arange(0, BLOCK)
        tl.store(write + at, tl.load(read + at, mask=at < words), mask=at < words)


@triton.jit
def _unit(number, num_units, stride, phase):
    """The unit that the number-th chosen one is; see digest.Sample."""
    return tl.where(num_units <= stride, phase % num_units, number * stride + phase % stride)


@triton.jit(do_not_specialize=["stride", "phase"])
def digest_flat(
    source, widths, unit_words, place, tile_piece, tile_number, out, stride, phase,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Digests of rectangles that are one span, a unit per tile; added to `out` at `place`."""
    piece = tl.load(tile_piece + tl.program_id(0))
    words = tl.load(widths + piece) // 4
    size = tl.load(unit_words + piece)
    unit = _unit(tl.load(tile_number + tl.program_id(0)), tl.cdiv(words, size), stride, phase)
    start = tl.multiple_of(unit.to(tl.int64) * size, ALIGN // 4)
    stop = tl.multiple_of(tl.minimum(start + size, words), ALIGN // 4)
    read = _pointer(source, piece, ALIGN)
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        word = tl.load(read + at, mask=at < stop, other=0)
        total += tl.where(at < stop, _hash(word, at), 0)
    tl.atomic_add(out + tl.load(place + piece), tl.sum(total))


@triton.jit
def copy_rows(
    source, target, rows, widths, source_pitches, target_pitches, tile_piece, tile_number,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Rectangles of several spans; a tile is ROWS x STEPS spans, BLOCK words of each."""
    piece = tl.load(tile_piece + tl.program_id(0))
    number = tl.load(tile_number + tl.program_id(0))
    words = tl.multiple_of(tl.load(widths + piece) // 4, ALIGN // 4)
    num_rows = tl.load(rows + piece)
    read_pitch = tl.multiple_of(tl.load(source_pitches + piece) // 4, ALIGN // 4)
    write_pitch = tl.multiple_of(tl.load(target_pitches + piece) // 4, ALIGN // 4)
    read = _pointer(source, piece, ALIGN)
    write = _pointer(target, piece, ALIGN)
    across = tl.cdiv(words, BLOCK)
    column = (number % across) * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = (number // across) * (ROWS * STEPS)
    for step in range(STEPS):
        row = (first + step * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < num_rows) & (column < words)
        word = tl.load(read + row * read_pitch + column, mask=inside)
        tl.store(write + row * write_pitch + column, word, mask=inside)


@triton.jit(do_not_specialize=["stride", "phase"])
def digest_rows(
    source, rows, widths, pitches, unit_words, place, tile_piece, tile_number, out, stride, phase,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Digests of rectangles of several spans, BLOCK words of each row of a unit per tile.

    Each is added to `out` at `place`.
    """
    piece = tl.load(tile_piece + tl.program_id(0))
    number = tl.load(tile_number + tl.program_id(0))
    words = tl.multiple_of(tl.load(widths + piece) // 4, ALIGN // 4)
    num_rows = tl.load(rows + piece)
    pitch = tl.multiple_of(tl.load(pitches + piece) // 4, ALIGN // 4)
    rows_per_unit = tl.load(unit_words + piece) // words
    read = _pointer(source, piece, ALIGN)
    across = tl.cdiv(words, BLOCK)
    column = (number % across) * BLOCK + tl.arange(0, BLOCK)[None, :]
    unit = _unit(number // across, tl.cdiv(num_rows, rows_per_unit), stride, phase)
    start = unit * rows_per_unit
    stop = tl.minimum(start + rows_per_unit, num_rows)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.int64)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (row < stop) & (column < words)
        word = tl.load(read + row * pitch + column, mask=inside, other=0)
        total += tl.where(inside, _hash(word, row * words + column), 0)
    tl.atomic_add(out + tl.load(place + piece), tl.sum(total))
