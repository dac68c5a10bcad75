"""How does a model that does not train get the weights of one that does?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from chatlearn_vllm.layouts import ShardedModel
    from chatlearn_vllm.weight_sync.digest import Sample
    from chatlearn_vllm.weight_sync.links import Links
    from chatlearn_vllm.weight_sync.receiver import Arrival, ReaderPlan, WeightReceiver
    from chatlearn_vllm.weight_sync.remote import Link, LinkAddress
    from chatlearn_vllm.weight_sync.sender import Sent
    from chatlearn_vllm.weight_sync.transport import Export


MODEL = "model"
"""The part of a module that a sync fills: the model itself."""
DRAFT = "draft"
"""The small model of a policy that drafts tokens for it."""


class IncomingWeights(ABC):
    """The receiving end of the weight sync, on one rank.

    The model's weights are STALE from the moment a copy begins until it is found to be what was
    sent.
    """

    _receiver: WeightReceiver

    @abstractmethod
    def shards(self, num_replicas: int) -> ShardedModel:
        """What a sync fills on the ranks of so many replicas like this one."""

    @abstractmethod
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of what a sync fills on this rank, by name."""

    @abstractmethod
    def check_targets(self, rank: int, targets: ShardedModel) -> None:
        """Compare what a plan fills on this rank with the model; look up what copies need.

        Raises:
            ValueError: they differ.
        """

    @abstractmethod
    def take(
        self, receiver: WeightReceiver, exports: Mapping[int, Export], sample: Sample | None
    ) -> None:
        """Declare the weights STALE, `receiver.open(exports)`, and pull them."""

    @abstractmethod
    def set_ready(self, version: int) -> None:
        """Declare the weights READY at `version`."""

    @abstractmethod
    def revoke(self, version: int) -> None:
        """Declare the weights STALE again if they are READY at `version`."""

    def plan(
        self, rank: int, sources: ShardedModel, targets: ShardedModel, links: Links
    ) -> ReaderPlan:
        """See WeightReceiver.plan; `rank` counts over all replicas."""
        from chatlearn_vllm.weight_sync.receiver import WeightReceiver

        self.check_targets(rank, targets)
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
            RuntimeError: the model's memory is not there to write to.
        """
        receiver = self._receiver
        try:
            with receiver.all_or_none():
                self.take(receiver, exports, sample)
        finally:
            if not keep_open:
                receiver.close()

    def finish(self, version: int, sent: Mapping[int, Sent]) -> Arrival:
        """Compare what has arrived with what was sent; the weights are READY if that is the same.

        Args:
            version: what the new weights are called.
            sent: by training rank, of all that send to this rank.

        Raises:
            RuntimeError: `import_from` did not succeed.
        """
        arrival = self._receiver.compare(sent)
        if arrival.is_good:
            self.set_ready(version)
        return arrival


class ReceivesWeights(ABC):
    """What `WeightSynchronizer` calls on the ranks of a module that gets weights.

    A module may hold several models that get theirs from different trainers; `part` says which.
    """

    @property
    @abstractmethod
    def _weights(self) -> IncomingWeights:
        """This rank's receiving end for the model itself."""

    def _incoming(self, part: str) -> IncomingWeights:
        """This rank's receiving end for a part of the module."""
        if part != MODEL:
            raise ValueError(f"{type(self).__name__} has no {part} that a weight sync could fill")
        return self._weights

    def weight_shards(self, num_replicas: int, *, part: str = MODEL) -> ShardedModel:
        """What a weight sync fills on the ranks of all replicas."""
        return self._incoming(part).shards(num_replicas)

    def weight_dtypes(self, *, part: str = MODEL) -> dict[str, torch.dtype]:
        """Of what a weight sync fills on this rank, by name."""
        return self._incoming(part).dtypes()

    def plan_weight_sync(
        self,
        rank: int,
        sources: ShardedModel,
        targets: ShardedModel,
        links: Links,
        *,
        part: str = MODEL,
    ) -> ReaderPlan:
        """Plan this rank's copies, for `import_weights`.

        Args:
            rank: this rank's number over all replicas.
            sources: the training ranks.
            targets: the ranks of all replicas.
            links: where all run.
            part: `MODEL`, or `DRAFT` of a policy; so in all methods here.
        """
        return self._incoming(part).plan(rank, sources, targets, links)

    def connect_weight_links(self, addresses: list[LinkAddress], *, part: str = MODEL) -> None:
        """Take the links from training ranks whose memory this rank cannot read, in order."""
        from chatlearn_vllm.weight_sync.remote import open_links

        timeout_s = 60.0 * self.model_args.distributed_timeout_minutes
        self._incoming(part).connect(
            open_links(addresses, is_sender=False, device=self.engine.device, timeout_s=timeout_s)
        )

    def import_weights(
        self,
        source_ranks: tuple[int, ...],
        keep_open: bool,
        sample: Sample | None,
        *exports: Export,
        part: str = MODEL,
    ) -> None:
        """Copy new weights, which are STALE until `finish_weight_sync`.

        Args:
            source_ranks: training ranks that show memory which is not open here yet.
            keep_open: whether that memory stays where it is until the next sync.
            sample: which part of the weights is digested; None for no digests.
            *exports: of these ranks, in that order.
            part: see `plan_weight_sync`.
        """
        self._incoming(part).import_from(
            dict(zip(source_ranks, exports, strict=True)), keep_open=keep_open, sample=sample
        )

    def finish_weight_sync(
        self, version: int, source_ranks: tuple[int, ...], *sent: Sent, part: str = MODEL
    ) -> Arrival:
        """Declare the weights READY, if those that `import_weights` copied are those sent.

        Args:
            version: what the new weights are called from now on.
            source_ranks: all training ranks that this rank reads, or that send to it.
            *sent: what these say, in that order.
            part: see `plan_weight_sync`.
        """
        return self._incoming(part).finish(version, dict(zip(source_ranks, sent, strict=True)))

    def revoke_weight_sync(self, version: int, *, part: str = MODEL) -> None:
        """Declare the weights of `version` STALE: another rank did not get them."""
        self._incoming(part).revoke(version)
