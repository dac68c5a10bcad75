"""What runs inside a Ray actor, which is one rank of one model?"""

from __future__ import annotations

import os
import random
import socket
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle

from chatlearn_vllm.observability.logging import UPSTREAM_ENV, configure_rank_logging
from chatlearn_vllm.runtime.errors import RankError, RankId


@dataclass(frozen=True)
class RankLocation:
    """Where a rank's process runs."""

    host: str
    """Address under which other hosts reach it."""
    node_id: str
    """Ray's id of the host."""
    pid: int
    device: int | None
    """Index of the rank's GPU among those its process sees; None without a GPU."""


RENDEZVOUS_PORTS = range(20000, 32000)


@dataclass(frozen=True)
class Rendezvous:
    """What a rank needs to join the process group of its replica."""

    master_addr: str
    local_rank: int
    """Index of the rank among those of its replica on this host; on a GPU, the GPU's index."""


class Worker:
    """One rank: sets the environment, builds the module, runs its methods one at a time.

    The process starts without torch. `build` gets the class as bytes, so that nothing of the
    user's is imported before the rank's environment is complete.
    """

    def __init__(self, rank: RankId, working_dir: str) -> None:
        self._rank = rank
        self._module: Any = None
        self._neighbours: tuple[str, ...] = ()
        if os.path.isdir(working_dir):
            os.chdir(working_dir)  # relative paths in the yaml are the driver's
        configure_rank_logging(rank.module, rank.replica, rank.rank)

    def __repr__(self) -> str:
        # Ray prefixes what the process prints with it.
        return f"{self._rank.module} {self._rank.replica} {self._rank.rank}"

    def locate(self) -> RankLocation:
        """Say where this process runs."""
        host = ray.util.get_node_ip_address()
        node_id = ray.get_runtime_context().get_node_id()
        return RankLocation(host, node_id, os.getpid(), _device_index())

    def free_port(self) -> int:
        """A TCP port for a rendezvous on this host; to be used soon."""
        return _free_port()

    def meet_at(self, master_port: int) -> None:
        """Take the port of this replica's rendezvous; the module's `init` comes next."""
        os.environ["MASTER_PORT"] = str(master_port)

    def build(
        self,
        rendezvous: Rendezvous,
        pickled_class_and_job: bytes,
        neighbours: tuple[str, ...],
    ) -> None:
        """Complete the environment, then import and make the module.

        Args:
            rendezvous: of this rank's replica.
            pickled_class_and_job: cloudpickle of (subclass of BaseModule, JobConfig).
            neighbours: names of the other models on this rank's device.
        """
        self._neighbours = neighbours
        os.environ.update(
            RANK=str(self._rank.rank),
            WORLD_SIZE=str(self._rank.world_size),
            LOCAL_RANK=str(rendezvous.local_rank),
            MASTER_ADDR=rendezvous.master_addr,
        )
        try:
            module_class, job = cloudpickle.loads(pickled_class_and_job)
            self._module = module_class(self._rank.module, job=job, replica_id=self._rank.replica)
        except Exception as error:  # of the user's class: passed on with this rank's name
            raise self._error("building the module raised", error) from None

    def data_parallel_position(self) -> tuple[int, int]:
        """Data parallel rank and size of this rank inside its replica."""
        return self._module.data_parallel_rank, self._module.data_parallel_size

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run a method of the module; returns when this process's device is done with it, too.

        Raises:
            RankError: the method raised; holds this rank's identity and the traceback.
        """
        try:
            result = getattr(self._module, method)(*args, **kwargs)
            _wait_for_device()
            return result
        except Exception as error:  # of the user's method: passed on with this rank's name
            raise self._error(f"{method}() raised", error) from None

    def _error(self, failure: str, error: Exception) -> RankError:
        details = traceback.format_exc()
        if self._module is not None and "torch" in sys.modules:
            from chatlearn_vllm.runtime.out_of_memory import is_out_of_memory, remedies

            if is_out_of_memory(error):
                details = f"{details.rstrip()}\n{remedies(self._module, self._neighbours)}"
        return RankError(self._rank, failure, details)


def process_environment(
    has_gpu: bool, python_path: str, job_id: str, gpu_environment: Mapping[str, str]
) -> dict[str, str]:
    """Variables that a rank's process starts with: libraries read them while being loaded.

    Args:
        has_gpu: whether the rank owns (a share of) a GPU.
        python_path: the driver's, so that the user's classes can be imported.
        job_id: part of the name of everything a rank makes in shared memory, so that it can be
            removed after a crash.
        gpu_environment: what the role's libraries need where there is a GPU.
    """
    environment = {
        **UPSTREAM_ENV,
        "PYTHONPATH": python_path,
        "CHATLEARN_VLLM_JOB_ID": job_id,
        # The engine steps in this process, where the module's hooks are.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # A model directory that is missing must be an error, not a download.
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        # vLLM caps torch's threads unless it is set; several CPU ranks share the cores.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # vLLM looks for n-grams with one thread; numba would start as many as there are cores.
        "NUMBA_NUM_THREADS": os.environ.get("NUMBA_NUM_THREADS", "1"),
    }
    if has_gpu:
        # Every rank sees every GPU of its host: the weight sync reads peers' memory.
        environment["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
        environment |= gpu_environment
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # ours stays as it is
    return environment


def _wait_for_device() -> None:
    """Other processes may read this one's memory next, and errors belong to their call."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _device_index() -> int | None:
    gpu_ids = ray.get_gpu_ids()
    if not gpu_ids:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",").index(str(gpu_ids[0])) if visible else int(gpu_ids[0])


def _free_port() -> int:
    """A free TCP port that the system gives to no outgoing connection before it is listened on.

    Below the usual range of such ports (32768 and up) and above Ray's own.

    Raises:
        RuntimeError: a hundred tries found none.
    """
    for port in random.SystemRandom().sample(RENDEZVOUS_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free TCP port found in {RENDEZVOUS_PORTS}")
