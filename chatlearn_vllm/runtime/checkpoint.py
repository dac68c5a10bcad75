"""Where does an interrupted job go on?

The trainers' ranks save their own checkpoints first. When these are there, and the episode's line
is in the metrics file, the small file written here says that the checkpoint is complete, and holds
what only the driver knows. A kill at any time leaves it whole or unmentioned.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chatlearn_vllm.engines.megatron import checkpoint_files


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
    path = _path(directory, state.episode)
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
        ValueError: `episode` was not saved, or its file is broken.
    """
    episodes = saved_episodes(directory)
    if episode is not None and episode not in episodes:
        raise ValueError(
            f"runtime.load_data_checkpoint_iteration={episode}: {directory} has no such episode; "
            f"it has {', '.join(map(str, episodes)) or 'none'}"
        )
    if not episodes:
        return None
    path = _path(directory, episodes[-1] if episode is None else episode)
    try:
        return DriverState(**json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        others = [other for other in episodes if _path(directory, other) != path]
        raise ValueError(
            f"{path}: is not JSON ({error}). {checkpoint_files.remedy(directory, others)}"
        ) from None


def saved_episodes(directory: Path) -> list[int]:
    """Episodes with a state, oldest first."""
    return sorted(int(path.stem.removeprefix("episode_")) for path in _paths(directory))


def remove_states(directory: Path, episodes: Iterable[int]) -> None:
    """Remove the states of some episodes; those that are not there do not matter."""
    for episode in episodes:
        _path(directory, episode).unlink(missing_ok=True)


def check_trainers(directory: Path, episode: int, trainers: Collection[Path]) -> None:
    """Make sure that the trainers' files of a checkpoint are as they were written.

    Args:
        directory: where `save_state` wrote.
        episode: of the state to go on from.
        trainers: directories of the trainers' checkpoints; one that is not there is not looked at:
            it may be on the hosts of the ranks only, which look for themselves.

    Raises:
        ValueError: names the files that are not, and the checkpoints that can be resumed from.
    """

    def problems(number: int) -> list[str]:
        paths = [
            trainer / checkpoint_files.checkpoint_name(number)
            for trainer in trainers
            if trainer.is_dir()
        ]
        return [f"{path}: {'; '.join(found)}" for path in paths
                if (found := checkpoint_files.problems(path))]  # fmt: skip

    if found := problems(episode):
        complete = [
            other for other in saved_episodes(directory) if other != episode and not problems(other)
        ]
        raise ValueError(
            f"the checkpoint of episode {episode} cannot be read: {' '.join(found)}. "
            f"{checkpoint_files.remedy(directory, complete)}"
        )


def _path(directory: Path, episode: int) -> Path:
    return directory / f"episode_{episode:08d}.json"


def _paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("episode_*.json"))
