"""What is a parameter made of: rectangles of logical tensors, and how are they cut?"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

Range = tuple[int, int]
"""Half-open [start, stop) along one dimension."""
Rect = tuple[Range, ...]
"""One range per dimension."""


class Block(NamedTuple):
    """A rectangle of a logical tensor and where it lies in a local parameter; same sizes."""

    tensor: str
    """Hugging Face name of the logical tensor."""
    logical: Rect
    """Rectangle inside the logical tensor."""
    local: Rect
    """Rectangle inside the local parameter; it may have further leading ranges of one element."""

    @property
    def num_elements(self) -> int:
        """Number of elements in the rectangle."""
        return num_elements(self.local)

    def has_equal_sizes(self) -> bool:
        """Whether both rectangles have the same sizes, but for leading ones of the local one."""
        extra = len(self.local) - len(self.logical)
        sizes = [stop - start for start, stop in self.local]
        wanted = [stop - start for start, stop in self.logical]
        return sizes == [1] * extra + wanted


@dataclass(frozen=True)
class ParamLayout:
    """One local parameter: every element lies in exactly one block or in padding."""

    name: str
    """The rank's own parameter name, layer numbers counted over the whole model."""
    shape: tuple[int, ...]
    """Local shape."""
    blocks: tuple[Block, ...]
    padding: tuple[Rect, ...] = ()
    """Rectangles that hold no model weight (vocabulary padding); their value is zero."""

    def __post_init__(self) -> None:
        """Check that blocks and padding tile the parameter.

        Raises:
            ValueError: a block has other sizes than what it holds, a rectangle leaves the
                parameter, two overlap, or an element is in none.
        """
        for block in self.blocks:
            if not block.has_equal_sizes():
                raise ValueError(
                    f"{self.name} {self.shape}: rectangle {block.local} has other sizes than "
                    f"{block.logical} of {block.tensor}"
                )
        rects = [block.local for block in self.blocks] + list(self.padding)
        if rects == [whole(self.shape)]:
            return
        for rect in rects:
            inside = len(rect) == len(self.shape) and all(
                0 <= start < stop <= size
                for (start, stop), size in zip(rect, self.shape, strict=True)
            )
            if not inside:
                raise ValueError(f"{self.name} {self.shape}: rectangle {rect} is not inside it")
        overlap = find_overlap(rects)
        if overlap:
            raise ValueError(
                f"{self.name} {self.shape}: rectangles {overlap[0]} and {overlap[1]} overlap"
            )
        covered, total = sum(map(num_elements, rects)), math.prod(self.shape)
        if covered != total:
            raise ValueError(f"{self.name} {self.shape}: {total - covered} elements in no block")


def find_overlap(rects: list[Rect]) -> tuple[Rect, Rect] | None:
    """Two rectangles that share an element, or None.

    Sweeps along the first dimension, so a parameter that stacks many blocks is checked in the time
    of a sort.
    """
    open_rects: list[Rect] = []
    for rect in sorted(rects):
        start = rect[0][0]
        open_rects = [other for other in open_rects if other[0][1] > start]
        for other in open_rects:
            if intersect(other, rect):
                return other, rect
        open_rects.append(rect)
    return None


def num_elements(rect: Rect) -> int:
    """Number of elements of a rectangle."""
    return math.prod(stop - start for start, stop in rect)


def intersect(a: Rect, b: Rect) -> Rect | None:
    """The common rectangle of `a` and `b`, or None where they share no element."""
    common = []
    for (a0, a1), (b0, b1) in zip(a, b, strict=True):
        start, stop = max(a0, b0), min(a1, b1)
        if start >= stop:
            return None
        common.append((start, stop))
    return tuple(common)


def shift(rect: Rect, origin: Rect, target: Rect) -> Rect:
    """Move `rect`, given inside `origin`, to the same place inside `target`.

    `target` may have further leading dimensions of one element (an expert's slot); they stay.
    """
    if rect == origin:
        return target
    extra = len(target) - len(rect)
    moved = [
        (start - o[0] + t[0], stop - o[0] + t[0])
        for (start, stop), o, t in zip(rect, origin, target[extra:], strict=True)
    ]
    return (*target[:extra], *moved)


def whole(shape: tuple[int, ...]) -> Rect:
    """The rectangle that covers a tensor of this shape."""
    return tuple([(0, size) for size in shape])


def shard_range(size: int, rank: int, num_shards: int) -> Range:
    """The `rank`-th of `num_shards` equal parts of `size` elements.

    Raises:
        ValueError: `size` is not a multiple of `num_shards`.
    """
    if size % num_shards:
        raise ValueError(f"{size} elements cannot be cut in {num_shards} equal parts")
    part = size // num_shards
    return rank * part, (rank + 1) * part


def stack(pieces: Iterable[tuple[str, Rect]], window: Range | None = None) -> tuple[Block, ...]:
    """Blocks of a parameter that stacks rectangles of logical tensors along its first dimension.

    Args:
        pieces: (tensor, rectangle of it), in stacking order; equal sizes in all other dimensions.
        window: the rows of the stack that are held; None for all.
    """
    blocks, at = [], 0
    for tensor, rect in pieces:
        (start, stop), rest = rect[0], rect[1:]
        size = stop - start
        lo, hi = (0, size) if window is None else (window[0] - at, window[1] - at)
        lo, hi = max(lo, 0), min(hi, size)
        if lo < hi:
            first = at + lo - (0 if window is None else window[0])
            columns = tuple((0, b - a) for a, b in rest)
            local = ((first, first + hi - lo), *columns)
            blocks.append(Block(tensor, ((start + lo, start + hi), *rest), local))
        at += size
    return tuple(blocks)


def replicated(name: str, tensor: str, local_shape: tuple[int, ...]) -> ParamLayout:
    """A parameter that every rank holds whole."""
    return ParamLayout(name, local_shape, (Block(tensor, whole(local_shape), whole(local_shape)),))


def vocab_shard(
    name: str, tensor: str, vocab_size: int, local_shape: tuple[int, ...], tp_rank: int
) -> ParamLayout:
    """Rows of a vocabulary matrix that is padded, then cut evenly over tensor parallel ranks."""
    rows, columns = local_shape
    first = tp_rank * rows
    real = max(0, min(vocab_size - first, rows))
    blocks: tuple[Block, ...] = ()
    padding: tuple[Rect, ...] = ()
    if real:
        logical: Rect = ((first, first + real), (0, columns))
        blocks = (Block(tensor, logical, ((0, real), (0, columns))),)
    if real < rows:
        padding = (((real, rows), (0, columns)),)
    return ParamLayout(name, local_shape, blocks, padding)
