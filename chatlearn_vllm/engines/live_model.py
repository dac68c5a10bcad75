"""What does a weight sync need of a model that runs in an engine, and what states has one?"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

import torch

from chatlearn_vllm.layouts import ParamLayout, ShardedModel


class Weights(Enum):
    """What the engine's parameters hold."""

    DUMMY = "DUMMY"
    """Random values; no weights have arrived yet."""
    ASLEEP = "ASLEEP"
    """Given back to the device, or out of reach until `wake_weights`."""
    EMPTY = "EMPTY"
    """Memory is back, the values are lost (sleep level 2)."""
    STALE = "STALE"
    """A sync began and did not finish; the values may mix two versions."""
    READY = "READY"
    """Exactly the weights of `version`."""


@dataclass(frozen=True)
class EngineState:
    """What an engine can do now."""

    weights: Weights
    version: int | None
    """Weight version for READY and STALE (the last complete one); None where there is none."""
    kv_cache_awake: bool = True

    def __str__(self) -> str:
        text = self.weights.value
        if self.version is not None and self.weights in (Weights.READY, Weights.STALE):
            text += f"({self.version})"
        return text if self.kv_cache_awake else f"{text} without KV cache"


class EngineStateError(RuntimeError):
    """An engine was asked for something that its state does not allow."""


class LiveModel(ABC):
    """One rank of a model that generates, or drafts, and whose weights a sync replaces.

    This class keeps the state; what a model does when it changes is in the methods with an
    underscore.
    """

    state: EngineState
    ranks_per_loader: int = 1
    """Of how many ranks of a replica one, the first, takes whole tensors for all."""

    def __init__(self, state: EngineState) -> None:
        """Set the state."""
        self.state = state
        self._has_prefixes = True
        self._version_before: int | None = None

    def begin_weight_update(self) -> dict[str, torch.nn.Parameter]:
        """Declare the weights STALE and return the live parameters to write into.

        Raises:
            EngineStateError: the weights are asleep.
        """
        if self.state.weights is Weights.ASLEEP:
            raise EngineStateError("cannot write weights: the engine is ASLEEP; wake_weights()")
        self.state = replace(self.state, weights=Weights.STALE)
        self._has_prefixes = True
        return self.parameters()

    def forget_prefixes(self) -> None:
        """Forget what the KV cache holds for prompts to come, computed with the old weights.

        vLLM visits every block: some 10 ms for a large cache, so a GPU may copy meanwhile. A call
        between `begin_weight_update` and `finish_weight_update` takes that off the latter.
        """
        self._forget_prefixes()
        self._has_prefixes = False

    def finish_weight_update(self, version: int) -> None:
        """Declare the weights READY at `version` and forget what was cached for the old ones."""
        if self._has_prefixes:
            self.forget_prefixes()
        self._note_version(version)
        self._version_before = self.state.version
        self.state = replace(self.state, weights=Weights.READY, version=version)

    def revoke_weight_update(self, version: int) -> None:
        """Declare the weights STALE again if they are READY at `version`."""
        if self.state.weights is Weights.READY and self.state.version == version:
            self.state = replace(self.state, weights=Weights.STALE, version=self._version_before)

    def _forget_prefixes(self) -> None:
        """Empty the cache of common prompt beginnings, for an engine that has one."""

    def _note_version(self, version: int) -> None:
        """Tell the engine the version, if it has a place for it."""

    @abstractmethod
    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take a whole checkpoint; `finish_weight_update` comes after it.

        The engine is STALE from here on. If `tensors` raises, or is incomplete, loading may be
        tried again.

        Args:
            tensors: every tensor of the checkpoint, whole, by its Hugging Face name; read one
                after the other, so a generator may gather them bucket by bucket.

        Raises:
            EngineStateError: the weights are asleep.
            ValueError: a tensor is missing, unknown or of another shape.
        """

    @abstractmethod
    def direct_copy_problem(self) -> str | None:
        """Why new weights cannot be written into the live parameters; None if they can."""

    @abstractmethod
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """This rank's live parameters by the engine's names; tied parameters once."""

    @abstractmethod
    def shards(self, num_replicas: int) -> ShardedModel:
        """Where the model lies on the ranks of so many replicas like this one."""

    @abstractmethod
    def check_layouts(self, layouts: list[ParamLayout]) -> None:
        """Compare what this rank should hold with its live parameters.

        Raises:
            ValueError: they differ; lists what does.
        """

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """In which the model computes."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where this rank's parameters are."""
