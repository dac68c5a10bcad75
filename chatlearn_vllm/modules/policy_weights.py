"""How do new weights enter an engine: into its live parameters, or through vLLM's own loader?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from chatlearn_vllm.layouts import CheckpointShards, ShardedModel
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.weight_sync.receiver import Arrival, ReaderPlan, WeightReceiver

if TYPE_CHECKING:
    from chatlearn_vllm.engines.vllm_engine import VLLMEngine
    from chatlearn_vllm.weight_sync.digest import Sample
    from chatlearn_vllm.weight_sync.links import Links
    from chatlearn_vllm.weight_sync.remote import Link
    from chatlearn_vllm.weight_sync.sender import Sent
    from chatlearn_vllm.weight_sync.transport import Export

logger = get_logger(__name__)

LOADER_BYTES = 512 * 2**20
"""Whole tensors that wait for vLLM's loader at a time, unless a single one is larger."""


class PolicyWeights:
    """The receiving end of the weight sync, for one engine."""

    def __init__(self, engine: VLLMEngine, path: str) -> None:
        """Choose the path.

        Args:
            engine: this rank's.
            path: `weight_sync_path` of the yaml.

        Raises:
            ValueError: the path is "direct" and the engine does not allow it.
        """
        self._engine = engine
        self._device = engine.device  # while vLLM reloads, its parameters are nowhere
        problem = engine.direct_copy_problem()
        if path == "direct" and problem:
            raise ValueError(
                f"weight_sync_path: direct is not possible: {problem}; set auto or load_weights"
            )
        self.is_direct = path == "direct" or (path == "auto" and problem is None)
        self.reason = problem or f"weight_sync_path: {path}"
        self._receiver: WeightReceiver | None = None
        self._targets: ShardedModel | None = None

    def shards(self, num_replicas: int) -> ShardedModel:
        """What a sync fills on the ranks of so many replicas like this one."""
        live = self._engine.shards(num_replicas)
        if self.is_direct:
            return live
        batch_elements = LOADER_BYTES // self._engine.dtype.itemsize
        return CheckpointShards(live.model, live.num_ranks, batch_elements)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of what a sync fills on this rank, by name."""
        if self.is_direct:
            return {name: param.dtype for name, param in self._engine.parameters().items()}
        return dict.fromkeys(self._engine.shards(1).model.tensor_names(), self._engine.dtype)

    def plan(
        self, rank: int, sources: ShardedModel, targets: ShardedModel, links: Links
    ) -> ReaderPlan:
        """See WeightReceiver.plan; `rank` counts over all replicas."""
        if self.is_direct:
            self._engine.check_layouts(targets.rank_layouts(rank))
        self._receiver, self._targets = WeightReceiver(rank), targets
        return self._receiver.plan(sources, targets, links)

    def connect(self, connections: Mapping[int, Link]) -> None:
        """See WeightReceiver.connect."""
        self._receiver.connect(connections)

    def import_from(
        self, exports: Mapping[int, Export], *, keep_open: bool, sample: Sample | None
    ) -> None:
        """Take over what training ranks show and send; the engine is STALE from here on.

        Args:
            exports: by training rank, of those whose memory is not open here yet.
            keep_open: whether the training ranks' memory stays where it is until the next sync.
            sample: which part of the weights is digested; None for no digests.
        """
        receiver = self._receiver
        try:
            with receiver.all_or_none():
                targets = self._engine.begin_weight_update()
                receiver.open(exports)
                if self.is_direct:
                    receiver.pull(targets, sample=sample, meanwhile=self._engine.forget_prefixes)
                else:
                    self._engine.load_weights(self._batches(sample))
        finally:
            if not keep_open:
                receiver.close()

    def finish(self, version: int, sent: Mapping[int, Sent]) -> Arrival:
        """Compare what has arrived with what was sent; the engine is READY if that is the same.

        Args:
            version: what the new weights are called.
            sent: by training rank, of all that send to this rank.

        Raises:
            RuntimeError: `import_from` did not succeed.
        """
        arrival = self._receiver.compare(sent)
        if arrival.is_good:
            self._engine.finish_weight_update(version)
        return arrival

    def _batches(self, sample: Sample | None) -> Iterator[tuple[str, torch.Tensor]]:
        """Gather whole tensors, batch by batch, for vLLM's loader."""
        model = self._targets.model
        batches: list[list[str]] = [[] for _ in range(self._targets.num_batches)]
        for name in model.tensor_names():
            batches[self._targets.batch_of(name)].append(name)
        for number, names in enumerate(batches):
            tensors = {
                name: torch.empty(
                    model.tensor_shape(name), dtype=self._engine.dtype, device=self._device
                )
                for name in names
            }
            self._receiver.pull(tensors, number, sample=sample)
            yield from tensors.items()
