"""Where does an interrupted job go on?

The trainer's ranks save their own checkpoint first; the small file written here afterwards says
that it is complete, and holds what only the driver knows.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DriverState:
    """What the driver needs to go on."""

    episode: int
    """Last finished episode; also the `iteration` of the trainer's checkpoint."""
    weight_version: int
    """Weight version that the rollouts of that episode were made with."""
    sampler: dict[str, Any]
    """`PromptSampler.state_dict()` after that episode's prompts were drawn."""
    engine: dict[str, Any] = field(default_factory=dict)
    """`BaseEngine.state_dict()` after that episode."""


def save_state(directory: Path, state: DriverState, keep: int | None = None) -> None:
    """Write the state; a reader sees the whole file or none.

    Args:
        directory: made if missing.
        state: what to write.
        keep: number of newest states that stay; None keeps all.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"episode_{state.episode:08d}.json"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(asdict(state)), encoding="utf-8")
    os.replace(unfinished, path)
    if keep is not None:
        for old in _paths(directory)[:-keep]:
            old.unlink()


def load_state(directory: Path, episode: int | None = None) -> DriverState | None:
    """Read a saved state.

    Args:
        directory: where `save_state` wrote.
        episode: which one; None takes the newest.

    Returns:
        The state; None if `episode` is None and nothing was saved.

    Raises:
        ValueError: `episode` was not saved.
    """
    paths = _paths(directory)
    if episode is not None:
        paths = [path for path in paths if path.stem == f"episode_{episode:08d}"]
        if not paths:
            raise ValueError(
                f"runtime.load_data_checkpoint_iteration={episode}: {directory} has no such episode"
            )
    return DriverState(**json.loads(paths[-1].read_text(encoding="utf-8"))) if paths else None


def _paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("episode_*.json"))
