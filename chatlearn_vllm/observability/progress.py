"""How does a person at the terminal, or a log file, see how far the job is?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN = {
    "rollout/reward_mean": "reward",
    "rollout/accuracy": "accuracy",
    "eval/accuracy": "eval accuracy",
    "train/loss": "loss",
    "train/kl": "kl",
    "rollout/response_tokens_mean": "length",
    "rollout/tokens_per_s": "tokens/s",
    "train/logprob_abs_diff_mean": "logprob diff",
    "sync/seconds": "sync s",
    "time/episode_s": "s",
}
"""Metric -> its short name on screen, in the order shown."""


class EpisodeProgress:
    """A bar on a terminal; one plain line per episode anywhere else.

    Example:
        with EpisodeProgress(total=100) as progress:
            progress.update(1, {"rollout/reward_mean": 0.5})
    """

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        """Prepare for `total` episodes of which `done` were finished by an earlier run."""
        self._total = total
        self._stream = stream or sys.stdout
        self._bar: Progress | None = None
        if self._stream.isatty():
            self._bar = Progress(
                TextColumn("episode"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task("", total=total, completed=done)

    def update(self, episode: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a finished episode; episode 0 is from before training."""
        if self._bar is not None:
            self._bar.update(self._task, completed=episode, description=summary(metrics))
        else:
            print(
                f"episode {episode}/{self._total}  {summary(metrics)}",
                file=self._stream,
                flush=True,
            )

    def __enter__(self) -> EpisodeProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def summary(metrics: Mapping[str, float]) -> str:
    """The metrics worth a glance, on one line: `reward 0.500  accuracy 0.250`."""
    return "  ".join(
        f"{short} {metrics[name]:.4g}" for name, short in SHOWN.items() if name in metrics
    )
