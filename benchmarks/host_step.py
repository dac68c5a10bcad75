"""What does a step of VLLMModule cost the host, and how fast are the cores that it runs on?

    torchrun --nproc-per-node 2 benchmarks/host_step.py --shape 8b --out host.json
    torchrun --nproc-per-node 1 benchmarks/host_step.py --out host.json    # on CPU

Each rank of a tensor parallel replica schedules for itself, so a step lasts as long as that of the
rank whose core is slowest. The parts of vLLM's step are timed where it calls them, on every rank,
and beside each step a loop that always does the same: it takes longer on a core whose other
hardware thread works for somebody else, which an operating system in a virtual machine cannot see.
Only steps are counted that decode one token of every sequence.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `chatlearn_vllm`

if TYPE_CHECKING:
    from chatlearn_vllm.bench.child import Task

LOOP_ADDITIONS = 5_000
SLOW_CORE = 1.3
"""A core is called slow when the loop takes so many times its shortest time of all ranks."""
LEAST_TOKENS = 32
"""Of a response, so that there are steps to be timed and profiled."""


class StepClock:
    """Times the parts of an engine's steps."""

    def __init__(self, engine: Any, num_seqs: int) -> None:
        """Put clocks around what one step of vLLM calls.

        Args:
            engine: vLLM's `LLMEngine`, in this process.
            num_seqs: sequences that a step decodes to be counted.
        """
        core = engine.engine_core.engine_core
        self._num_seqs = num_seqs
        self._now: dict[str, float] = {}
        self._decodes_all = False
        self.steps: list[dict[str, float]] = []
        """Seconds of each counted step by part; "loop" is not part of "step"."""
        self.around_step: Callable[[], None] = lambda: None
        self._clock(core.scheduler, "schedule", "schedule", self._look_at)
        self._clock(core.scheduler, "update_from_output", "update")
        self._clock(engine.output_processor, "process_outputs", "outputs")
        self._clock(core.model_executor, "execute_model", "launch")
        self._clock(core.model_executor, "sample_tokens", "launch", self._clock_result)
        self._step = engine.step
        engine.step = self.step

    def _clock(
        self, owner: Any, name: str, part: str, look: Callable[[Any], None] = lambda result: None
    ) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            self._now[part] = self._now.get(part, 0.0) + time.perf_counter() - start
            look(result)
            return result

        setattr(owner, name, timed)

    def _look_at(self, scheduled: Any) -> None:
        tokens = scheduled.num_scheduled_tokens
        is_one_each = scheduled.total_num_scheduled_tokens == len(tokens)
        is_decode = is_one_each and not scheduled.scheduled_new_reqs
        self._decodes_all = is_decode and len(tokens) == self._num_seqs

    def _clock_result(self, output: Any) -> None:
        if hasattr(output, "result"):  # a future; its result takes what the GPU still needs
            self._clock(output, "result", "wait")

    def step(self) -> Any:
        """One step of the engine."""
        self.around_step()
        start = time.perf_counter()
        total = 0
        for number in range(LOOP_ADDITIONS):
            total += number
        loop = time.perf_counter() - start
        self._now = {}
        outputs = self._step()
        took = time.perf_counter() - start - loop
        if self._decodes_all:
            self.steps.append({"step": took, "loop": loop, **self._now})
        return outputs


def milliseconds(steps: list[dict[str, float]]) -> dict[str, float]:
    """Medians of parts; `host` is all of a step but waiting for the GPU."""
    names = {name for step in steps for name in step} - {"loop"}
    parts = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in names}
    parts["host"] = statistics.median(step["step"] - step.get("wait", 0.0) for step in steps)
    return {name: 1e3 * value for name, value in sorted(parts.items())}


def summary(steps: list[dict[str, float]], shortest_loop: float) -> dict[str, Any]:
    """What a rank measured, all steps together and by the speed of the core."""
    loops = [step["loop"] / shortest_loop for step in steps]
    result: dict[str, Any] = {
        "num_steps": len(steps),
        "ms": milliseconds(steps),
        "loop": {
            "shortest_us": 1e6 * min(step["loop"] for step in steps),
            "times_shortest": dict(
                zip(("p10", "p50", "p90"), _quantiles(loops, (10, 50, 90)), strict=True)
            ),
        },
    }
    for name, is_slow in (("fast_core", False), ("slow_core", True)):
        own = [s for s, loop in zip(steps, loops, strict=True) if (loop >= SLOW_CORE) == is_slow]
        result[name] = {"share_of_steps": len(own) / len(steps)}
        if own:
            result[name]["ms"] = milliseconds(own)
    return result


def _quantiles(values: list[float], percents: tuple[int, ...]) -> list[float]:
    ordered = sorted(values)
    return [ordered[round((len(ordered) - 1) * percent / 100)] for percent in percents]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure on this rank; collective over all that torchrun started."""
    from chatlearn_vllm.bench.cases import parse_case
    from chatlearn_vllm.bench.child import Task
    from chatlearn_vllm.bench.options import BenchOptions
    from chatlearn_vllm.bench.workload import model_dir

    names = ("shape", "prompts", "completions", "max_tokens", "repeat")
    given = {name: getattr(options, name) for name in names}
    bench = BenchOptions.of(given | {"ignore_eos": True})
    case = parse_case("vllm-module", tensor_parallel_size=num_ranks())
    with tempfile.TemporaryDirectory() as own, model_dir(bench, Path(own)) as model:
        ranks = _measure_ranks(Task(case, bench, model, Path(own), Path(own) / "events"))
    return {**given, "tensor_parallel_size": num_ranks(), "ranks": ranks}


def _measure_ranks(task: Task) -> list[dict[str, Any]]:
    """What every rank has measured."""
    import torch
    import torch.distributed as dist

    from benchmarks.verifying_step import NUM_PROFILED, gpu_time
    from chatlearn_vllm.bench.vllm_arguments import make_job
    from chatlearn_vllm.bench.vllm_module_case import ready_policy

    options = task.options
    policy = ready_policy(task, make_job(task))
    clock = StepClock(policy.engine._engine, options.num_seqs)  # vLLM's own engine

    def generate(number: int) -> float:
        rows = list(range(number * options.prompts, (number + 1) * options.prompts))
        dist.all_reduce(torch.zeros(1))  # the ranks begin together
        start = time.perf_counter()
        policy.generate(rows, number * options.num_completions)
        return time.perf_counter() - start

    generate(options.repeat)  # warms up
    clock.steps.clear()
    seconds = [generate(number) for number in range(options.repeat)]
    steps = list(clock.steps)
    shortest_loop = min(_of_all_ranks(min(step["loop"] for step in steps)))
    result = {"pass_s": seconds, **summary(steps, shortest_loop)}
    if torch.cuda.is_available():
        middle = range(options.max_tokens // 2, options.max_tokens // 2 + NUM_PROFILED)
        profiled = _profile_gpu(clock, middle, lambda: generate(0))
        result["gpu"] = gpu_time(profiled.events()) | {"device": torch.cuda.get_device_name()}
    ranks = _of_all_ranks(result)
    policy.shutdown()
    return ranks


def _of_all_ranks(value: Any) -> list[Any]:
    import torch.distributed as dist

    gathered: list[Any] = [None] * num_ranks()
    dist.all_gather_object(gathered, value)
    return gathered


def _profile_gpu(clock: StepClock, steps: range, generate: Callable[[], Any]) -> Any:
    import torch
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CUDA])
    number = 0

    def around_step() -> None:
        nonlocal number
        if number == steps.start:
            profiler.__enter__()
        if number == steps.stop:
            torch.cuda.synchronize()
            profiler.__exit__(None, None, None)
        number += 1

    clock.around_step = around_step
    generate()
    return profiler


def num_ranks() -> int:
    """Ranks that torchrun started."""
    return int(os.environ["WORLD_SIZE"])


def main() -> None:
    """Measure; the first rank writes what all have measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.max_tokens < LEAST_TOKENS:
        parser.error(f"--max-tokens {options.max_tokens} must be at least {LEAST_TOKENS}")
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun, one process per GPU")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # of vLLM's CPU engine
    result = measure(options)
    if os.environ["RANK"] == "0":
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
