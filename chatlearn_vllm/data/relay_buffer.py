"""Which earlier episodes' samples can be trained on again?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from chatlearn_vllm.data.batch import Batch, concat


@dataclass(frozen=True)
class EpisodeRelayBuffer:
    """What one episode was trained on."""

    episode: int
    batch: Batch
    """With everything that training needs, `advantages` for example; see data/batch.py."""


RelaySampleFn = Callable[[Sequence[EpisodeRelayBuffer]], Batch]
"""Chooses what is trained on; gets the episodes that are kept, the present one last."""


def all_samples(buffers: Sequence[EpisodeRelayBuffer]) -> Batch:
    """Every sample of every episode that is kept, the earliest first."""
    return concat([buffer.batch for buffer in buffers])


def num_episodes_kept(episode: int, max_episodes: int, first_episode: int = 0) -> int:
    """How many episodes `RelayBuffer.add` hands back in an episode."""
    if max_episodes == 0 or episode < first_episode:
        return 1
    num_since = episode - max(first_episode, 1) + 1
    return num_since if max_episodes < 0 else min(max_episodes, num_since)


class RelayBuffer:
    """The last episodes, the present one included.

    Example:
        relay = RelayBuffer(max_episodes=2)
        batch = all_samples(relay.add(1, batch))
    """

    def __init__(self, max_episodes: int, first_episode: int = 0) -> None:
        """Start empty.

        Args:
            max_episodes: so many are kept, `runtime.max_relay_episode`; -1: all; 0: only the
                present one is handed back.
            first_episode: earlier ones are not kept, `runtime.relay_episode_offset`.
        """
        self._max_episodes = max_episodes
        self._first_episode = first_episode
        self._kept: list[EpisodeRelayBuffer] = []

    def add(self, episode: int, batch: Batch) -> list[EpisodeRelayBuffer]:
        """Keep an episode; what can be trained on in it."""
        buffer = EpisodeRelayBuffer(episode, batch)
        if self._max_episodes == 0 or episode < self._first_episode:
            return [buffer]
        self._kept.append(buffer)
        if self._max_episodes > 0:
            del self._kept[: -self._max_episodes]
        return list(self._kept)

    def state_dict(self) -> list[dict[str, Any]]:
        """What is needed to go on: without the episodes that the next one pushes out."""
        num_kept = len(self._kept) if self._max_episodes < 0 else max(0, self._max_episodes - 1)
        kept = self._kept[len(self._kept) - min(num_kept, len(self._kept)) :]
        return [{"episode": one.episode, "batch": one.batch} for one in kept]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Go on from `state_dict`."""
        self._kept = [EpisodeRelayBuffer(one["episode"], one["batch"]) for one in state]
