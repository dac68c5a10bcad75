"""Where do the seconds and the device memory of a PPO episode go, with all six roles on one GPU?

    python examples/megatron/make_tiny_llama.py --preset 1b --out MODEL
    python benchmarks/colocated_ppo.py --model MODEL --out runs.jsonl
    python benchmarks/colocated_ppo.py --table runs.jsonl --plot runs.png

Runs configs/llama2/rlhf.yaml with policy, reference, value, and both trainers on one device, and
writes one line of JSON per episode: seconds by phase as in metrics.jsonl, and the device's memory
in use, of all processes together, at the beginning and end of each phase and at its peak. The model
has random weights, so responses end by chance, after 1 to `--max-new-tokens` tokens; the numbers
are of speed and memory, not of learning.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatlearn_vllm import RLHFEngine
from chatlearn_vllm.config import JobConfig, load_config
from chatlearn_vllm.data.prompts import load_prompts
from chatlearn_vllm.observability.timers import PhaseTimers

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 2**20
ROLES = ("policy", "ppo_policy", "reference", "value", "ppo_value")
PHASES = ("rollout", "reward", "reference", "value", "onload", "train", "offload", "sync")


def main() -> None:
    """Read the command line; run, or show what an earlier run wrote."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face directory that all roles start from")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--samples", type=int, default=512, help="responses per episode")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--tokens-per-micro-batch", type=int, default=32768)
    parser.add_argument("--out", type=Path, help="file that lines of JSON are written to")
    parser.add_argument("--run-dir", default="outputs/colocated_ppo", help="of the job")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print what a run wrote")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --table: draw it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of a job")
    arguments = parser.parse_args()
    if arguments.table:
        lines = [json.loads(line) for line in arguments.table.read_text().splitlines()]
        print(table(lines))
        if arguments.plot:
            draw(lines, arguments.plot)
        return
    if not (arguments.model and arguments.out):
        parser.error("--model and --out are needed for a run")
    run(make_job(arguments), arguments.out)


def make_job(arguments: argparse.Namespace) -> JobConfig:
    """The shipped PPO job, on one device and with longer responses."""
    room = arguments.max_new_tokens + 32
    keys: dict[str, Any] = {
        "runtime.num_episode": arguments.episodes,
        "runtime.sample_per_episode": arguments.samples,
        "runtime.train_global_batch_size": arguments.samples // 2,
        "runtime.eval_episode_interval": 0,
        "runtime.enable_eval_before_training": False,
        "runtime.output_dir": arguments.run_dir,
    }
    for role in ROLES:
        of_model = f"models.{role}.model_args"
        keys[f"models.{role}.num_gpu"] = 1
        keys[f"{of_model}.load"] = arguments.model
        keys[f"{of_model}.max_new_tokens"] = arguments.max_new_tokens
        keys[f"{of_model}.seq_length"] = room
        if role != "policy":
            keys[f"{of_model}.max_tokens_per_micro_batch"] = arguments.tokens_per_micro_batch
    keys["models.policy.model_args.max_num_seqs"] = arguments.samples
    keys["models.ppo_policy.model_args.lr"] = 1e-6
    keys["models.ppo_value.model_args.lr"] = 1e-5
    overrides = [f"{key}={value}" for key, value in keys.items()]
    job = REPOSITORY / "configs" / "llama2" / "rlhf.yaml"
    return load_config(job, [*overrides, *arguments.overrides], check_files=True)


def run(job: JobConfig, out: Path) -> None:
    """Run the job; one line per episode is appended as soon as it is over."""
    sys.path.insert(0, str(REPOSITORY))  # for `examples`
    from examples.megatron.models.arithmetic_reward import ArithmeticReward
    from examples.megatron.models.policy_reference import PolicyReference
    from examples.megatron.models.policy_trainer import PolicyTrainer
    from examples.megatron.models.value_model import ValueInference, ValueTrainer
    from examples.megatron.models.vllm_policy_inference import VLLMPolicyInference

    class RecordedPPO(RLHFEngine):
        """Writes each episode's line."""

        def _run_timed_episode(self, episode: int) -> dict[str, float]:
            metrics = super()._run_timed_episode(episode)
            line = {"episode": episode, "memory_mib": timers.take_spans(), "metrics": metrics}
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            return metrics

    engine = RecordedPPO(
        VLLMPolicyInference("policy", job),
        PolicyReference("reference", job),
        ArithmeticReward("reward", job),
        ValueInference("value", job),
        PolicyTrainer("ppo_policy", job),
        ValueTrainer("ppo_value", job),
    )
    engine.set_dataset(load_prompts(job.runtime.data_path, -1))
    with MemoryMeter() as meter:
        timers = engine.timers = RecordingTimers(meter)
        engine.learn()


class MemoryMeter:
    """Bytes in use on GPU 0, of all processes; looks every 5 ms, so that peaks are seen.

    Without a GPU everything is 0.
    """

    def __init__(self) -> None:
        self._peak = 0
        self._ended = threading.Event()
        self._handle = None
        try:
            from vllm.third_party import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            self._nvml = pynvml
        except Exception as error:  # no driver: pynvml has an exception class for each reason
            print(f"no device memory is recorded: {error}", file=sys.stderr)

    def __enter__(self) -> MemoryMeter:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()

    def used(self) -> int:
        """Bytes now."""
        if self._handle is None:
            return 0
        return self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used

    def take_peak(self) -> int:
        """Most bytes since the last call."""
        peak, self._peak = max(self._peak, self.used()), 0
        return peak

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self._peak = max(self._peak, self.used())


class RecordingTimers(PhaseTimers):
    """Also notes the device's memory at the beginning, peak and end of each phase, in MiB."""

    def __init__(self, meter: MemoryMeter) -> None:
        super().__init__()
        self._meter = meter
        self._spans: list[dict[str, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """As PhaseTimers."""
        if name == "episode":
            with super().phase(name):
                yield
            return
        self._meter.take_peak()
        before = self.seconds(name)
        span = {"phase": name, "begin": self._meter.used() // MIB}
        self._spans.append(span)
        try:
            with super().phase(name):
                yield
        finally:
            span["peak"] = self._meter.take_peak() // MIB
            span["end"] = self._meter.used() // MIB
            span["seconds"] = round(self.seconds(name) - before, 4)

    def take_spans(self) -> list[dict[str, Any]]:
        """What was noted since the last call, in the order in which phases began."""
        spans, self._spans = self._spans, []
        return spans


def asleep_mib(line: dict[str, Any]) -> int:
    """Memory in use while no model is on the device: before the first trainer comes."""
    return next(span["begin"] for span in line["memory_mib"] if span["phase"] == "onload")


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a phase per row, medians over the episodes from the second on."""
    later = [line for line in lines if line["episode"] > 1]
    episode = statistics.median(line["metrics"]["time/episode_s"] for line in later)
    rows = [
        "| phase | seconds | share of the episode | peak memory, GiB |",
        "| --- | --- | --- | --- |",
    ]
    for phase in (*PHASES, "other"):
        seconds = [line["metrics"].get(f"time/{phase}_s", 0.0) for line in later]
        peaks = [s["peak"] for line in later for s in line["memory_mib"] if s["phase"] == phase]
        spent = statistics.median(seconds)
        peak = f"{max(peaks) / 1024:.1f}" if peaks else ""
        rows.append(f"| {phase} | {spent:.3f} | {100 * spent / episode:.1f} % | {peak} |")
    rows.append(f"| episode | {episode:.2f} | | |")
    asleep = {line["episode"]: asleep_mib(line) for line in lines}
    first, last = later[0]["episode"], later[-1]["episode"]
    speed = statistics.median(line["metrics"]["rollout/tokens_per_s"] for line in later)
    length = statistics.median(line["metrics"]["rollout/response_tokens_mean"] for line in later)
    rows.append("")
    rows.append(f"asleep: {asleep[first]} MiB in episode {first}, {asleep[last]} in episode {last}")
    rows.append(f"rollout: {speed:,.0f} tokens/s, {length:.0f} tokens a response")
    return "\n".join(rows)


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Device memory along the phases of the second and the last episode; seconds by episode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for line in (lines[1], lines[-1]):
        spans = line["memory_mib"]
        left.plot([s["peak"] / 1024 for s in spans], marker="o", label=f"episode {line['episode']}")
    names = [span["phase"] for span in lines[1]["memory_mib"]]
    left.set_xticks(range(len(names)), names, rotation=90)
    left.set(ylabel="peak memory in the phase, GiB", ylim=(0, None), title="device memory")
    left.grid(alpha=0.3)
    left.legend()
    bottom = [0.0] * len(lines)
    for phase in (*PHASES, "other"):
        seconds = [line["metrics"].get(f"time/{phase}_s", 0.0) for line in lines]
        right.bar([line["episode"] for line in lines], seconds, bottom=bottom, label=phase)
        bottom = [low + more for low, more in zip(bottom, seconds, strict=True)]
    right.set(xlabel="episode", ylabel="seconds", title="seconds by phase")
    right.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
