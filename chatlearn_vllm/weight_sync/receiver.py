"""What does an engine rank do in a weight sync?

It plans what it reads and from whom, opens what training ranks show, copies, and tells the digests
of what it has now. Ranks whose memory it cannot read send to it over a link.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from chatlearn_vllm.layouts import ParamLayout, ShardedModel
from chatlearn_vllm.weight_sync.digest import EVERYTHING, Sample
from chatlearn_vllm.weight_sync.links import LinkKind, Links
from chatlearn_vllm.weight_sync.lora import (
    is_scratch,
    merge_copies,
    merged_into,
    with_adapters,
)
from chatlearn_vllm.weight_sync.pieces import view_of
from chatlearn_vllm.weight_sync.planner import (
    Copy,
    RankPlan,
    fingerprint,
    plan_reader,
    range_text,
)
from chatlearn_vllm.weight_sync.remote import Link, all_or_none
from chatlearn_vllm.weight_sync.sender import Sent
from chatlearn_vllm.weight_sync.transport import Export, OpenedExport, Puller
from chatlearn_vllm.weight_sync.verify import Digester

MAX_DESCRIBED = 10
"""Wrong copies that an `Arrival` describes."""

Digests = dict[int, np.ndarray]
"""By training rank: int64, one per copy, in the order of `in_order`."""


@dataclass(frozen=True)
class ReaderPlan:
    """What an engine rank will read, for the driver."""

    fingerprints: dict[int, str]
    """Of the copies from each training rank."""
    num_elements: dict[LinkKind, int]
    """To be read in a sync, by what they cross."""


@dataclass(frozen=True)
class Arrival:
    """Whether an engine rank has what it should, for the driver."""

    num_bytes: int
    """Of the weights copied into tensors of this rank."""
    num_wrong: int
    """Copies that do not hold what was sent."""
    wrong: list[str]
    """The first of them: parameter, ranks and ranges."""
    has_moved: bool
    """Whether they were read where a training rank's weights were once, but are not now."""

    @property
    def is_good(self) -> bool:
        """Whether the weights are those that were sent."""
        return not self.num_wrong and not self.has_moved


class WeightReceiver:
    """One engine rank's side of the sync.

    Example:
        receiver = WeightReceiver(rank)
        receiver.plan(sources, targets, links)                    # once
        receiver.open({0: export})                                # when memory moved
        receiver.pull(engine.begin_weight_update())               # each sync
        arrival = receiver.compare({0: sent})
    """

    def __init__(self, rank: int) -> None:
        """Name the rank, counted over all replicas."""
        self._rank = rank
        self._batches: list[_Batch] = []
        self._arrived: list[_Arrived] = []
        self._opened: dict[int, OpenedExport] = {}
        self._connections: dict[int, Link] = {}

    def plan(self, sources: ShardedModel, targets: ShardedModel, links: Links) -> ReaderPlan:
        """Plan what this rank reads.

        Args:
            sources: the training ranks.
            targets: the engine ranks.
            links: where all run.

        Raises:
            IncompletePlanError: an element has no source; lists each.
        """
        own_layouts = targets.rank_layouts(self._rank)
        # A rank that takes nothing has no batch to wait for.
        num_batches = targets.num_batches if own_layouts else 0
        batches: list[list[ParamLayout]] = [[] for _ in range(num_batches)]
        for layout in own_layouts:
            batches[targets.batch_of(layout.name)].append(layout)
        self._batches = [
            _Batch(plan_reader(self._rank, layouts, sources, links), sources) for layouts in batches
        ]
        copies: dict[int, list[Copy]] = {}
        for batch in self._batches:
            for rank, own in batch.copies.items():
                copies.setdefault(rank, []).extend(own)
        num_elements = dict.fromkeys(LinkKind, 0)
        for rank, own in copies.items():
            num_elements[links.kind(self._rank, rank)] += sum(c.num_elements for c in own)
        return ReaderPlan({rank: fingerprint(own) for rank, own in copies.items()}, num_elements)

    def connect(self, connections: Mapping[int, Link]) -> None:
        """Give the links to training ranks whose memory cannot be read, in working order."""
        self._connections = dict(connections)

    def all_or_none(self) -> AbstractContextManager[None]:
        """Surrounds what a rank does in a sync: if that fails, no sender waits for the rank."""
        return all_or_none(self._connections.values())

    def open(self, exports: Mapping[int, Export]) -> None:
        """Open what training ranks show, in place of what they showed before; a sync begins."""
        self._arrived = []
        for rank, export in exports.items():
            if rank in self._opened:
                self._opened.pop(rank).close()
            self._opened[rank] = OpenedExport(export)

    def close(self) -> None:
        """Let go of the training ranks' memory, so that they may move it."""
        for opened in self._opened.values():
            opened.close()
        self._opened = {}

    def pull(
        self,
        targets: Mapping[str, torch.Tensor],
        batch: int = 0,
        *,
        sample: Sample | None = EVERYTHING,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy a batch; returns when the weights are there, and digested.

        Args:
            targets: the tensors to be filled, by the names of their layouts.
            batch: its number; all batches are pulled in order, once in each sync.
            sample: which part of every rectangle is digested; None for no digests.
            meanwhile: called once, while a GPU copies.

        Raises:
            RuntimeError: it is another batch's turn.
        """
        if batch != len(self._arrived):
            raise RuntimeError(f"batch {len(self._arrived)} of weights must come before {batch}")
        digests = self._batches[batch].pull(
            targets, self._opened, self._connections, sample, meanwhile
        )
        generations = {rank: opened.generation for rank, opened in self._opened.items()}
        num_bytes = self._batches[batch].num_elements * next(iter(targets.values())).itemsize
        self._arrived.append(_Arrived(num_bytes, generations, digests))

    def compare(self, sent: Mapping[int, Sent]) -> Arrival:
        """Compare what has arrived since `open` with what training ranks say they sent.

        Args:
            sent: by training rank, of all that this rank plans to read.

        Raises:
            RuntimeError: not all batches have arrived.
        """
        if len(self._arrived) < len(self._batches):
            raise RuntimeError(
                f"{len(self._arrived)} of {len(self._batches)} batches of weights have arrived"
            )
        wrong = [
            batch.copies[rank][copy]
            for number, (batch, arrived) in enumerate(
                zip(self._batches, self._arrived, strict=True)
            )
            for rank, values in arrived.digests.items()
            for copy in np.flatnonzero(values != sent[rank].digests[number][self._rank])
        ]
        has_moved = any(
            sent[rank].generation != generation
            for arrived in self._arrived
            for rank, generation in arrived.generations.items()
        )
        described = [
            f"{copy.target_param}{range_text(copy.target)} of rollout rank {self._rank}, from "
            f"{copy.source_param}{range_text(copy.source)} of training rank {copy.source_rank}"
            for copy in wrong[:MAX_DESCRIBED]
        ]
        num_bytes = sum(arrived.num_bytes for arrived in self._arrived)
        return Arrival(num_bytes, len(wrong), described, has_moved)


class _Arrived(NamedTuple):
    """What has come with a batch."""

    num_bytes: int
    """Adapters aside."""
    generations: dict[int, int]
    """Of the memory that was read, by training rank; see `Export.generation`."""
    digests: Digests
    """Of what the tensors held before adapters were merged into them; may be empty."""


class _Batch:
    """Copies that are done together, with what is kept for them between syncs."""

    def __init__(self, plan: RankPlan, sources: ShardedModel) -> None:
        self._low_rank = sources.low_rank
        self._padding = plan.padding
        self.num_elements = plan.num_elements
        self.copies: dict[int, list[Copy]] = {}
        for rank, own in plan.by_source().items():
            shapes = {}
            if self._low_rank:
                shapes = {layout.name: layout.shape for layout in sources.rank_layouts(rank)}
            self.copies[rank] = with_adapters(own, self._low_rank, shapes)
        self._scratch = [
            copy for own in self.copies.values() for copy in own if is_scratch(copy.target_param)
        ]
        self._merged_into = merged_into(copy for own in self.copies.values() for copy in own)
        self._puller: Puller | None = None
        self._digester = Digester(
            [(copy.target_param, copy.target) for own in self.copies.values() for copy in own]
        )

    @torch.no_grad()
    def pull(
        self,
        targets: Mapping[str, torch.Tensor],
        opened: Mapping[int, OpenedExport],
        connections: Mapping[int, Link],
        sample: Sample | None,
        meanwhile: Callable[[], None],
    ) -> Digests:
        if self._scratch:
            targets = {**targets, **self._make_scratch(targets)}
        readable = [rank for rank in self.copies if rank not in connections]
        if self._puller is None:
            self._puller = Puller([copy for rank in readable for copy in self.copies[rank]])
        self._puller.pull({rank: opened[rank] for rank in readable}, targets)
        meanwhile()
        for rank, link in connections.items():
            if rank in self.copies:
                link.receive(self.copies[rank], targets)
        for name, rect in self._padding:
            view_of(targets[name], rect).zero_()
        digests = {}
        if sample is not None:
            values = self._digester.digests(targets, sample)
            ends = np.cumsum([len(own) for own in self.copies.values()])
            digests = dict(zip(self.copies, np.split(values, ends[:-1]), strict=True))
        if self._low_rank:
            for own in self.copies.values():
                merge_copies(own, self._low_rank, targets)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return digests

    def _make_scratch(self, targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Memory for the adapters that are merged after the copy."""
        made = {}
        for copy in self._scratch:
            like = targets[self._merged_into[copy.target_param]]
            sizes = [stop for _, stop in copy.target]
            made[copy.target_param] = torch.empty(sizes, dtype=like.dtype, device=like.device)
        return made
