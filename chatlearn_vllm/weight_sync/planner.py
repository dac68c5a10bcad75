"""Which rectangle of which training rank goes to which rectangle of an engine parameter?

Pure Python: everything follows from the parallel sizes of the two sides and from where the ranks
run. Nothing is gathered: each copy is the largest rectangle that one source and one destination
share. A reader plans what it reads, a sender what is read from it; both walk through the same
choice, so the two lists are equal, and `fingerprint` lets them prove it.
"""

import functools
import gc
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from chatlearn_vllm.layouts import Block, Holder, ParamLayout, ShardedModel
from chatlearn_vllm.layouts.blocks import Rect, intersect, num_elements, shift
from chatlearn_vllm.weight_sync.links import Links

_T = TypeVar("_T")
_K = TypeVar("_K")


class IncompletePlanError(ValueError):
    """Some weights have no source or no destination; the message lists them."""


class Copy(NamedTuple):
    """One rectangle on its way; both rectangles have the same sizes, but for leading ones."""

    source_rank: int
    source_param: str
    source: Rect
    target_param: str
    target: Rect

    @property
    def num_elements(self) -> int:
        """Number of weights."""
        return num_elements(self.target)


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
        return sum(copy.num_elements for copy in self.copies)

    def by_source(self) -> dict[int, list[Copy]]:
        """The copies from each training rank, in plan order."""
        groups = _group(self.copies, lambda copy: copy.source_rank)
        return {rank: list(groups[rank]) for rank in sorted(groups)}


def _without_collector(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pause the garbage collector: it would walk a large plan's tuples again and again."""

    @functools.wraps(function)
    def paused(*args: Any, **kwargs: Any) -> Any:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            if was_enabled:
                gc.enable()

    return paused


@_without_collector
def plan_reader(
    reader: int, targets: Iterable[ParamLayout], sources: ShardedModel, links: Links
) -> RankPlan:
    """Plan the copies of one engine rank.

    Args:
        reader: the engine rank, counted over all replicas.
        targets: layouts of its parameters; each tiles its parameter.
        sources: the training ranks.
        links: where the ranks run; decides who sends what several ranks hold.

    Raises:
        IncompletePlanError: an element of a parameter has no source; lists each.
    """
    copies: list[Copy] = []
    padding: list[tuple[str, Rect]] = []
    missing: list[str] = []
    for layout in targets:
        padding += [(layout.name, rect) for rect in layout.padding]
        for block in layout.blocks:
            holders = sources.holders(block.tensor)
            rest = [block.logical]
            for holder, rank, rect in _choose(reader, rest, holders, links):
                copies.append(_copy(rank, holder, layout.name, block, rect))
            missing += [f"{layout.name}: {block.tensor}{range_text(rect)}" for rect in rest]
    if missing:
        raise IncompletePlanError(
            f"{len(missing)} rectangles have no source on any training rank:\n  "
            + "\n  ".join(missing)
        )
    return RankPlan(tuple(copies), tuple(padding))


@_without_collector
def plan_sender(
    sender: int, sources: ShardedModel, targets: ShardedModel, links: Links
) -> dict[int, tuple[Copy, ...]]:
    """Plan what every engine rank reads from one training rank.

    Args:
        sender: the training rank.
        sources: the training ranks.
        targets: the engine ranks of all replicas.
        links: the same as for `plan_reader`.

    Returns:
        The copies by engine rank, the same ones (in another order) as that rank plans.

    Raises:
        IncompletePlanError: a weight of this rank is in no engine parameter; lists each.
    """
    copies: dict[int, list[Copy]] = defaultdict(list)
    unused: list[str] = []
    for tensor, held in _blocks_by_tensor(sources.rank_layouts(sender)).items():
        wanted, holders = targets.holders(tensor), sources.holders(tensor)
        for block in held:
            unused += [
                f"{tensor}{range_text(rect)}"
                for rect in _subtract_all(block.logical, (w.block.logical for w in wanted))
            ]
        own = [holder for holder in holders if sender in holder.ranks]
        for want in wanted:
            readers: set[int] = set()
            for holder in own:
                if intersect(want.block.logical, holder.block.logical):
                    readers.update(links.served(sender, holder.ranks, want.ranks))
            for reader in sorted(readers):
                rest = [want.block.logical]
                for holder, rank, rect in _choose(reader, rest, holders, links):
                    if rank == sender:
                        copies[reader].append(_copy(rank, holder, want.param, want.block, rect))
    if unused:
        raise IncompletePlanError(
            f"{len(unused)} trained rectangles are in no engine parameter:\n  "
            + "\n  ".join(unused)
        )
    return {reader: tuple(copies[reader]) for reader in sorted(copies)}


def in_order(copies: Iterable[Copy]) -> list[Copy]:
    """The copies between two ranks in the order in which both number them."""
    return sorted(copies, key=lambda copy: (copy.target_param, copy.target))


def fingerprint(copies: Iterable[Copy]) -> str:
    """Short text that is equal for the same copies in any order."""
    lines = sorted(f"{copy.target_param}{copy.target}{copy[:3]}" for copy in copies)
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def check_agreement(
    readers: Mapping[int, Mapping[int, str]], senders: Mapping[int, Mapping[int, str]]
) -> None:
    """Compare the fingerprints of both sides.

    Args:
        readers: by engine rank, by training rank.
        senders: by training rank, by engine rank.

    Raises:
        IncompletePlanError: a pair of ranks has planned differently; lists each.
    """
    read = {(s, r): text for r, own in readers.items() for s, text in own.items()}
    sent = {(s, r): text for s, own in senders.items() for r, text in own.items()}
    differing = sorted(
        pair for pair in read.keys() | sent.keys() if read.get(pair) != sent.get(pair)
    )
    if differing:
        pairs = ", ".join(f"{sender} -> {reader}" for sender, reader in differing)
        raise IncompletePlanError(f"training and rollout ranks planned differently: {pairs}")


def _choose(
    reader: int, rest: list[Rect], holders: Sequence[Holder], links: Links
) -> Iterator[tuple[Holder, int, Rect]]:
    """Who sends which part of one block; what nobody holds is left in `rest`."""
    candidates = [(holder, links.nearest(reader, holder.ranks)) for holder in holders]
    if len(candidates) > 1:
        candidates.sort(key=lambda candidate: links.kind(reader, candidate[1]))
    for holder, rank in candidates:
        if not rest:
            return
        left: list[Rect] = []
        for rect in rest:
            common = intersect(rect, holder.block.logical)
            if common is None:
                left.append(rect)
                continue
            yield holder, rank, common
            left += subtract(rect, common)
        rest[:] = left


def _copy(rank: int, holder: Holder, param: str, target: Block, rect: Rect) -> Copy:
    source = shift(rect, holder.block.logical, holder.block.local)
    return Copy(rank, holder.param, source, param, shift(rect, target.logical, target.local))


def _blocks_by_tensor(layouts: Iterable[ParamLayout]) -> dict[str, tuple[Block, ...]]:
    blocks = (block for layout in layouts for block in layout.blocks)
    return _group(blocks, lambda block: block.tensor)


def _group(items: Iterable[_T], key: Callable[[_T], _K]) -> dict[_K, tuple[_T, ...]]:
    groups: dict[_K, list[_T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return {name: tuple(group) for name, group in groups.items()}


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


def _subtract_all(rect: Rect, holes: Iterable[Rect]) -> list[Rect]:
    rest = [rect]
    for hole in holes:
        left: list[Rect] = []
        for piece in rest:
            common = intersect(piece, hole)
            left += [piece] if common is None else subtract(piece, common)
        rest = left
        if not rest:
            break
    return rest


def range_text(rect: Rect) -> str:
    """[start:stop, ...], as users write slices."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in rect) + "]"
