"""What does a policy module need of the engine that it generates with, and what states has one?

`vllm_engine.py` is the usual one; another may stand in its place. All answer with objects that have
the attributes of `vllm.RequestOutput`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from chatlearn_vllm.engines.speculation import Speculation
from chatlearn_vllm.engines.vllm_partial import PartialRequest
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


class GenerationEngine(ABC):
    """One rank of an engine: requests in, responses out, weights that a sync replaces.

    This class keeps the state; what an engine does when it changes is in the methods with an
    underscore.
    """

    state: EngineState
    speculation: Speculation | None = None
    """Of an engine that drafts tokens and verifies them."""

    def __init__(self, *, has_weights: bool) -> None:
        """Set the state.

        Args:
            has_weights: whether the engine was built with weights, which are version 0 then.
        """
        ready = EngineState(Weights.READY, 0)
        self.state = ready if has_weights else EngineState(Weights.DUMMY, None)
        self._weights_asleep_as = self.state.weights
        self._has_prefixes = True
        self._version_before: int | None = None

    # ---- requests ---------------------------------------------------------------------------

    @abstractmethod
    def add_request(
        self, request_id: str, prompt: str | None, token_ids: list[int], sampling: dict[str, Any]
    ) -> None:
        """Queue a prompt.

        Args:
            request_id: unique among the queued requests.
            prompt: its text, handed back as `RequestOutput.prompt`.
            token_ids: what the model sees.
            sampling: under the names of `vllm.SamplingParams`, with `max_tokens`, `seed` and `n`.

        Raises:
            ValueError: the engine refuses the request (too long, empty, a token outside the
                vocabulary, a key that it does not have).
        """

    @abstractmethod
    def add_partial_request(self, request: PartialRequest) -> None:
        """Queue a prompt whose responses may have been begun, and can be cut off by `cut`.

        Raises:
            ValueError: the engine refuses it.
        """

    @property
    @abstractmethod
    def requests(self) -> tuple[str, ...]:
        """Ids of the queued and running requests, in the order in which they were added."""

    @abstractmethod
    def run(
        self,
        min_finished: int | None = None,
        max_steps: int | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> list[Any]:
        """Work on requests until some are done.

        Args:
            min_finished: return as soon as so many requests are done; the others go on with the
                next call. None: all of them.
            max_steps: return after so many steps in any case. None: no limit.
            decode: makes text of token ids; needed for partial requests.

        Returns:
            One `vllm.RequestOutput` per finished request, in the order in which they were added.

        Raises:
            EngineStateError: the engine is not READY.
        """

    @abstractmethod
    def cut(self) -> list[PartialRequest]:
        """Drop all queued and running requests; the partial ones as far as they have come."""

    @abstractmethod
    def abort(self) -> None:
        """Drop all queued and running requests."""

    def require_ready(self) -> None:
        """Drop all requests if the engine cannot generate.

        Raises:
            EngineStateError: it cannot.
        """
        if self.state.weights is not Weights.READY or not self.state.kv_cache_awake:
            self.abort()
            raise EngineStateError(
                f"cannot generate: the engine is {self.state}, it must be READY. "
                "Weights arrive by a weight sync; a sleeping engine is woken by wake_weights(), "
                "a sync (sleep level 2) and wake_kv_cache()"
            )

    # ---- memory -----------------------------------------------------------------------------

    def sleep(self, level: int) -> None:
        """Give device memory back: KV cache, and weights to the host (1) or to nothing (2)."""
        if self.state.weights is Weights.ASLEEP:
            return
        self._sleep(level)
        lost = level == 2 and self.state.weights is not Weights.DUMMY
        self._weights_asleep_as = Weights.EMPTY if lost else self.state.weights
        self.state = EngineState(Weights.ASLEEP, self.state.version, kv_cache_awake=False)

    def wake_weights(self) -> None:
        """Take the weights' memory back; after sleep level 2 their values are lost."""
        if self.state.weights is not Weights.ASLEEP:
            return
        self._wake_weights()
        version = None if self._weights_asleep_as is Weights.EMPTY else self.state.version
        self.state = EngineState(self._weights_asleep_as, version, kv_cache_awake=False)

    def wake_kv_cache(self) -> None:
        """Take the KV cache's memory back; the last step before generating."""
        if self.state.kv_cache_awake:
            return
        if self.state.weights is Weights.ASLEEP:
            raise EngineStateError("wake_kv_cache(): the engine is ASLEEP; wake_weights() first")
        self._wake_kv_cache()
        self.state = EngineState(self.state.weights, self.state.version)

    @abstractmethod
    def _sleep(self, level: int) -> None:
        """Give the memory back."""

    @abstractmethod
    def _wake_weights(self) -> None:
        """Take the weights' memory back."""

    @abstractmethod
    def _wake_kv_cache(self) -> None:
        """Take the KV cache's memory back."""

    # ---- weights ----------------------------------------------------------------------------

    def begin_weight_update(self) -> dict[str, torch.nn.Parameter]:
        """Declare the weights STALE and return the live parameters to write into.

        Raises:
            EngineStateError: the weights are asleep.
        """
        if self.state.weights is Weights.ASLEEP:
            raise EngineStateError("cannot write weights: the engine is ASLEEP; wake_weights()")
        self.state = EngineState(Weights.STALE, self.state.version, self.state.kv_cache_awake)
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
        self.state = EngineState(Weights.READY, version, self.state.kv_cache_awake)

    def revoke_weight_update(self, version: int) -> None:
        """Declare the weights STALE again if they are READY at `version`."""
        if self.state.weights is Weights.READY and self.state.version == version:
            before = self._version_before
            self.state = EngineState(Weights.STALE, before, self.state.kv_cache_awake)

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
    def model(self) -> torch.nn.Module:
        """This rank's live model."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """In which the model computes."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where this rank's parameters are."""

    # ---- the rest ---------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """The engine's own counters and gauges by name."""
        return {}

    def close(self) -> None:
        """Release what would outlive the process."""
