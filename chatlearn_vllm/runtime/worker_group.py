"""How does one call reach all ranks of a model, and how does the first failure come back?"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from chatlearn_vllm.data.batch import Batch, batch_size, split
from chatlearn_vllm.runtime.errors import RankDiedError, RankError, RankId
from chatlearn_vllm.runtime.scores import joined
from chatlearn_vllm.runtime.worker import RankLocation

ROOT_CAUSE_WAIT_S = 2.0
"""After a first failure, how long to wait for the one that caused it: when a process dies, its
peers' broken connections may be reported before its death."""


@dataclass(frozen=True)
class RankHandle:
    """A rank as the driver sees it."""

    id: RankId
    actor: Any
    location: RankLocation | None = None
    """None until its process has answered for the first time."""


@dataclass(frozen=True)
class PendingCall:
    """A call that a rank may still be working on."""

    rank: RankHandle
    method: str
    result: ray.ObjectRef


class WorkerGroup:
    """All ranks of one model, ordered by replica, then by rank."""

    def __init__(self, name: str, ranks: Sequence[RankHandle]) -> None:
        self.name = name
        self.ranks = list(ranks)
        by_replica: dict[int, list[RankHandle]] = {}
        for rank in ranks:
            by_replica.setdefault(rank.id.replica, []).append(rank)
        self.replicas = [by_replica[replica] for replica in sorted(by_replica)]

    def start(self, method: str, *args: Any, **kwargs: Any) -> list[PendingCall]:
        """Start a method of the module on all ranks; `gather` waits for the results."""
        args = _stored_once(args)
        return [_start(rank, method, args, kwargs) for rank in self.ranks]

    def start_on(self, index: int, method: str, *args: Any, **kwargs: Any) -> PendingCall:
        """Start a method on one rank, by its place in `ranks`."""
        return _start(self.ranks[index], method, args, kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Run a method of the module on all ranks at once; results in rank order.

        Raises:
            RankError: from the first rank that fails; the others are not waited for.
        """
        return gather(self.start(method, *args, **kwargs))

    def call_each(
        self, method: str, args_of_rank: Sequence[tuple[Any, ...]], **kwargs: Any
    ) -> list[Any]:
        """Like `call`, with positional arguments of its own for each rank."""
        return gather(
            [
                _start(rank, method, args, kwargs)
                for rank, args in zip(self.ranks, args_of_rank, strict=True)
            ]
        )

    def call_replicas(self, method: str, args_of_replica: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run a method on all ranks of the first replicas, one per entry of `args_of_replica`.

        Returns:
            One result per replica: that of its first rank which returned something.
        """
        pending = []
        for replica, args in zip(self.replicas, args_of_replica, strict=False):
            args = _stored_once(args)
            pending.append([_start(rank, method, args, {}) for rank in replica])
        results = iter(gather([call for replica in pending for call in replica]))
        return [_first_result([next(results) for _ in replica]) for replica in pending]

    def forward(self, method: str, batch: Batch, iteration: int) -> Batch:
        """Run `forward_step` or `eval_forward` on a batch, its rows spread over the replicas.

        Returns:
            What the module returned, for all rows in order.

        Raises:
            RankError: a rank failed.
            ValueError: the module returned something else than columns of as many rows.
        """
        parts = split(batch, min(len(self.replicas), batch_size(batch)))
        results = self.call_replicas(method, [(part, iteration) for part in parts])
        return joined(self.name, method, results, [batch_size(part) for part in parts])

    def forward_sharded(self, method: str, batch: Batch, iteration: int) -> Batch:
        """Like `forward`, on a trainable model: rows are spread over its data parallel ranks."""
        positions = self._data_parallel_positions()
        parts = split(batch, positions[0][1])
        results = self.call_sharded(method, lambda rank, size: parts[rank], iteration)
        of_rank = {rank: result for (rank, _), result in zip(positions, results, strict=True)}
        results = [of_rank[rank] for rank in range(len(parts))]
        return joined(self.name, method, results, [batch_size(part) for part in parts])

    def call_sharded(
        self, method: str, shard_of: Callable[[int, int], Any], iteration: int
    ) -> list[Any]:
        """Run a method on all ranks, each with the shard of its data parallel rank.

        Args:
            method: called as `method(shard, iteration)`.
            shard_of: makes the shard of (data parallel rank, data parallel size).
            iteration: passed on.

        Returns:
            Results in rank order.
        """
        positions = self._data_parallel_positions()
        # Ranks that differ in tensor or pipeline rank only share one copy in the object store.
        shards = {position: ray.put(shard_of(*position)) for position in set(positions)}
        return self.call_each(method, [(shards[position], iteration) for position in positions])

    def _data_parallel_positions(self) -> list[tuple[int, int]]:
        return gather(
            [
                PendingCall(
                    rank, "data_parallel_position", rank.actor.data_parallel_position.remote()
                )
                for rank in self.ranks
            ]
        )


def gather(pending: Sequence[PendingCall], inputs: Sequence[PendingCall] = ()) -> list[Any]:
    """Wait for calls, also of several groups; results in order.

    Args:
        pending: the calls whose results are wanted.
        inputs: calls whose results are arguments of `pending`; fetched only to explain a failure.

    Raises:
        RankError: a rank failed. Raised at once, because its peers may hang in a collective.
    """
    results: dict[ray.ObjectRef, Any] = {}
    waiting = {call.result: call for call in pending}
    while waiting:
        results |= _take_done(waiting, inputs)
    return [results[call.result] for call in pending]


class CallPool:
    """Calls on whole replicas, taken up as they end.

    Example:
        pool.start("first", replicas[0], "generate", ([0, 1], 0))
        pool.start("second", replicas[1], "generate", ([2, 3], 2))
        name, batch, reference = pool.next()
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Hashable, list[PendingCall]]] = []
        self._waiting: dict[ray.ObjectRef, PendingCall] = {}
        self._results: dict[ray.ObjectRef, Any] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def start(
        self, key: Hashable, replica: Sequence[RankHandle], method: str, args: Sequence[Any]
    ) -> None:
        """Start a method on all ranks of a replica; it waits for earlier calls on it."""
        args = _stored_once(args)
        calls = [_start(rank, method, args, {}) for rank in replica]
        self._calls.append((key, calls))
        self._waiting |= {call.result: call for call in calls}

    def next(self) -> tuple[Hashable, Any, ray.ObjectRef | None]:
        """Wait for a call that has ended on all ranks of its replica.

        Returns:
            The key it was started with; what its first rank returned which returned something;
            and a reference to that, for calls that take it.

        Raises:
            RankError: a rank failed, whichever call that was part of.
        """
        while True:
            for number, (key, calls) in enumerate(self._calls):
                if all(call.result in self._results for call in calls):
                    del self._calls[number]
                    results = {call.result: self._results.pop(call.result) for call in calls}
                    found = [one for one in results.items() if one[1] is not None]
                    reference, result = found[0] if found else (None, None)
                    return key, result, reference
            self._results |= _take_done(self._waiting)


def _take_done(
    waiting: dict[ray.ObjectRef, PendingCall], inputs: Sequence[PendingCall] = ()
) -> dict[ray.ObjectRef, Any]:
    """Wait for at least one call; take those that have ended out of `waiting`; their results.

    Raises:
        RankError: a rank failed; see `gather` about `inputs`.
    """
    ray.wait(list(waiting), num_returns=1)
    ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
    results = {}
    for reference in ready:
        outcome = _outcome(waiting.pop(reference))
        if isinstance(outcome, RankError):
            raise _failed_input(inputs) or _root_cause(
                outcome, waiting | {call.result: call for call in inputs}
            )
        results[reference] = outcome
    return results


def _stored_once(args: Sequence[Any]) -> list[Any]:
    """Batches and lists of records as references, so that ranks share one copy per host."""
    return [ray.put(arg) if isinstance(arg, dict | list) else arg for arg in args]


def _start(
    rank: RankHandle, method: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> PendingCall:
    return PendingCall(rank, method, rank.actor.call.remote(method, *args, **kwargs))


def _outcome(call: PendingCall) -> Any:
    """The call's result, or its failure as a RankError."""
    try:
        return ray.get(call.result)
    except RayActorError as error:
        where = call.rank.location
        process = f"process {where.pid} on {where.host}" if where else "process"
        return RankDiedError(
            call.rank.id, f"{process} died during {call.method}()", _exit_reason(error)
        )
    except RayTaskError as error:
        if isinstance(error.cause, RankError):
            return error.cause
        # Not raised by the module: for example a result that cannot be pickled.
        return RankError(call.rank.id, f"{call.method}() failed", str(error))
    except RayError as error:  # for example a runtime environment that cannot be set up
        return RankError(call.rank.id, f"{call.method}() failed", str(error))


def _failed_input(inputs: Sequence[PendingCall]) -> RankError | None:
    """The failure of an input, if there is one, a death before others.

    Ray reports a rank's death as the failure of every call that takes what it should have made.
    """
    if not inputs:
        return None
    references = [call.result for call in inputs]
    done, _ = ray.wait(references, num_returns=len(inputs), timeout=ROOT_CAUSE_WAIT_S)
    outcomes = [_outcome(call) for call in inputs if call.result in done]
    failures = [outcome for outcome in outcomes if isinstance(outcome, RankError)]
    failures.sort(key=lambda failure: not isinstance(failure, RankDiedError))
    return failures[0] if failures else None


def _root_cause(first: RankError, waiting: dict[ray.ObjectRef, PendingCall]) -> RankError:
    """Prefer a death that is reported within a moment after the first failure."""
    deadline = time.monotonic() + ROOT_CAUSE_WAIT_S
    while waiting and not isinstance(first, RankDiedError):
        ready, _ = ray.wait(
            list(waiting), num_returns=1, timeout=max(0.0, deadline - time.monotonic())
        )
        if not ready:
            break
        outcome = _outcome(waiting.pop(ready[0]))
        if isinstance(outcome, RankDiedError):
            return outcome
    return first


def _exit_reason(error: RayActorError) -> str:
    """The sentence of Ray's report that says how the process ended, without its advice."""
    found = re.search(r"Worker exit type: .*?(?= Some common causes|\n|$)", str(error))
    return found.group() if found else str(error)


def _first_result(results: list[Any]) -> Any:
    return next((result for result in results if result is not None), None)
