"""How do the trainer's weights get into every rollout rank, seen from the driver?

Once: every training rank says which rectangles of the model it holds, every rollout rank plans
what to read from whom. Each sync: the planned training ranks hand out descriptions of their
memory, the rollout ranks read it. The weights never pass through the driver.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.runtime.worker_group import PendingCall, WorkerGroup, gather
from chatlearn_vllm.weight_sync.planner import check_all_sources_used

logger = get_logger(__name__)


@dataclass(frozen=True)
class SyncReport:
    """What one sync did."""

    version: int
    """Weight version that every rollout rank has now."""
    num_bytes: int
    """Bytes written, over all rollout ranks."""
    seconds: float
    """From the first call until the last rank is done."""


class WeightSynchronizer:
    """Copies the trainer's weights into the rollout ranks, and counts the versions.

    Example:
        sync = WeightSynchronizer(trainer, policy)
        sync.setup()
        sync.sync()    # version 1, before the first episode
    """

    def __init__(self, trainer: WorkerGroup, policy: WorkerGroup, version: int = 0) -> None:
        """Prepare.

        Args:
            trainer: one replica whose ranks have `weight_layout` and `export_weights`.
            policy: replicas whose ranks have `weight_layout`, `plan_weight_sync` and
                `import_weights`.
            version: of the weights before the first sync; 0 unless the job is resumed.
        """
        self._trainer = trainer
        self._policy = policy
        self._source_ranks: list[tuple[int, ...]] = []
        self.version = version

    def setup(self) -> None:
        """Make the plan of every rollout rank. Once; the models are built by now.

        Raises:
            RankError: a weight of a rollout rank has no source.
            ValueError: a weight of the trainer has no destination.
        """
        sources = dict(enumerate(self._trainer.call("weight_layout")))
        targets = self._policy.call("weight_layout")
        ranks_per_replica = len(self._policy.replicas[0])
        check_all_sources_used(targets[:ranks_per_replica], sources)
        stored_sources = ray.put(sources)
        self._source_ranks = self._policy.call_each(
            "plan_weight_sync",
            [(stored_sources, self._nearest_first(i)) for i in range(len(self._policy.ranks))],
        )
        logger.info(
            "weight sync: %d rollout ranks read from %d of %d training ranks",
            len(self._policy.ranks),
            len(set().union(*self._source_ranks)),
            len(self._trainer.ranks),
        )

    def sync(self) -> SyncReport:
        """Copy all weights; afterwards every rollout rank has version `self.version`.

        Raises:
            RankError: a rank of either side failed.
        """
        start = time.perf_counter()
        self.version += 1
        exports = {
            rank: self._trainer.start_on(rank, "export_weights")
            for rank in sorted(set().union(*self._source_ranks))
        }
        imports = [
            self._start_import(index, [exports[rank] for rank in source_ranks])
            for index, source_ranks in enumerate(self._source_ranks)
        ]
        num_bytes = sum(gather(imports, inputs=list(exports.values())))
        return SyncReport(self.version, num_bytes, time.perf_counter() - start)

    def _start_import(self, index: int, exports: Sequence[PendingCall]) -> PendingCall:
        # References as arguments of their own: Ray then moves the exports from rank to rank.
        references: list[Any] = [export.result for export in exports]
        return self._policy.start_on(index, "import_weights", self.version, *references)

    def _nearest_first(self, index: int) -> list[int]:
        """Training ranks on the reader's GPU, then those on its host; equals take turns."""
        reader = self._policy.ranks[index].location
        sources = [rank.location for rank in self._trainer.ranks]

        def distance(rank: int) -> tuple[bool, int]:
            other_device = sources[rank].device != reader.device
            return other_device, (rank - index) % len(sources)

        same_host = [rank for rank, at in enumerate(sources) if at.node_id == reader.node_id]
        return sorted(same_host, key=distance)
