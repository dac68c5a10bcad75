"""Which rectangle of which training rank goes to which rectangle of an engine parameter?

Pure Python: the plan of one engine rank is computed from its parameters' layouts and those of all
training ranks. Nothing is gathered: each copy is the largest rectangle that one source and one
destination share.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chatlearn_vllm.layouts.blocks import Block, ParamLayout, Rect, intersect, num_elements, shift


class IncompletePlanError(ValueError):
    """Some weights have no source or no destination; the message lists them."""


@dataclass(frozen=True)
class Copy:
    """One rectangle on its way."""

    source_rank: int
    source_param: str
    source: Rect
    target_param: str
    target: Rect


@dataclass(frozen=True)
class RankPlan:
    """Everything one engine rank has to do in a sync."""

    copies: tuple[Copy, ...]
    """Together they write each element of each parameter exactly once, padding excepted."""
    padding: tuple[tuple[str, Rect], ...]
    """Rectangles without weights, to be zeroed."""

    @property
    def source_ranks(self) -> tuple[int, ...]:
        """Training ranks that this plan reads, ascending."""
        return tuple(sorted({copy.source_rank for copy in self.copies}))

    @property
    def num_elements(self) -> int:
        """Number of weights copied."""
        return sum(num_elements(copy.target) for copy in self.copies)


def plan_rank(
    targets: Sequence[ParamLayout],
    sources: Mapping[int, Sequence[ParamLayout]],
    prefer: Sequence[int] = (),
) -> RankPlan:
    """Plan the copies of one engine rank.

    Args:
        targets: layouts of the engine rank's parameters.
        sources: layouts of the training ranks' parameters by rank.
        prefer: training ranks to read from first where several hold the same weights, for example
            those on the same GPU; the others follow in ascending order.

    Raises:
        IncompletePlanError: an element of a parameter has no source; lists each.
    """
    order = [rank for rank in prefer if rank in sources]
    order += [rank for rank in sorted(sources) if rank not in order]
    holders: dict[str, list[tuple[int, str, Block]]] = defaultdict(list)
    for rank in order:
        for layout in sources[rank]:
            for block in layout.blocks:
                holders[block.tensor].append((rank, layout.name, block))

    copies: list[Copy] = []
    missing: list[str] = []
    for layout in targets:
        for block in layout.blocks:
            wanted = [block.logical]
            for rank, name, held in holders[block.tensor]:
                if not wanted:
                    break
                rest: list[Rect] = []
                for rect in wanted:
                    common = intersect(rect, held.logical)
                    if common is None:
                        rest.append(rect)
                        continue
                    source = shift(common, held.logical, held.local)
                    target = shift(common, block.logical, block.local)
                    copies.append(Copy(rank, name, source, layout.name, target))
                    rest += subtract(rect, common)
                wanted = rest
            missing += [f"{layout.name}: {block.tensor}{_text(rect)}" for rect in wanted]
    if missing:
        raise IncompletePlanError(
            f"{len(missing)} rectangles have no source on any training rank:\n  "
            + "\n  ".join(missing)
        )
    padding = tuple((layout.name, rect) for layout in targets for rect in layout.padding)
    return RankPlan(tuple(copies), padding)


def check_all_sources_used(
    targets: Sequence[Sequence[ParamLayout]], sources: Mapping[int, Sequence[ParamLayout]]
) -> None:
    """Check that one replica takes all that the trainer trains.

    Args:
        targets: layouts of all ranks of one engine replica.
        sources: layouts of the training ranks.

    Raises:
        IncompletePlanError: a trained rectangle is in no engine parameter; lists each.
    """
    held: dict[str, list[Rect]] = defaultdict(list)
    for rank_layouts in targets:
        for layout in rank_layouts:
            for block in layout.blocks:
                held[block.tensor].append(block.logical)
    trained = {
        (block.tensor, block.logical)
        for layouts in sources.values()
        for layout in layouts
        for block in layout.blocks
    }
    unused = []
    for tensor, logical in sorted(trained):
        rest = [logical]
        for rect in held[tensor]:
            rest = [piece for wanted in rest for piece in _without(wanted, rect)]
        unused += [f"{tensor}{_text(rect)}" for rect in rest]
    if unused:
        raise IncompletePlanError(
            f"{len(unused)} trained rectangles are in no engine parameter:\n  "
            + "\n  ".join(unused)
        )


def subtract(rect: Rect, hole: Rect) -> list[Rect]:
    """What is left of `rect` without `hole`, which lies inside it, as disjoint rectangles."""
    pieces = []
    for dim, ((start, stop), (h0, h1)) in enumerate(zip(rect, hole, strict=True)):
        before, after = hole[:dim], rect[dim + 1 :]
        if start < h0:
            pieces.append((*before, (start, h0), *after))
        if h1 < stop:
            pieces.append((*before, (h1, stop), *after))
    return pieces


def _without(rect: Rect, other: Rect) -> list[Rect]:
    common = intersect(rect, other)
    return [rect] if common is None else subtract(rect, common)


def _text(rect: Rect) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in rect) + "]"
