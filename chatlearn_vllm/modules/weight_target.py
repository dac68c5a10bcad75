"""How does a frozen model on megatron-core get the weights of one that is trained?"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from chatlearn_vllm.layouts import ReplicatedShards, ShardedModel
from chatlearn_vllm.modules.megatron_module import MegatronModule
from chatlearn_vllm.weight_sync.receiver import Arrival, ReaderPlan, WeightReceiver
from chatlearn_vllm.weight_sync.remote import LinkAddress, open_links

if TYPE_CHECKING:
    from chatlearn_vllm.engines.megatron.engine import MegatronEngine
    from chatlearn_vllm.weight_sync.digest import Sample
    from chatlearn_vllm.weight_sync.links import Links
    from chatlearn_vllm.weight_sync.remote import Link
    from chatlearn_vllm.weight_sync.sender import Sent
    from chatlearn_vllm.weight_sync.transport import Export


class MegatronWeights:
    """The receiving end of the weight sync, for one rank of a frozen model.

    As `PolicyWeights` is for an engine of vLLM. The weights are STALE from the moment a copy begins
    until it is found to be what was sent.
    """

    def __init__(self, engine: MegatronEngine) -> None:
        self._engine = engine
        self._receiver: WeightReceiver | None = None
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self.version: int | None = None
        """Of the last complete sync; None before the first one."""
        self._version_before: int | None = None
        self.is_stale = False
        """Whether a sync has begun that is not complete."""

    def shards(self, num_replicas: int) -> ShardedModel:
        """What a sync fills on the ranks of so many replicas like this one."""
        return ReplicatedShards(self._engine.shards(), num_replicas)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of what a sync fills on this rank, by name."""
        return {name: parameter.dtype for name, parameter in self._engine.named_parameters()}

    def plan(
        self, rank: int, sources: ShardedModel, targets: ShardedModel, links: Links
    ) -> ReaderPlan:
        """See WeightReceiver.plan; `rank` counts over all replicas."""
        self._engine.check_layouts(targets.rank_layouts(rank))
        # Walking the modules takes longer than a small copy; `.data` is looked up in every sync.
        self._parameters = dict(self._engine.named_parameters())
        self._receiver = WeightReceiver(rank)
        return self._receiver.plan(sources, targets, links)

    def connect(self, connections: Mapping[int, Link]) -> None:
        """See WeightReceiver.connect."""
        self._receiver.connect(connections)

    def import_from(
        self, exports: Mapping[int, Export], *, keep_open: bool, sample: Sample | None
    ) -> None:
        """Take over what training ranks show and send; the weights are STALE from here on.

        Args:
            exports: by training rank, of those whose memory is not open here yet.
            keep_open: whether the training ranks' memory stays where it is until the next sync.
            sample: which part of the weights is digested; None for no digests.

        Raises:
            RuntimeError: the weights are offloaded.
        """
        receiver = self._receiver
        try:
            with receiver.all_or_none():
                self._engine.require_weights()
                self.is_stale = True
                receiver.open(exports)
                targets = {name: parameter.data for name, parameter in self._parameters.items()}
                receiver.pull(targets, sample=sample)
        finally:
            if not keep_open:
                receiver.close()

    def finish(self, version: int, sent: Mapping[int, Sent]) -> Arrival:
        """Compare what has arrived with what was sent; the weights are READY if it is the same.

        Args:
            version: what the new weights are called.
            sent: by training rank, of all that send to this rank.

        Raises:
            RuntimeError: `import_from` did not succeed.
        """
        arrival = self._receiver.compare(sent)
        if arrival.is_good:
            self._version_before, self.version = self.version, version
            self.is_stale = False
        return arrival

    def revoke(self, version: int) -> None:
        """Declare the weights STALE again if they are READY at `version`."""
        if not self.is_stale and self.version == version:
            self.version, self.is_stale = self._version_before, True

    def require_ready(self) -> None:
        """Check that no sync is half done.

        Raises:
            RuntimeError: one is.
        """
        if self.is_stale:
            raise RuntimeError(
                f"the weights are STALE({self.version}): the last weight sync is not complete; "
                "sync again before using the model"
            )


class WeightTargetModule(MegatronModule, ABC):
    """A model that is trained in one role, and in another one scores with the trained weights.

    `trainable` of the yaml says which of the two a role is. The trained one is called as a training
    rank in a weight sync, see `MegatronModule`; the frozen one as a rollout rank, see `VLLMModule`.
    A method that both have does what fits, so either can be what `WeightSynchronizer` calls.
    """

    def weight_shards(self, num_replicas: int | None = None) -> ShardedModel:
        """Where the whole model lies: on the training ranks, or on those of all frozen replicas."""
        if self.module_args.trainable:
            return super().weight_shards()
        return self._weights.shards(num_replicas)

    def weight_dtypes(self) -> dict[str, torch.dtype]:
        """Frozen: dtypes of what a weight sync fills on this rank, by name."""
        return self._weights.dtypes()

    def plan_weight_sync(self, *args: Any) -> Any:
        """Trained: see `MegatronModule.plan_weight_sync`. Frozen: plan this rank's copies.

        Frozen, the arguments are (rank over all replicas, sources, targets, links) and the result
        is a ReaderPlan.
        """
        if self.module_args.trainable:
            return super().plan_weight_sync(*args)
        return self._weights.plan(*args)

    def connect_weight_links(self, addresses: list[LinkAddress]) -> None:
        """Take the links to the other side's ranks where neither reads the other's memory."""
        if self.module_args.trainable:
            super().connect_weight_links(addresses)
            return
        timeout_s = 60.0 * self.model_args.distributed_timeout_minutes
        self._weights.connect(
            open_links(addresses, is_sender=False, device=self.engine.device, timeout_s=timeout_s)
        )

    def import_weights(
        self,
        source_ranks: tuple[int, ...],
        keep_open: bool,
        sample: Sample | None,
        *exports: Export,
    ) -> None:
        """Frozen: copy new weights, which are STALE until `finish_weight_sync`.

        Args:
            source_ranks: training ranks that show memory which is not open here yet.
            keep_open: whether that memory stays where it is until the next sync.
            sample: which part of the weights is digested; None for no digests.
            *exports: of these ranks, in that order.
        """
        self._weights.import_from(
            dict(zip(source_ranks, exports, strict=True)), keep_open=keep_open, sample=sample
        )

    def finish_weight_sync(
        self, version: int, source_ranks: tuple[int, ...], *sent: Sent
    ) -> Arrival:
        """Frozen: declare the weights READY, if those that came are those that were sent.

        Args:
            version: what the new weights are called from now on.
            source_ranks: all training ranks that this rank reads, or that send to it.
            *sent: what these say, in that order.
        """
        return self._weights.finish(version, dict(zip(source_ranks, sent, strict=True)))

    def revoke_weight_sync(self, version: int) -> None:
        """Frozen: declare the weights of `version` STALE: another rank did not get them."""
        self._weights.revoke(version)

    def require_ready(self) -> None:
        """Check that the weights are those of one version; call it before scoring.

        Raises:
            RuntimeError: a weight sync is half done.
        """
        if not self.module_args.trainable:
            self._weights.require_ready()

    @cached_property
    def _weights(self) -> MegatronWeights:
        return MegatronWeights(self.engine)
