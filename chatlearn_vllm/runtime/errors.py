"""Which rank ended the job, and why?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankId:
    """One rank of one model of the job."""

    module: str
    """Name of the model in the yaml."""
    replica: int
    """Which data parallel copy; 0 for a trainer, whose one replica holds all its ranks."""
    rank: int
    """Rank inside the replica."""
    world_size: int
    """Number of ranks of the replica."""

    def __str__(self) -> str:
        return f"{self.module}, replica {self.replica}, rank {self.rank}"


class RankError(RuntimeError):
    """A call on a rank failed. Says module, replica, rank, and the rank's own traceback."""

    def __init__(self, rank: RankId, failure: str, details: str) -> None:
        """Describe the failure.

        Args:
            rank: the rank on which it happened.
            failure: what happened, as in "train() raised".
            details: traceback on the rank, or how its process ended.
        """
        # All arguments go to the base class, so that the error can be pickled.
        super().__init__(rank, failure, details)
        self.rank = rank
        self.failure = failure
        self.details = details

    def __str__(self) -> str:
        return f"[{self.rank}] {self.failure}:\n{self.details.rstrip()}"


class RankDiedError(RankError):
    """The process of a rank ended: out of memory, a signal, a crash in native code."""
