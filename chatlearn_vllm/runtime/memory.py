"""Who is in device memory while colocated models take turns?

Between episodes the policy is in memory, awake, and the trainer is out. Each step below is one
line of that exchange; for a model that shares its devices with no other, or whose yaml does
not ask for it, every step does nothing.
"""

from __future__ import annotations

from chatlearn_vllm.config import ModelConfig
from chatlearn_vllm.runtime.worker_group import WorkerGroup


def gives_memory_back(config: ModelConfig, shares_devices: bool) -> bool:
    """Whether a model's weights leave device memory while other models work."""
    return (shares_devices or config.force_free_memory) and config.offload_weights


class TrainerMemory:
    """Moves the parts of a trainer that its yaml lets go of."""

    def __init__(self, group: WorkerGroup, config: ModelConfig, shares_devices: bool) -> None:
        moves = shares_devices or config.force_free_memory
        self._group = group
        self._parts = {
            "weights": moves and config.offload_weights,
            "grads": moves and config.free_grad_buffers,
            "optimizer": moves and config.offload_optimizer_states,
        }

    @property
    def moves_weights(self) -> bool:
        """Whether the weights lie in another place after each episode."""
        return self._parts["weights"]

    def onload(self, *parts: str) -> None:
        """Bring parts ("weights", "grads", "optimizer"; none given = all) to the device."""
        self._move("onload", parts)

    def offload(self, *parts: str) -> None:
        """Take parts (none given = all) off the device."""
        self._move("offload", parts)

    def _move(self, method: str, parts: tuple[str, ...]) -> None:
        chosen = {
            part: movable and (not parts or part in parts) for part, movable in self._parts.items()
        }
        if any(chosen.values()):
            self._group.call(method, **chosen)


class PolicyMemory:
    """Puts a rollout engine to sleep and wakes it in two steps, weights before KV cache."""

    def __init__(self, group: WorkerGroup, config: ModelConfig, shares_devices: bool) -> None:
        self._group = group
        self._sleeps = gives_memory_back(config, shares_devices)

    def offload(self) -> None:
        """Sleep: give back weights and KV cache."""
        self._call("sleep")

    def wake_weights(self) -> None:
        """Take the weights' memory back; with sleep level 2 a weight sync must follow."""
        self._call("wake_weights")

    def wake_kv_cache(self) -> None:
        """Take the KV cache's memory back; then the policy can generate."""
        self._call("wake_kv_cache")

    def _call(self, method: str) -> None:
        if self._sleeps:
            self._group.call(method)


class ScorerMemory:
    """Keeps a frozen model (reference, reward) in device memory only while it scores."""

    def __init__(self, group: WorkerGroup, config: ModelConfig, shares_devices: bool) -> None:
        self._group = group
        self._moves = gives_memory_back(config, shares_devices)

    @property
    def is_resident(self) -> bool:
        """Whether the model is always in memory."""
        return not self._moves

    def onload(self) -> None:
        """Bring the model to the device."""
        if self._moves:
            self._group.call("onload")

    def offload(self) -> None:
        """Take the model off the device."""
        if self._moves:
            self._group.call("offload")
