"""How does a frozen model on megatron-core get the weights of one that is trained?"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from chatlearn_vllm.layouts import ReplicatedShards, ShardedModel
from chatlearn_vllm.modules.megatron_module import MegatronModule
from chatlearn_vllm.modules.receives_weights import IncomingWeights, ReceivesWeights

if TYPE_CHECKING:
    from chatlearn_vllm.engines.megatron.engine import MegatronEngine
    from chatlearn_vllm.weight_sync.digest import Sample
    from chatlearn_vllm.weight_sync.receiver import WeightReceiver
    from chatlearn_vllm.weight_sync.remote import LinkAddress
    from chatlearn_vllm.weight_sync.transport import Export


class MegatronWeights(IncomingWeights):
    """The receiving end of the weight sync, for one rank of a frozen model."""

    def __init__(self, engine: MegatronEngine) -> None:
        self._engine = engine
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self.version: int | None = None
        """Of the last complete sync; None before the first one."""
        self._version_before: int | None = None
        self.is_stale = False
        """Whether a sync has begun that is not complete."""

    def shards(self, num_replicas: int) -> ShardedModel:
        """See IncomingWeights."""
        return ReplicatedShards(self._engine.parameters.shards(), num_replicas)

    def dtypes(self) -> dict[str, torch.dtype]:
        """See IncomingWeights."""
        return {name: parameter.dtype for name, parameter in self._engine.parameters.named()}

    def check_targets(self, rank: int, targets: ShardedModel) -> None:
        """See IncomingWeights."""
        self._engine.parameters.check_layouts(targets.rank_layouts(rank))
        # Walking the modules takes longer than a small copy; `.data` is looked up in every sync.
        self._parameters = dict(self._engine.parameters.named())

    def take(
        self, receiver: WeightReceiver, exports: Mapping[int, Export], sample: Sample | None
    ) -> None:
        """See IncomingWeights."""
        self._engine.require_weights()
        self.is_stale = True
        receiver.open(exports)
        targets = {name: parameter.data for name, parameter in self._parameters.items()}
        receiver.pull(targets, sample=sample)

    def set_ready(self, version: int) -> None:
        """See IncomingWeights."""
        self._version_before, self.version = self.version, version
        self.is_stale = False

    def revoke(self, version: int) -> None:
        """See IncomingWeights."""
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


class WeightTargetModule(MegatronModule, ReceivesWeights, ABC):
    """A model that is trained in one role, and in another one scores with the trained weights.

    `trainable` of the yaml says which of the two a role is. The trained one is called as a training
    rank in a weight sync, see `MegatronModule`; the frozen one as one that receives.
    """

    def weight_shards(self, num_replicas: int | None = None) -> ShardedModel:
        """Where the whole model lies: on the training ranks, or on those of all frozen replicas."""
        if self.module_args.trainable:
            return super().weight_shards()
        return ReceivesWeights.weight_shards(self, num_replicas)

    def plan_weight_sync(self, *args: Any) -> Any:
        """Plan this rank's part, as a training rank or as one that receives."""
        role = MegatronModule if self.module_args.trainable else ReceivesWeights
        return role.plan_weight_sync(self, *args)

    def connect_weight_links(self, addresses: list[LinkAddress]) -> None:
        """Take the links to the other side's ranks where neither reads the other's memory."""
        role = MegatronModule if self.module_args.trainable else ReceivesWeights
        role.connect_weight_links(self, addresses)

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
