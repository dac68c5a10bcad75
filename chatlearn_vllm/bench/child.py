"""What does a process do that measures one case, and how does it tell?

    python -m chatlearn_vllm.bench.child TASK.json

The task names the case and the file to which events go, one JSON object per line: the phases it
goes through, and its result or its error.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from chatlearn_vllm.bench.cases import Case
from chatlearn_vllm.bench.machine import process_tree
from chatlearn_vllm.bench.options import BenchOptions

_END_WITHIN_S = 10.0
"""Longest wait for processes that were asked to end."""


@dataclass(frozen=True)
class Task:
    """One case to be measured."""

    case: Case
    options: BenchOptions
    model_dir: Path
    work_dir: Path
    """For files of this case."""
    events: Path
    """To which the first rank writes."""

    def save(self, path: Path) -> None:
        """Write it for the child."""
        content = {
            "case": self.case.to_dict(),
            "options": self.options.to_dict(),
            "model_dir": str(self.model_dir),
            "work_dir": str(self.work_dir),
            "events": str(self.events),
        }
        path.write_text(json.dumps(content))

    @classmethod
    def load(cls, path: Path) -> Task:
        """Read what `save` wrote."""
        content = json.loads(path.read_text())
        return cls(
            Case.from_dict(content["case"]),
            BenchOptions.from_dict(content["options"]),
            *(Path(content[name]) for name in ("model_dir", "work_dir", "events")),
        )

    def phase(self, name: str) -> None:
        """Say what comes now; memory is measured by phases."""
        self._write({"phase": name})

    def pass_prompts(self, number: int) -> list[Any]:
        """See workload.prompts_of_pass."""
        from chatlearn_vllm.bench.workload import prompts_of_pass

        return prompts_of_pass(self.options, self.model_dir, number)

    def latency_prompts(self) -> tuple[list[Any], list[Any]]:
        """See workload.latency_prompts."""
        from chatlearn_vllm.bench.workload import latency_prompts

        return latency_prompts(self.options, self.model_dir)

    def _write(self, event: dict[str, Any]) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            with self.events.open("a") as file:
                file.write(json.dumps(event | {"time": time.time()}) + "\n")

    def run(self) -> bool:
        """Measure; whether that went well."""
        try:
            result = _measure(self)
        except Exception as error:  # whatever an engine raises is this case's result
            traceback.print_exc()
            self._write({"error": f"{type(error).__name__}: {error}"})
            return False
        environment = {n: v for n, v in os.environ.items() if n.startswith("VLLM_")}
        self._write({"result": result | {"environment": environment}})
        return True


def _measure(task: Task) -> dict[str, Any]:
    if not task.case.is_vllm:
        from chatlearn_vllm.bench.transformers_case import measure
    elif task.case.engine == "vllm":
        from chatlearn_vllm.bench.vllm_case import measure
    else:
        from chatlearn_vllm.bench.vllm_module_case import measure
    return measure(task)


def _end_with_parent() -> None:
    """End this process, and all that it started, when the parent is gone, however it ended.

    The parent holds the other end of the standard input, and writes nothing.
    """
    if os.getsid(0) != os.getpid():  # started by hand
        return

    threading.Thread(target=_wait_for_end, name="end-with-parent", daemon=True).start()


def _wait_for_end() -> None:
    """Wait for the end of the standard input, and end all."""
    sys.stdin.buffer.read()
    end, asked = time.monotonic() + _END_WITHIN_S, set()
    while (engines := _engines()) and time.monotonic() < end:
        for process in engines:
            if process.pid not in asked:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
        asked |= {process.pid for process in engines}
        time.sleep(0.1)
    for process in _engines():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _engines() -> list[psutil.Process]:
    """The processes that this one and those have started, without Python's trackers.

    A tracker of shared memory cleans up by itself when all others have ended.
    """
    found = []
    for process in process_tree(os.getpid())[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            is_tracker = "multiprocessing.resource_tracker" in " ".join(process.cmdline())
            if not is_tracker and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


if __name__ == "__main__":
    _end_with_parent()
    is_good = Task.load(Path(sys.argv[1])).run()
    sys.stdout.flush()
    sys.stderr.flush()
    # Engines leave threads and workers that could wait for one another; the parent ends the rest.
    os._exit(0 if is_good else 1)
