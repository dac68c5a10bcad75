"""What does a policy module need of the engine that it generates with?

`vllm_engine.py` is the usual one; another may stand in its place. All answer with objects that have
the attributes of `vllm.RequestOutput`.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch

from chatlearn_vllm.engines.live_model import EngineState, EngineStateError, LiveModel, Weights
from chatlearn_vllm.engines.speculation import Speculation
from chatlearn_vllm.engines.vllm_partial import PartialRequest


class GenerationEngine(LiveModel, ABC):
    """One rank of an engine: requests in, responses out, weights that a sync replaces.

    This class keeps the state, with LiveModel; what an engine does when it changes is in the
    methods with an underscore.
    """

    speculation: Speculation | None = None
    """Of an engine that drafts tokens and verifies them."""
    draft: LiveModel | None = None
    """The model that drafts them, where it is one."""

    def __init__(self, *, has_weights: bool) -> None:
        """Set the state.

        Args:
            has_weights: whether the engine was built with weights, which are version 0 then.
        """
        ready = EngineState(Weights.READY, 0)
        super().__init__(ready if has_weights else EngineState(Weights.DUMMY, None))
        self._weights_asleep_as = self.state.weights

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
    ) -> list[Any]:
        """Work on requests until some are done.

        Args:
            min_finished: return as soon as so many requests are done; the others go on with the
                next call. None: all of them.
            max_steps: return after so many steps in any case. None: no limit.

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

    # ---- the rest ---------------------------------------------------------------------------

    @property
    @abstractmethod
    def model(self) -> torch.nn.Module:
        """This rank's live model."""

    def metrics(self) -> dict[str, float]:
        """The engine's own counters and gauges by name."""
        return {}

    def close(self) -> None:
        """Release what would outlive the process."""
