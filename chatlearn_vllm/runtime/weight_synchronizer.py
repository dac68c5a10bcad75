"""How do the trainer's weights get into every rollout rank, seen from the driver?

Once: every rank of both sides plans its part from the parallel sizes of both, and the plans are
compared. Each sync: training ranks show or send their memory, rollout ranks copy; both tell the
digests of what they have; only when all are equal are the engines declared READY. The weights never
pass through the driver.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from chatlearn_vllm.modules.receives_weights import MODEL
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.runtime.worker_group import PendingCall, WorkerGroup, gather
from chatlearn_vllm.weight_sync.digest import EVERYTHING, Sample
from chatlearn_vllm.weight_sync.links import LinkKind, Links, Place
from chatlearn_vllm.weight_sync.planner import check_agreement
from chatlearn_vllm.weight_sync.receiver import MAX_DESCRIBED, Arrival, ReaderPlan
from chatlearn_vllm.weight_sync.remote import LinkAddress
from chatlearn_vllm.weight_sync.schedule import schedule

logger = get_logger(__name__)

DIGESTS_FIRST = 4
"""Training ranks whose digests are started before the copies. Later they would take turns with the
copy of a rollout rank on the same GPU (0.3 ms); but each call takes 0.1 ms until the last copy may
begin."""

REVOKE_WAIT_S = 10.0
"""How long a failed sync waits for ranks that may be stuck in it to hear that it failed."""


class WeightMismatchError(RuntimeError):
    """What arrived is not what was sent; the message lists parameters, ranks and ranges."""


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

    def __init__(
        self,
        trainer: WorkerGroup,
        policy: WorkerGroup,
        version: int = 0,
        *,
        keep_open: bool = True,
        stride: int | None = 1,
        part: str = MODEL,
    ) -> None:
        """Prepare.

        Args:
            trainer: one replica of a `MegatronModule`.
            policy: replicas of a `VLLMModule`.
            version: of the weights before the first sync; 0 unless the job is resumed.
            keep_open: whether the trainer's weights stay where they are between syncs; otherwise
                rollout ranks let go of them after each.
            stride: digests take one of so many parts of every weight, another one in each sync;
                the first sync takes everything. None for no digests.
            part: which of the policy's models; see `ReceivesWeights`.
        """
        self._trainer, self._policy = trainer, policy
        # Modules of one model need not know that others have several.
        self._part = {} if part == MODEL else {"part": part}
        self._what = "" if part == MODEL else f" of the {part}"
        self.keep_open, self.stride = keep_open, stride
        """See the arguments; may be changed between two syncs."""
        self._readable: list[tuple[int, ...]] = []
        """For each rollout rank the training ranks whose memory it reads."""
        self._sources: list[tuple[int, ...]] = []
        """For each rollout rank all training ranks that it gets something from."""
        self._sending: list[int] = []
        """Training ranks that send over links."""
        self._far: list[tuple[int, int]] = []
        """(training rank, rollout rank) pairs that need a link."""
        self._through_host = False
        """Whether what travels over links lies in main memory."""
        self._num_connects = 0
        self._is_connected = False
        self._is_readable_in_place = True
        """Whether an opened export shows what the trainer holds now, not a copy of then."""
        self._is_open = False
        """Whether the trainer's memory is open since an earlier sync."""
        self._has_synced = False
        """Whether the last sync was good."""
        self.version = version

    # ---- once -------------------------------------------------------------------------------

    def setup(self) -> None:
        """Make and compare the plans of all ranks. Once; the models are built by now.

        Raises:
            RankError: a weight of a rollout rank has no source, a weight of the trainer has no
                destination, or a model is not the one that its config.json describes.
            IncompletePlanError: the two sides planned differently.
        """
        places, policy_places = _places(self._trainer), _places(self._policy)
        self._is_readable_in_place = all(place.device is not None for place in places)
        # A policy whose engine is a server elsewhere may have no GPU.
        self._through_host = any(place.device is None for place in (*places, *policy_places))
        links = Links(places, policy_places, len(self._policy.replicas[0]))
        (sources,) = gather([self._trainer.start_on(0, "weight_shards")])
        num_replicas = len(self._policy.replicas)
        (targets,) = gather([self._policy.start_on(0, "weight_shards", num_replicas, **self._part)])
        dtypes: dict[str, Any] = {}
        for own in gather(
            [
                self._policy.start_on(rank, "weight_dtypes", **self._part)
                for rank in range(len(self._policy.replicas[0]))
            ]
        ):
            dtypes |= own
        shared = [ray.put(one) for one in (sources, targets, links)]
        readers = self._policy.call_each(
            "plan_weight_sync",
            [(rank, *shared) for rank in range(len(self._policy.ranks))],
            **self._part,
        )
        senders = self._trainer.call("plan_weight_sync", *shared, ray.put(dtypes))
        check_agreement(
            {rank: plan.fingerprints for rank, plan in enumerate(readers)},
            dict(enumerate(senders)),
        )
        self._sources = [tuple(sorted(plan.fingerprints)) for plan in readers]
        pairs = [(s, r) for r, plan in enumerate(readers) for s in sorted(plan.fingerprints)]
        self._far = [(s, r) for s, r in pairs if links.kind(r, s) is LinkKind.NETWORK]
        self._sending = sorted({sender for sender, _ in self._far})
        readable: list[list[int]] = [[] for _ in readers]
        for sender, reader in pairs:
            if links.kind(reader, sender) is not LinkKind.NETWORK:
                readable[reader].append(sender)
        self._readable = [tuple(senders) for senders in readable]
        self._log(readers)

    def _connect(self) -> None:
        """Tell both ends of each link where to meet, and in which order to work their links."""
        self._num_connects += 1
        ports = gather(
            [self._trainer.start_on(rank, "listen_for_weight_links") for rank in self._sending]
        )
        port_of = dict(zip(self._sending, ports, strict=True))
        ends: dict[tuple[WorkerGroup, int], list[LinkAddress]] = {}
        for sender, reader in (pair for turn in schedule(self._far) for pair in turn):
            name = f"{self._trainer.name} {sender} -> {self._policy.name} {reader}"
            if self._num_connects > 1:  # a broken link's name is not used again
                name += f" ({self._num_connects})"
            host = self._trainer.ranks[sender].location.host
            for group, own, peer in (
                (self._trainer, sender, reader),
                (self._policy, reader, sender),
            ):
                address = LinkAddress(peer, name, host, port_of[sender], self._through_host)
                ends.setdefault((group, own), []).append(address)
        gather(
            [
                group.start_on(
                    rank,
                    "connect_weight_links",
                    addresses,
                    **(self._part if group is self._policy else {}),
                )
                for (group, rank), addresses in ends.items()
            ]
        )
        self._is_connected = True

    def _log(self, readers: Sequence[ReaderPlan]) -> None:
        millions = [sum(plan.num_elements[kind] for plan in readers) / 1e6 for kind in LinkKind]
        logger.info(
            "weight sync%s: %d rollout ranks read from %d of %d training ranks; millions of "
            "weights: %.1f on the same device, %.1f on the same host, %.1f over the network",
            self._what,
            len(readers),
            len({sender for plan in readers for sender in plan.fingerprints}),
            len(self._trainer.ranks),
            *millions,
        )

    # ---- each time --------------------------------------------------------------------------

    def sync(self) -> SyncReport:
        """Copy all weights; afterwards every rollout rank is READY at `self.version`.

        If it raises, all rollout ranks whose copy had begun are STALE; it may be called again.

        Raises:
            RankError: a rank of either side failed.
            WeightMismatchError: something arrived that was not sent.
        """
        start = time.perf_counter()
        self.version += 1
        try:
            arrivals = self._copy()
        except BaseException:
            self._is_open, self._is_connected, self._has_synced = False, False, False
            self._revoke()
            raise
        self._has_synced = True
        num_bytes = sum(arrival.num_bytes for arrival in arrivals)
        return SyncReport(self.version, num_bytes, time.perf_counter() - start)

    def _copy(self) -> list[Arrival]:
        """Start everything at once and wait; what has come to each rollout rank."""
        if self._far and not self._is_connected:
            self._connect()
        sample = None
        if self.stride is not None:
            sample = Sample(self.stride, self.version) if self._has_synced else EVERYTHING
        keep_open = self.keep_open and self._is_readable_in_place
        trainer, ranks = self._trainer, range(len(self._policy.ranks))
        exports = {
            rank: trainer.start_on(rank, "export_weights")
            for rank in sorted(set().union(*self._readable))
            if not (self._is_open and keep_open)
        }
        sends = [trainer.start_on(rank, "send_weights") for rank in self._sending]
        senders = range(len(trainer.ranks))
        sent = [trainer.start_on(rank, "sent_weights", sample) for rank in senders[:DIGESTS_FIRST]]
        imports = [self._start_import(rank, exports, keep_open, sample) for rank in ranks]
        sent += [trainer.start_on(rank, "sent_weights", sample) for rank in senders[DIGESTS_FIRST:]]
        finishes = [self._start_finish(rank, sent) for rank in ranks]
        inputs = [*exports.values(), *imports, *sent]
        arrivals: list[Arrival] = gather([*sends, *finishes], inputs)[len(sends) :]
        if any(arrival.has_moved for arrival in arrivals):  # the trainer's memory, since it opened
            self._is_open = False
            return self._copy()
        self._is_open = keep_open
        self._check(arrivals)
        return arrivals

    def _start_import(
        self,
        rank: int,
        exports: Mapping[int, PendingCall],
        keep_open: bool,
        sample: Sample | None,
    ) -> PendingCall:
        sources = tuple(source for source in self._readable[rank] if source in exports)
        # References as arguments of their own: Ray then moves the exports from rank to rank.
        references: list[Any] = [exports[source].result for source in sources]
        return self._policy.start_on(
            rank, "import_weights", sources, keep_open, sample, *references, **self._part
        )

    def _start_finish(self, rank: int, sent: Sequence[PendingCall]) -> PendingCall:
        sources = self._sources[rank]
        references: list[Any] = [sent[source].result for source in sources]
        return self._policy.start_on(
            rank, "finish_weight_sync", self.version, sources, *references, **self._part
        )

    def _check(self, arrivals: Sequence[Arrival]) -> None:
        num_wrong = sum(arrival.num_wrong for arrival in arrivals)
        if not num_wrong:
            return
        shown = [text for arrival in arrivals for text in arrival.wrong][:MAX_DESCRIBED]
        more = f"\n  and {num_wrong - len(shown)} more" if num_wrong > len(shown) else ""
        raise WeightMismatchError(
            f"weight sync{self._what} to version {self.version}: {num_wrong} copies do not hold "
            "what was sent; the engines are STALE:\n  " + "\n  ".join(shown) + more
        )

    def _revoke(self) -> None:
        """Have no rank READY at a version that others did not get; those that died do not count."""
        calls = self._policy.start("revoke_weight_sync", self.version, **self._part)
        ray.wait([call.result for call in calls], num_returns=len(calls), timeout=REVOKE_WAIT_S)


def _places(group: WorkerGroup) -> list[Place]:
    gpus = group.call("weight_gpu")
    return [
        Place(rank.location.node_id, uuid, peers)
        for rank, (uuid, peers) in zip(group.ranks, gpus, strict=True)
    ]
