"""Where does an interrupted job go on?

The trainers' ranks save their own checkpoints first. When these are there, and the episode's line
is in the metrics file, the small file written here says that the checkpoint is complete, and holds
what only the driver knows. A kill at any time leaves it whole or unmentioned.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.engines.megatron import checkpoint_files

_NAME = re.compile(r"episode_(\d{8,})\.json")


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
    batches: Any = None
    """`BaseEngine.state_batches()` after that episode: tensors, in a file of their own."""
    algorithm: str = ""
    """Name of the engine's class; states of older versions do not say it."""
    num_records: int | None = None
    """Of the training data, of which a module may make fewer or more prompts; None in states of
    older versions."""

    @property
    def has_prompt_per_record(self) -> bool:
        """Whether as many prompts as records are known to have been there."""
        return self.num_records is not None and self.num_records == self.sampler["num_prompts"]


def save_state(directory: Path, state: DriverState, keep: int | None = None) -> None:
    """Write the state; a reader sees the whole file or none.

    Args:
        directory: made if missing.
        state: what to write.
        keep: number of newest states up to this one that stay; None keeps all. Later ones are of
            an earlier run that went further.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = _path(directory, state.episode)
    unfinished = path.with_suffix(".tmp")
    if state.batches is not None:  # first: the other file speaks of it
        torch.save(state.batches, unfinished)
        os.replace(unfinished, _batches_path(path))
    plain = asdict(replace(state, batches=None)) | {"batches": state.batches is not None}
    unfinished.write_text(json.dumps(plain), encoding="utf-8")
    os.replace(unfinished, path)
    if keep is not None:
        own = [episode for episode in saved_episodes(directory) if episode <= state.episode]
        remove_states(directory, own[:-keep])


def load_state(directory: Path, episode: int | None = None) -> DriverState | None:
    """Read a saved state.

    Args:
        directory: where `save_state` wrote.
        episode: which one; None takes the newest.

    Returns:
        The state; None if `episode` is None and nothing was saved.

    Raises:
        UserError: `episode` was not saved, or its files are broken.
    """
    episodes = saved_episodes(directory)
    if episode is not None and episode not in episodes:
        raise UserError(
            f"runtime.load_data_checkpoint_iteration={episode}: {directory} has no such episode; "
            f"it has {', '.join(map(str, episodes)) or 'none'}"
        )
    if not episodes:
        return None
    path = _path(directory, episodes[-1] if episode is None else episode)
    others = [other for other in episodes if _path(directory, other) != path]
    remedy = checkpoint_files.remedy(directory, others)
    try:
        state = DriverState(**json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}). {remedy}") from None
    except TypeError as error:  # JSON of something else
        raise UserError(f"{path}: is no state of a job ({error}). {remedy}") from None
    if not state.batches:
        return replace(state, batches=None)
    try:
        return replace(state, batches=torch.load(_batches_path(path), weights_only=True))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{_batches_path(path)}: cannot be read ({error}). {remedy}") from None


def saved_episodes(directory: Path) -> list[int]:
    """Episodes with a state, oldest first."""
    found = (_NAME.fullmatch(path.name) for path in directory.glob("episode_*.json"))
    return sorted(int(match[1]) for match in found if match)


def remove_states(directory: Path, episodes: Iterable[int]) -> None:
    """Remove the states of some episodes; those that are not there do not matter."""
    for episode in episodes:
        path = _path(directory, episode)
        path.unlink(missing_ok=True)
        _batches_path(path).unlink(missing_ok=True)


def check_trainers(directory: Path, episode: int, trainers: Collection[Path]) -> None:
    """Make sure that the trainers' files of a checkpoint are as they were written.

    Args:
        directory: where `save_state` wrote.
        episode: of the state to go on from.
        trainers: directories of the trainers' checkpoints; one that is not there is not looked at:
            it may be on the hosts of the ranks only, which look for themselves.

    Raises:
        UserError: names the files that are not, and the checkpoints that can be resumed from.
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
        raise UserError(
            f"the checkpoint of episode {episode} cannot be read: {' '.join(found)}. "
            f"{checkpoint_files.remedy(directory, complete)}"
        )


def _path(directory: Path, episode: int) -> Path:
    return directory / f"episode_{episode:08d}.json"


def _batches_path(path: Path) -> Path:
    return path.with_suffix(".pt")
