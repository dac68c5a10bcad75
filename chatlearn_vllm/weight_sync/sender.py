"""What does a training rank do in a weight sync?

It plans what is read from it, shows its memory to the ranks that can read it, sends to those that
cannot, and tells the digests of what it holds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from chatlearn_vllm.layouts import ShardedModel
from chatlearn_vllm.weight_sync.digest import EVERYTHING, Sample
from chatlearn_vllm.weight_sync.links import Links
from chatlearn_vllm.weight_sync.lora import merged_into, with_adapters
from chatlearn_vllm.weight_sync.pieces import Piece
from chatlearn_vllm.weight_sync.planner import Copy, fingerprint, plan_sender
from chatlearn_vllm.weight_sync.remote import Link, all_or_none, listen
from chatlearn_vllm.weight_sync.transport import Export, export_tensors
from chatlearn_vllm.weight_sync.verify import Digester


@dataclass(frozen=True)
class Sent:
    """What a training rank holds while it is read, for the driver."""

    generation: int
    """Of its memory; see `Export.generation`."""
    digests: list[dict[int, np.ndarray]]
    """By batch: of the copies to each engine rank, int64, in the order of `in_order`."""


class WeightSender:
    """One training rank's side of the sync.

    Example:
        sender = WeightSender(rank, parameters, generation)
        sender.plan(sources, targets, links)                              # once
        export = sender.export()                                          # when memory moved
        sent = sender.sent()                                              # each sync
    """

    def __init__(
        self,
        rank: int,
        tensors: Callable[[], Mapping[str, torch.Tensor]],
        generation: Callable[[], int],
    ) -> None:
        """Name the rank and its weights.

        Args:
            rank: of the training world.
            tensors: gives the rank's weights by the names of its layouts, adapters by those of
                `lora.adapter_names`.
            generation: gives a number that rises whenever their memory has moved.
        """
        self._rank, self._tensors, self._generation = rank, tensors, generation
        self._batches: list[_Batch] = []
        self._connections: dict[int, Link] = {}

    def plan(
        self,
        sources: ShardedModel,
        targets: ShardedModel,
        links: Links,
        target_dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> dict[int, str]:
        """Plan what the engine ranks read here.

        Args:
            sources: the training ranks.
            targets: the engine ranks.
            links: where all run.
            target_dtypes: of the engine's parameters by name, where they may differ from the
                training rank's.

        Returns:
            Fingerprint of the copies to each engine rank, by rank.

        Raises:
            IncompletePlanError: a weight of this rank is in no engine parameter.
        """
        planned = plan_sender(self._rank, sources, targets, links)
        shapes = {layout.name: layout.shape for layout in sources.rank_layouts(self._rank)}
        everything: dict[int, list[Copy]] = {}
        self._batches = []
        for number in range(targets.num_batches):
            copies = {}
            for reader, own in planned.items():
                part = [copy for copy in own if targets.batch_of(copy.target_param) == number]
                if part:
                    copies[reader] = with_adapters(part, sources.low_rank, shapes)
                    everything.setdefault(reader, []).extend(copies[reader])
            self._batches.append(_Batch(copies, target_dtypes or {}))
        return {reader: fingerprint(own) for reader, own in everything.items()}

    def listen(self) -> int:
        """Listen for the other ends of links; the port."""
        self._store = listen()
        return self._store.port

    def connect(self, connections: Mapping[int, Link]) -> None:
        """Give the links to engine ranks that cannot read this rank, in working order."""
        self._connections = dict(connections)

    def export(self) -> Export:
        """Show the weights to engine ranks on this host; they must stay until these are done."""
        return export_tensors(self._tensors(), self._generation())

    def send(self) -> None:
        """Send to the engine ranks that cannot read this one; they receive at the same time."""
        tensors = self._tensors()
        with all_or_none(self._connections.values()):
            for batch in self._batches:
                for reader, link in self._connections.items():
                    if reader in batch.copies:
                        link.send(batch.copies[reader], tensors)

    def sent(self, sample: Sample | None = EVERYTHING) -> Sent:
        """Say what engine ranks should have.

        Args:
            sample: which part of every rectangle is digested; None for no digests.
        """
        digests = []
        if sample is not None:
            tensors = self._tensors()
            digests = [batch.digests(tensors, sample) for batch in self._batches]
        return Sent(self._generation(), digests)


class _Batch:
    """What goes to each engine rank together."""

    def __init__(
        self, copies: dict[int, list[Copy]], target_dtypes: Mapping[str, torch.dtype]
    ) -> None:
        self.copies = copies
        # Many engine ranks may read the same rectangle: it is digested once.
        numbers: dict[tuple[Piece, torch.dtype | None], int] = {}
        self._pieces_of: dict[int, np.ndarray] = {}
        for reader, own in copies.items():
            place_of = merged_into(own)
            keys = []
            for copy in own:
                param = place_of.get(copy.target_param, copy.target_param)
                keys.append(((copy.source_param, copy.source), target_dtypes.get(param)))
            self._pieces_of[reader] = np.array([numbers.setdefault(k, len(numbers)) for k in keys])
        self._digester = Digester([piece for piece, _ in numbers], [dtype for _, dtype in numbers])

    def digests(self, tensors: Mapping[str, torch.Tensor], sample: Sample) -> dict[int, np.ndarray]:
        values = self._digester.digests(tensors, sample)
        return {reader: values[numbers] for reader, numbers in self._pieces_of.items()}
