"""What is a parameter made of: rectangles of logical tensors, and how are they cut?"""

import math
from dataclasses import dataclass
from itertools import combinations

Range = tuple[int, int]
"""Half-open [start, stop) along one dimension."""
Rect = tuple[Range, ...]
"""One range per dimension."""


@dataclass(frozen=True)
class Block:
    """A rectangle of a logical tensor and where it lies in a local parameter; same sizes."""

    tensor: str
    """Hugging Face name of the logical tensor."""
    logical: Rect
    """Rectangle inside the logical tensor."""
    local: Rect
    """Rectangle inside the local parameter."""

    @property
    def num_elements(self) -> int:
        """Number of elements in the rectangle."""
        return num_elements(self.local)


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
            ValueError: a rectangle leaves the parameter, two overlap, or an element is in none.
        """
        rects = [block.local for block in self.blocks] + list(self.padding)
        for rect in rects:
            inside = len(rect) == len(self.shape) and all(
                0 <= start < stop <= size
                for (start, stop), size in zip(rect, self.shape, strict=True)
            )
            if not inside:
                raise ValueError(f"{self.name} {self.shape}: rectangle {rect} is not inside it")
        for a, b in combinations(rects, 2):
            if intersect(a, b):
                raise ValueError(f"{self.name} {self.shape}: rectangles {a} and {b} overlap")
        covered, total = sum(map(num_elements, rects)), math.prod(self.shape)
        if covered != total:
            raise ValueError(f"{self.name} {self.shape}: {total - covered} elements in no block")


def num_elements(rect: Rect) -> int:
    """Number of elements of a rectangle."""
    return math.prod(stop - start for start, stop in rect)


def intersect(a: Rect, b: Rect) -> Rect | None:
    """The common rectangle of `a` and `b`, or None where they share no element."""
    common = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def shift(rect: Rect, origin: Rect, target: Rect) -> Rect:
    """Move `rect`, given inside `origin`, to the same place inside `target`."""
    return tuple(
        (start - o[0] + t[0], stop - o[0] + t[0])
        for (start, stop), o, t in zip(rect, origin, target, strict=True)
    )


def whole(shape: tuple[int, ...]) -> Rect:
    """The rectangle that covers a tensor of this shape."""
    return tuple((0, size) for size in shape)


def shard_range(size: int, rank: int, num_shards: int) -> Range:
    """The `rank`-th of `num_shards` equal parts of `size` elements.

    Raises:
        ValueError: `size` is not a multiple of `num_shards`.
    """
    if size % num_shards:
        raise ValueError(f"{size} elements cannot be cut in {num_shards} equal parts")
    part = size // num_shards
    return rank * part, (rank + 1) * part


def stack_rows(
    name: str, columns: Range | None, pieces: list[tuple[str, int, int]], rows: Range
) -> tuple[Block, ...]:
    """Blocks of a parameter whose full form stacks row ranges of logical tensors.

    Args:
        name: parameter name, for messages.
        columns: column range held locally; None for one-dimensional parameters (biases).
        pieces: (tensor, first row, stop row), in the order in which the full form stacks them.
        rows: the rows of the full form that this rank holds.
    """
    blocks, at = [], 0
    for tensor, start, stop in pieces:
        kept = intersect(((at, at + stop - start),), (rows,))
        if kept:
            lo, hi = kept[0]
            logical: Rect = ((start + lo - at, start + hi - at),)
            local: Rect = ((lo - rows[0], hi - rows[0]),)
            if columns is not None:
                logical += (columns,)
                local += ((0, columns[1] - columns[0]),)
            blocks.append(Block(tensor, logical, local))
        at += stop - start
    if at < rows[1]:
        raise ValueError(f"{name}: rows {rows} asked for, the full parameter has {at}")
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
