"""How are the processes of a case started, looked at and ended, with all that they leave behind?"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

from chatlearn_vllm.bench.child import Task
from chatlearn_vllm.bench.environment import without_variables
from chatlearn_vllm.bench.machine import process_tree

_END_WITHIN_S = 10.0
"""Longest wait for processes that were asked to end."""
_SHARED_MEMORY = re.compile(r"/dev/shm/\S+(?=$|\n)")


class Processes:
    """The processes of one case: one, or VLLMModule's ranks. Leaving the context ends them all."""

    def __init__(self, task: Task, log: Path, *, on_gpu: bool) -> None:
        self.log = log
        self._job_id = f"bench-{uuid.uuid4().hex[:12]}"
        path = task.work_dir / "task.json"
        task.save(path)
        environment = {
            **without_variables(os.environ),
            "CHATLEARN_VLLM_JOB_ID": self._job_id,
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
            # As in a job; with more threads steps that draft n-grams now and then take 30 times
            # as long on few cores.
            "NUMBA_NUM_THREADS": os.environ.get("NUMBA_NUM_THREADS", "1"),
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        }
        if on_gpu:
            # Asking whether there are GPUs must not start CUDA: vLLM starts processes afterwards.
            environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
            environment.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        else:
            environment["CUDA_VISIBLE_DEVICES"] = ""
            # vLLM's CPU engine is many times slower with more threads than cores.
            environment.setdefault("OMP_NUM_THREADS", "1")
            # It would want a NUMA node for each tensor parallel rank.
            environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        ranks: list[dict[str, str]] = [{}]
        if task.case.engine == "vllm-module":
            ranks = _rank_environments(task.case.num_processes)
        self._processes: list[subprocess.Popen] = []
        self._shared_memory: set[Path] = set()
        self._file = log.open("w")
        command = [sys.executable, "-m", "chatlearn_vllm.bench.child", str(path)]
        for rank in ranks:
            self._processes.append(
                subprocess.Popen(
                    command,
                    env=environment | rank,
                    stdin=subprocess.PIPE,  # ends with this process, and the child with it
                    stdout=self._file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for the parent, which ends this group
                )
            )

    def __enter__(self) -> Processes:
        return self

    @property
    def ids(self) -> list[int]:
        """Of the processes that were started."""
        return [process.pid for process in self._processes]

    @property
    def are_running(self) -> bool:
        """Whether the first rank is, and no other failed, which would leave the first waiting."""
        first, *others = (process.poll() for process in self._processes)
        return first is None and all(code in (None, 0) for code in others)

    @property
    def killed(self) -> bool:
        """Whether one was killed, not by us."""
        return any(process.poll() == -signal.SIGKILL for process in self._processes)

    def __exit__(self, *error: object) -> None:
        self.note_shared_memory()
        # Whatever a process has started is in its group, too: vLLM's engine and workers, and
        # Python's tracker of shared memory, which cleans up when the others have ended.
        self._signal(signal.SIGTERM)
        patience = time.monotonic() + _END_WITHIN_S
        while self._groups() and time.monotonic() < patience:
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()
            process.stdin.close()
        self._file.close()
        # vLLM leaves some behind where it is ended, or fails.
        for leftover in (*Path("/dev/shm").glob(f"*{self._job_id}*"), *self._shared_memory):
            leftover.unlink(missing_ok=True)

    def note_shared_memory(self) -> None:
        """Look which files of shared memory the processes and their children have now."""
        for one in (child for process in self._processes for child in process_tree(process.pid)):
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{one.pid}/maps").read_text()
                self._shared_memory |= {Path(name) for name in _SHARED_MEMORY.findall(maps)}

    def _signal(self, number: int) -> None:
        for group in self._groups():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)

    def _groups(self) -> list[int]:
        """Those process groups in which a process is left."""
        left = []
        for process in self._processes:
            process.poll()  # one that has ended is in its group until it is asked for
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 0)
                left.append(process.pid)
        return left


def _rank_environments(world_size: int) -> list[dict[str, str]]:
    """What a job gives to its ranks (runtime/worker.py) and torch.distributed reads."""
    port = str(_free_port())
    job = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return [
        job
        | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for rank in range(world_size)
    ]


def _free_port() -> int:
    """A free port below those that the system gives to outgoing connections."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free TCP port between 20000 and 32000")
