"""How do new weights enter an engine: into its live parameters, or through vLLM's own loader?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from chatlearn_vllm.layouts import CheckpointShards, ShardedModel
from chatlearn_vllm.modules.receives_weights import IncomingWeights

if TYPE_CHECKING:
    from chatlearn_vllm.engines.live_model import LiveModel
    from chatlearn_vllm.weight_sync.digest import Sample
    from chatlearn_vllm.weight_sync.receiver import WeightReceiver
    from chatlearn_vllm.weight_sync.transport import Export

LOADER_BYTES = 512 * 2**20
"""Whole tensors that wait for vLLM's loader at a time, unless a single one is larger."""


class PolicyWeights(IncomingWeights):
    """The receiving end of the weight sync, for one engine or the model that drafts for it."""

    def __init__(self, engine: LiveModel, path: str) -> None:
        """Choose the path.

        Args:
            engine: this rank's, or its draft.
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
        self._targets: ShardedModel | None = None

    def shards(self, num_replicas: int) -> ShardedModel:
        """What a sync fills on the ranks of so many replicas like this one."""
        live = self._engine.shards(num_replicas)
        if self.is_direct:
            return live
        batch_elements = LOADER_BYTES // self._engine.dtype.itemsize
        return CheckpointShards(
            live.model, live.num_ranks, batch_elements,
            ranks_per_loader=self._engine.ranks_per_loader,
        )  # fmt: skip

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of what a sync fills on this rank, by name."""
        if self.is_direct:
            return {name: param.dtype for name, param in self._engine.parameters().items()}
        return dict.fromkeys(self._engine.shards(1).model.tensor_names(), self._engine.dtype)

    def check_targets(self, rank: int, targets: ShardedModel) -> None:
        """See IncomingWeights."""
        if self.is_direct:
            self._engine.check_layouts(targets.rank_layouts(rank))
        self._targets = targets

    def take(
        self, receiver: WeightReceiver, exports: Mapping[int, Export], sample: Sample | None
    ) -> None:
        """See IncomingWeights."""
        parameters = self._engine.begin_weight_update()
        receiver.open(exports)
        if self.is_direct:
            receiver.pull(parameters, sample=sample, meanwhile=self._engine.forget_prefixes)
        else:
            self._engine.load_weights(self._batches(sample))

    def set_ready(self, version: int) -> None:
        """See IncomingWeights."""
        self._engine.finish_weight_update(version)

    def revoke(self, version: int) -> None:
        """See IncomingWeights."""
        self._engine.revoke_weight_update(version)

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
