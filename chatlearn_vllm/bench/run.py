"""How is one case measured after the other, so that no failure takes the rest along?"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from chatlearn_vllm.bench import remedies
from chatlearn_vllm.bench.cases import TRANSFORMERS, Case, check_cases, ratios
from chatlearn_vllm.bench.checks import check_workload
from chatlearn_vllm.bench.child import Task
from chatlearn_vllm.bench.machine import Machine, MemoryPeaks, this_machine, versions
from chatlearn_vllm.bench.measure import of_rounds
from chatlearn_vllm.bench.memory import num_parameters
from chatlearn_vllm.bench.options import BenchOptions
from chatlearn_vllm.bench.outputs import make_outputs, save_results
from chatlearn_vllm.bench.processes import Processes
from chatlearn_vllm.bench.workload import config_of, has_weights, model_dir
from chatlearn_vllm.layouts import ModelShape

FORMAT = 1
"""Of results.json."""
_LOOK_EVERY_S = 0.25
_LEAVE_WITHIN_S = 30.0
"""Longest wait for the memory of processes that have ended."""
_UNSTEADY_BYTES = 2**28
"""By so much the free memory of a GPU may change by itself."""
_CAUSE = re.compile(r"\b\w+(?:Error|Exception): .+")
"""An exception in a log."""
_LOG_END = 20_000
"""Characters of a log in which the cause of a failure is looked for."""
_LOG_NAME = 100
"""Longest name of a log, in characters."""


class Bench:
    """One run over all cases; its results so far are in OUT/results.json at any time."""

    def __init__(
        self,
        options: BenchOptions,
        out: Path,
        command: Sequence[str],
        say: Callable[[str], None] = print,
        after_case: Callable[[dict[str, Any]], None] = lambda results: None,
    ) -> None:
        """Check everything that can be checked without starting an engine.

        Args:
            options: what to measure.
            out: directory of results, logs and a made model.
            command: as the user gave it, for the results.
            say: gets a line per case.
            after_case: gets the results so far after each case.

        Raises:
            OptionError: the cases cannot be read, or do not fit the model or the machine.
            ValueError: config.json describes a model that is not supported.
        """
        self._options = options
        self._out = out
        self._say = say
        self._after_case = after_case
        self._machine = this_machine()
        self._cases = options.parsed_cases()
        config = config_of(options)
        self._shape = ModelShape.from_hf_config(config)
        check_cases(self._cases, self._shape, len(self._machine.gpus))
        notices = [*options.notices, *check_workload(options, self._cases, config)]
        self.results: dict[str, Any] = {
            "format": FORMAT,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": list(command),
            "options": options.to_dict(),
            "notices": notices,
            "machine": self._machine.to_dict(),
            "versions": versions(),
            "model": {
                "name": options.model or f"Llama shape {options.shape}, random weights",
                "num_parameters": num_parameters(self._shape),
                "has_weights": options.model is not None and has_weights(Path(options.model)),
                "config": config,
            },
            "cases": [
                {**case.to_dict(), "status": "not run", "reason": None} for case in self._cases
            ],
            "ratios": [],
        }

    def run(self) -> bool:
        """Measure all cases; whether none of them failed.

        Raises:
            KeyboardInterrupt: the user ended it; what was measured is in the results.
            OptionError: results cannot be written where they are wanted; nothing was started.
        """
        make_outputs(self._out, self._options.json)
        with model_dir(self._options, self._out) as directory:
            for _ in range(self._options.rounds):
                for number in range(len(self._cases)):
                    self._run_case(number, directory)
        return all(entry["status"] in ("ok", "skipped") for entry in self.results["cases"])

    def _run_case(self, number: int, directory: Path) -> None:
        case, entry = self._cases[number], self.results["cases"][number]
        name = f"[{number + 1}/{len(self._cases)}] {case}"
        if entry["status"] in ("failed", "skipped"):  # in an earlier round
            return
        self._say(f"{name} ...")
        try:
            now = self._measure(number, case, directory)
            if entry["status"] == "ok" and now["status"] == "ok":
                now = of_rounds(entry, now)
            entry |= now
        except KeyboardInterrupt:
            if entry["status"] != "ok":
                entry |= {"status": "interrupted", "reason": "ended by the user"}
            raise
        finally:
            self.results["ratios"] = ratios(self.results["cases"])
            save_results(self.results, self._out, self._options.json)
            self._after_case(self.results)
        self._say(f"{name}: {_in_a_line(entry)}")

    def _measure(self, number: int, case: Case, directory: Path) -> dict[str, Any]:
        if missing := _missing(case, on_gpu=bool(self._machine.gpus)):
            return missing
        name = re.sub(r"[^\w.-]", "", str(case).replace(":", "_"))[:_LOG_NAME]
        log = self._out / f"{number + 1:02d}-{name}.log"
        with tempfile.TemporaryDirectory(prefix="chatlearn-bench-") as work_dir:
            events = Path(work_dir, "events.jsonl")
            events.touch()
            task = Task(case, self._options, directory, Path(work_dir), events)
            free = self._free_bytes(case)
            peaks = MemoryPeaks(self._machine.gpus[: case.num_gpus])
            with Processes(task, log, on_gpu=bool(self._machine.gpus)) as processes:
                entry = self._watch(case, processes, events, peaks, free)
        return entry | {"log": str(log)}

    def _free_bytes(self, case: Case) -> int:
        """Of the fullest GPU of a case, once the last one's processes have left; else the host's.

        A driver takes a while to give a killed process's memory back.
        """
        if not self._machine.gpus:
            return psutil.virtual_memory().available
        patience = time.monotonic() + _LEAVE_WITHIN_S
        while True:
            now = this_machine().gpus
            has_left = all(
                gpu.free_bytes >= before.free_bytes - _UNSTEADY_BYTES
                for gpu, before in zip(now, self._machine.gpus, strict=True)
            )
            if has_left or time.monotonic() > patience:
                return min(gpu.free_bytes for gpu in now[: case.num_gpus])
            time.sleep(_LOOK_EVERY_S)

    def _watch(
        self, case: Case, processes: Processes, events: Path, peaks: MemoryPeaks, free_bytes: int
    ) -> dict[str, Any]:
        """Wait for the end of a case and look at its memory meanwhile; its part of the results."""
        start = time.monotonic()
        is_late = False
        phase = "start"
        while processes.are_running and not _said(events, "result"):
            before, phase = phase, next(iter(_said(events, "phase")[::-1]), "start")
            if phase != before:
                processes.note_shared_memory()
            peaks.sample(phase, processes.ids)
            if is_late := time.monotonic() - start > self._options.case_timeout:
                break
            time.sleep(_LOOK_EVERY_S)
        seconds = time.monotonic() - start
        if results := _said(events, "result"):
            (result,) = results
            memory = peaks.result(["start", "load", "warmup", *result.pop("memory_phases")])
            return {"status": "ok", "seconds": seconds, "memory": memory, **result}
        error = next(iter(_said(events, "error")), None)
        situation = remedies.Situation(
            case,
            self._options,
            self._shape,
            total_bytes=_device_bytes(self._machine),
            free_bytes=free_bytes,
            on_gpu=bool(self._machine.gpus),
        )
        return {
            "status": "failed",
            "seconds": seconds,
            **_failure(error, situation, processes, is_late=is_late),
        }


def _said(events: Path, kind: str) -> list[Any]:
    """What a case has said so far under one name."""
    lines = events.read_text().split("\n")[:-1]  # the last one may not be whole yet
    return [event[kind] for line in lines if kind in (event := json.loads(line))]


def _missing(case: Case, *, on_gpu: bool) -> dict[str, str] | None:
    """The result of a case that cannot be measured with what is installed; None if it can."""
    if case.is_vllm and importlib.util.find_spec("vllm") is None:
        reason, _, remedy = remedies.INSTALL_VLLM.partition(": ")
        return {"status": "failed", "reason": reason, "remedy": remedy}
    if TRANSFORMERS.get(case.engine) != "flash_attention_2":
        return None
    if not on_gpu:
        return {"status": "skipped", "reason": "FlashAttention-2 needs a GPU"}
    if importlib.util.find_spec("flash_attn") is None:
        reason = "flash-attn is not installed: pip install flash-attn --no-build-isolation"
        return {"status": "skipped", "reason": reason}
    return None


def _device_bytes(machine: Machine) -> int:
    """Memory of one GPU, or of the host where there is none."""
    return machine.gpus[0].total_bytes if machine.gpus else machine.host_bytes


def _failure(
    error: str | None, situation: remedies.Situation, processes: Processes, *, is_late: bool
) -> dict[str, str | None]:
    """Why a case failed, and what to do."""
    if is_late:
        return {"reason": "timed out", "remedy": remedies.timed_out(situation.options)}
    end_of_log = processes.log.read_text(errors="replace")[-_LOG_END:]
    if error is None and processes.killed:
        return {"reason": "killed", "remedy": remedies.killed(situation)}
    if error is None:
        lines = [line for line in end_of_log.splitlines() if line.strip()]
        error = f"ended without a result: {''.join(lines[-1:])}"
    remedy = remedies.remedy(error, situation) or remedies.remedy(end_of_log, situation)
    if "root cause" in error and (causes := _CAUSE.findall(end_of_log)):
        # vLLM's engine is a process of its own, and so was the one that failed.
        error = next((cause for cause in reversed(causes) if "root cause" not in cause), error)
    return {"reason": error, "remedy": remedy or f"see {processes.log}"}


def _in_a_line(entry: dict[str, Any]) -> str:
    if entry["status"] != "ok":
        remedy = f"; {entry['remedy']}" if entry.get("remedy") else ""
        return f"{entry['status']}: {entry['reason']}{remedy}"
    speed = entry["throughput"]["output_tokens_per_s"]
    return f"{speed:,.0f} tokens/s, {entry['seconds']:.0f} s in all"
