"""Where do the numbers of an episode go, and what is left of them after a kill?"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """Write one line per episode to `metrics.jsonl`, and the same numbers to TensorBoard.

    A line is written with a single call and flushed, so a killed job leaves whole lines. A resumed
    job keeps the lines before its first episode and drops later ones, and a torn last line.

    Example:
        with MetricWriter(output_dir, first_episode=1) as writer:
            writer.write(1, {"rollout/reward_mean": 0.5})
    """

    def __init__(
        self, output_dir: str | Path, first_episode: int, tensorboard: bool = True
    ) -> None:
        """Open the files.

        Args:
            output_dir: directory of the job's results; made if missing.
            first_episode: episode of the first line to come; earlier lines are kept.
            tensorboard: whether to write event files under `output_dir/tensorboard` too.
        """
        self.path = Path(output_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _keep_lines_before(self.path, first_episode)
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = _summary_writer(output_dir, first_episode) if tensorboard else None

    def write(self, episode: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of one episode to every sink."""
        self._file.write(json.dumps({"episode": episode, **metrics}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, episode)
            self._tensorboard.flush()

    def close(self) -> None:
        """Close every sink; safe to call twice."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a metrics file; a last line that a kill left unfinished is skipped."""
    episodes = []
    for line in Path(path).read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            episodes.append(json.loads(line))
    return episodes


def _keep_lines_before(path: Path, first_episode: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["episode"] < first_episode]
    rewritten = path.with_suffix(".jsonl.tmp")
    rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(rewritten, path)


def _summary_writer(output_dir: str | Path, first_episode: int) -> Any:
    # Imports torch and tensorboard: seconds that `--help` and the config checks need not pay.
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides the events that an interrupted run wrote after the point of resumption.
    return SummaryWriter(str(Path(output_dir) / "tensorboard"), purge_step=first_episode)
