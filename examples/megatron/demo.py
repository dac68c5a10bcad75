"""Make a small Llama better at arithmetic, from nothing:  python examples/megatron/demo.py

Makes tokenizer and model, teaches the format by supervised fine-tuning, improves the answers with
GRPO (or `--algorithm`), draws the learning curve, and prints one line of JSON. `--preset 100m` is
for a GPU.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from chatlearn_vllm.observability.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs" / "llama2"

ALGORITHMS = ("grpo", "online_dpo", "rlhf")
PRESETS = {
    # The defaults of the yaml files: two trainer ranks and two rollout ranks, colocated.
    "demo": {},
    # One GPU: trainer and rollout share it; bf16, CUDA graphs, larger batches.
    "100m": {
        "num_gpu_policy": "1",
        "num_gpu_policy_trainer": "1",
        "gpu_memory_utilization": "0.3",
        "max_num_seqs": "1024",
        "train_micro_batch_size": "512",
        "generation_batch_size": "1024",
        "sft_train_micro_batch_size": "128",
        "sft_lr": "3e-4",
        "policy_lr": "3e-5",
    },
}


def main() -> None:
    """Run the steps; each is a command that can be run by hand, too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="size of the model")
    parser.add_argument(
        "--algorithm", choices=ALGORITHMS, default="grpo", help="yaml in configs/llama2"
    )
    parser.add_argument("--out", default="outputs/demo", help="directory, emptied first")
    arguments = parser.parse_args()

    out = Path(arguments.out).resolve()
    shutil.rmtree(out, ignore_errors=True)
    environment = os.environ | {
        "output_dir": str(out),
        "sft_load": str(out / "init"),
        "sft_save": str(out / "sft"),
        "policy_load": str(out / "sft" / "hf"),
        **PRESETS[arguments.preset],
    }
    step(environment, "examples/megatron/make_tiny_llama.py", "--preset", arguments.preset,
         "--out", str(out / "init"))  # fmt: skip
    step(environment, "-m", "chatlearn_vllm.cli.main", "launch", str(CONFIGS / "sft.yaml"))
    job = str(CONFIGS / f"{arguments.algorithm}.yaml")
    step(environment, "-m", "chatlearn_vllm.cli.main", "launch", job)

    history = read_metrics(out / arguments.algorithm / "metrics.jsonl")
    draw_learning_curve(history, out / "learning_curve.png")
    print(f"learning curve: {out / 'learning_curve.png'}", flush=True)
    print(json.dumps(summary(history)), flush=True)


def step(environment: dict[str, str], *command: str) -> None:
    """Run a Python command in the repository; its failure ends the demo."""
    result = subprocess.run([sys.executable, *command], cwd=REPOSITORY, env=environment)
    if result.returncode:
        raise SystemExit(result.returncode)


def summary(history: list[dict[str, float]]) -> dict[str, float]:
    """The numbers that say whether the job worked."""
    accuracy = [metrics["eval/accuracy"] for metrics in history if "eval/accuracy" in metrics]
    trained = [metrics for metrics in history if metrics["episode"] > 0]
    last = history[-1]
    numbers = {
        "episodes": last["episode"],
        "accuracy_first": accuracy[0],
        "accuracy_last": accuracy[-1],
        "weight_version": last["sync/weight_version"],
        "sync_bytes": last["sync/bytes"],
        "sync_seconds_median": statistics.median(m["sync/seconds"] for m in trained),
        "rollout_tokens_per_s": statistics.median(m["rollout/tokens_per_s"] for m in trained),
    }
    difference = "train/logprob_abs_diff_mean"  # training on pairs does not compare
    if difference in last:
        numbers["logprob_abs_diff_mean"] = statistics.fmean(m[difference] for m in trained)
    return numbers


def draw_learning_curve(history: list[dict[str, float]], path: Path) -> None:
    """Accuracy on problems never trained on, and reward on those trained on, by episode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for key, label in (("rollout/accuracy", "training samples"), ("eval/accuracy", "evaluation")):
        points = [(m["episode"], m[key]) for m in history if key in m]
        axes.plot(*zip(*points, strict=True), marker="o" if key[0] == "e" else None, label=label)
    axes.set(xlabel="episode", ylabel="accuracy", ylim=(0, 1), title="arithmetic")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
