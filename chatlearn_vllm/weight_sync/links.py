"""What lies between a training rank and an engine rank, and who sends what several ranks hold?"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

BUCKET_BYTES = 64 * 2**20
"""Size of a message over a network link, which holds two of them during a transfer."""


class LinkKind(IntEnum):
    """What a piece of weights crosses; the smaller, the faster."""

    DEVICE = 0
    """Nothing: both ranks share a GPU, or the main memory of a host without GPUs."""
    HOST = 1
    """The connection between two GPUs of one host."""
    NETWORK = 2
    """The network between two hosts, or main memory where GPUs cannot reach each other."""


class Place(NamedTuple):
    """Where a rank runs."""

    host: str
    device: str | None = None
    """UUID of its GPU; None on a host without GPUs."""
    peers: frozenset[str] | None = None
    """UUIDs of the GPUs of this host whose memory it can read; None for all."""


class Links:
    """Kinds of all links, and a choice of senders that loads equals equally.

    Of several ranks that hold the same weights the nearest sends them. Readers that have the same
    nearest ones, over the same kind of link, take turns: the replicas in blocks, the ranks of a
    replica one by one.
    """

    def __init__(
        self, senders: Sequence[Place], readers: Sequence[Place], ranks_per_replica: int
    ) -> None:
        """Take the places of all ranks, in rank order."""
        self._senders, self._readers = list(senders), list(readers)
        self._ranks_per_replica = ranks_per_replica
        self._num_replicas = len(readers) // ranks_per_replica
        self._chosen: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        self._served: dict[tuple[tuple[int, ...], tuple[int, ...]], dict[int, list[int]]] = {}

    def __getstate__(self) -> dict[str, object]:
        """What another process needs."""
        return self.__dict__ | {"_chosen": {}, "_served": {}}

    def kind(self, reader: int, sender: int) -> LinkKind:
        """What lies between two ranks."""
        to, at = self._readers[reader], self._senders[sender]
        if to.host != at.host:
            return LinkKind.NETWORK
        if to.device == at.device:
            return LinkKind.DEVICE
        can_read = to.peers is None or at.device in to.peers
        return LinkKind.HOST if can_read else LinkKind.NETWORK

    def nearest(self, reader: int, ranks: tuple[int, ...]) -> int:
        """Which of `ranks`, ascending training ranks with the same weights, sends to a reader."""
        if len(ranks) == 1:
            return ranks[0]
        replica, within = divmod(reader, self._ranks_per_replica)
        return self._choice(within, ranks)[replica]

    def served(
        self, sender: int, ranks: tuple[int, ...], readers: tuple[int, ...]
    ) -> Sequence[int]:
        """Which of `readers` take from `sender` what all of `ranks` hold; the reverse question."""
        if len(ranks) == 1:
            return readers
        key = ranks, readers
        if key not in self._served:
            served = self._served[key] = {}
            choices: dict[int, list[int]] = {}
            for reader in readers:
                replica, within = divmod(reader, self._ranks_per_replica)
                if within not in choices:
                    choices[within] = self._choice(within, ranks)
                served.setdefault(choices[within][replica], []).append(reader)
        return self._served[key].get(sender, ())

    def _choice(self, within: int, ranks: tuple[int, ...]) -> list[int]:
        key = within, ranks
        if key not in self._chosen:
            self._chosen[key] = self._take_turns(within, ranks)
        return self._chosen[key]

    def _take_turns(self, within: int, ranks: tuple[int, ...]) -> list[int]:
        """The sender for the rank at one place of each replica."""
        by_host: dict[str, list[int]] = {}
        for rank in ranks:
            by_host.setdefault(self._senders[rank].host, []).append(rank)
        sharing: dict[tuple[LinkKind, tuple[int, ...]], list[int]] = {}
        for replica in range(self._num_replicas):
            reader = replica * self._ranks_per_replica + within
            here = by_host.get(self._readers[reader].host, [])
            kinds = [self.kind(reader, rank) for rank in here]
            best = min(kinds, default=LinkKind.NETWORK)
            near = ranks  # all behind the network
            if best is not LinkKind.NETWORK:
                near = tuple(rank for rank, kind in zip(here, kinds, strict=True) if kind == best)
            sharing.setdefault((best, near), []).append(replica)
        senders = [0] * self._num_replicas
        for (_, near), replicas in sharing.items():
            for number, replica in enumerate(replicas):
                turn = number * len(near) // len(replicas) + within
                senders[replica] = near[turn % len(near)]
        return senders


def colocated(num_senders: int, num_readers: int, ranks_per_replica: int) -> Links:
    """All ranks in the main memory of one host."""
    here = Place("localhost")
    return Links([here] * num_senders, [here] * num_readers, ranks_per_replica)
