"""Draw the learning curves of runs with several seeds, and keep the numbers behind them.

    python benchmarks/learning_curves.py 42=outputs/a/rlhf 1=outputs/b/rlhf \
        --show eval/accuracy ppo_value/loss --out docs/benchmarks/cpu_ppo_demo

Writes OUT.png, one panel per metric, and OUT.jsonl, one line per seed and episode with the metrics
shown, and prints the first and the last value of each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from chatlearn_vllm.observability.metrics import read_metrics


def main() -> None:
    """Read the runs, write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="SEED=DIR", help="DIR holds metrics.jsonl")
    parser.add_argument("--show", nargs="+", default=["eval/accuracy"], help="names of metrics")
    parser.add_argument("--out", type=Path, required=True, help="path without ending")
    arguments = parser.parse_args()

    lines = []
    for run in arguments.runs:
        seed, _, directory = run.partition("=")
        for metrics in read_metrics(Path(directory) / "metrics.jsonl"):
            shown = {name: metrics[name] for name in arguments.show if name in metrics}
            lines.append({"seed": seed, "episode": metrics["episode"], **shown})
    arguments.out.with_suffix(".jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    draw(lines, arguments.show, arguments.out.with_suffix(".png"))
    for seed, name, points in curves(lines, arguments.show):
        print(f"seed {seed}  {name}: {points[0][1]:.4g} -> {points[-1][1]:.4g}")


def curves(
    lines: list[dict[str, float]], names: list[str]
) -> list[tuple[str, str, list[tuple[int, float]]]]:
    """(seed, metric, points), metric by metric."""
    seeds = list(dict.fromkeys(line["seed"] for line in lines))
    found = []
    for name in names:
        for seed in seeds:
            points = [(x["episode"], x[name]) for x in lines if x["seed"] == seed and name in x]
            found.append((seed, name, points))
    return found


def draw(lines: list[dict[str, float]], names: list[str], path: Path) -> None:
    """One panel per metric, one curve per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(names), figsize=(4.5 * len(names), 3.5), layout="constrained", squeeze=False
    )
    axes_of = dict(zip(names, panels[0], strict=True))
    for seed, name, points in curves(lines, names):
        axes_of[name].plot(*zip(*points, strict=True), label=f"seed {seed}", linewidth=1)
    for name, axes in axes_of.items():
        axes.set(xlabel="episode", title=name)
        axes.grid(alpha=0.3)
    axes_of[names[0]].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
