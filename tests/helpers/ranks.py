"""Real ranks for tests: processes that stay alive and run functions together over gloo."""

import gc
import multiprocessing
import multiprocessing.connection
import os
import random
import socket
import traceback
import uuid
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class Ranks:
    """Processes that run a function together, as the ranks of one process group.

    Importing torch and megatron-core takes seconds, so tests share the processes. A function
    leaves them as it found them: it ends the process group that it joined, and joins only one.
    """

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        self._job_id = uuid.uuid4().hex[:12]
        """Part of the names of what the processes make in shared memory."""
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            environment = {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            environment["CHATLEARN_VLLM_JOB_ID"] = self._job_id
            # not a daemon: saving a checkpoint starts processes of its own
            process = context.Process(target=_serve, args=(theirs, environment))
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call a module-level function on every rank; its results by rank.

        Raises:
            AssertionError: it raised on a rank; holds that rank's traceback. The ranks are gone
                then, since the others may wait for it in a collective.
        """
        return self.run_on(len(self._connections), function, *args, **kwargs)

    def run_on(
        self, world_size: int, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> list[Any]:
        """The same on the first `world_size` processes only."""
        # A new port each time: the last call's store may not have left its own yet.
        environment = {"WORLD_SIZE": str(world_size), "MASTER_PORT": str(free_port())}
        waiting = dict(enumerate(self._connections[:world_size]))
        for connection in waiting.values():
            connection.send((function, args, kwargs, environment))
        results: dict[int, Any] = {}
        while waiting:
            ready = multiprocessing.connection.wait(waiting.values(), timeout=240)
            if not ready:
                self.close()
                raise AssertionError(f"{function.__name__}: ranks {sorted(waiting)} hang")
            for rank, connection in list(waiting.items()):
                if connection in ready:
                    is_ok, value = connection.recv()
                    if not is_ok:
                        self.close()
                        raise AssertionError(f"rank {rank}:\n{value}")
                    results[rank] = value
                    del waiting[rank]
        return [results[rank] for rank in sorted(results)]

    @property
    def is_alive(self) -> bool:
        """Whether `run` can be called."""
        return bool(self._connections)

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
            process.join()
        self._connections = []
        # What vLLM's communicator on CPU leaves behind in a process that is ended.
        for leftover in Path("/dev/shm").glob(f"*{self._job_id}*"):
            leftover.unlink(missing_ok=True)


class RanksBySize:
    """`ranks[n].run(...)` on n of `maximum` processes, which start anew after a failure."""

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._processes: Ranks | None = None

    def __getitem__(self, world_size: int) -> "FirstRanks":
        if self._processes is None or not self._processes.is_alive:
            self._processes = Ranks(self._maximum)
        return FirstRanks(partial(self._processes.run_on, world_size))

    def close(self) -> None:
        if self._processes is not None:
            self._processes.close()


class FirstRanks:
    """Some of the processes, with the `run` of `Ranks`."""

    def __init__(self, run: Callable[..., list[Any]]) -> None:
        self.run = run


def free_port() -> int:
    """A free port below those that the system gives to outgoing connections.

    One of the latter may be taken again before the rank listens on it: gloo opens many.
    """
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port found")


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args, kwargs, environment = connection.recv()
        except EOFError:
            return
        os.environ.update(environment)
        try:
            connection.send((True, function(*args, **kwargs)))
        except Exception:
            connection.send((False, traceback.format_exc()))
        gc.freeze()  # the imported modules: collections, one per engine, then take no time
