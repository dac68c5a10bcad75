"""What is the model that drafts tokens on one rank, and how do new weights enter it?

Its states are its own, beside those of the engine with the model that verifies: the two get their
weights one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chatlearn_vllm.engines import vllm_compat
from chatlearn_vllm.engines.draft_loader import DraftUntouchedError, load_draft
from chatlearn_vllm.engines.draft_weights import DraftWeights
from chatlearn_vllm.engines.live_model import (
    EngineState,
    EngineStateError,
    LiveModel,
    Weights,
)
from chatlearn_vllm.engines.whole_tensors import checked_tensors
from chatlearn_vllm.layouts import (
    ModelShape,
    ParamLayout,
    RolloutParallel,
    VLLMShards,
    check_live_parameters,
)


class DraftModel(LiveModel):
    """A small model beside a policy in one vLLM engine, and the state of its weights.

    Until a weight sync fills it, its weights are those of a directory; they are kept in host memory
    while the engine sleeps at level 2. From then on they are a trainer's, which sends them again.
    """

    def __init__(
        self, engine: Any, model: nn.Module, target: nn.Module, forget_prefixes: Callable[[], None]
    ) -> None:
        """Note where it is.

        Args:
            engine: vLLM's.
            model: this rank's part of the draft.
            target: this rank's part of the model that verifies.
            forget_prefixes: empties the cache of prompt beginnings, which holds the draft's keys
                and values, too.
        """
        self._engine, self._model = engine, model
        self._speculative = engine.vllm_config.speculative_config
        self._directory = Path(self._speculative.draft_model_config.model)
        self._kept = DraftWeights(model, target)
        self._empty_prefix_cache = forget_prefixes
        # Without a version as long as the weights are a directory's.
        super().__init__(EngineState(Weights.READY, None))
        self._asleep_as = Weights.READY

    # ---- a directory's weights, and sleep ------------------------------------------------------

    def expect_sync(self) -> None:
        """The weights are random: nothing can be drafted before the first sync."""
        self.state = EngineState(Weights.DUMMY, None)

    def load(self, directory: str | None) -> None:
        """Read the weights of a directory; None: of that of `speculative_config`.

        Raises:
            EngineStateError: the weights are asleep.
            ValueError: the directory cannot be read, or lacks a layer that is the draft's own; the
                draft has the weights that it had.
        """
        if self.state.weights is Weights.ASLEEP:
            raise EngineStateError("load_draft(): the engine is ASLEEP; wake_weights() first")
        before, self.state = self.state, replace(self.state, weights=Weights.STALE)
        try:
            self._load(directory or str(self._directory))
        except DraftUntouchedError:
            self.state = before
            raise
        self._kept.forget()
        self.forget_prefixes()
        self.state = EngineState(Weights.READY, None)

    def sleep(self, level: int) -> None:
        """Before the engine gives device memory back."""
        if self.state.weights is Weights.ASLEEP:
            return
        # A trainer sends its weights again after level 2, as it does the policy's.
        is_lost = level == 2 and self.state.version is not None
        if level == 2:
            is_sent = is_lost or self.state.weights is Weights.DUMMY
            self._kept.keep(buffers_only=is_sent)
        self._asleep_as = Weights.EMPTY if is_lost else self.state.weights
        self.state = EngineState(Weights.ASLEEP, self.state.version)

    def wake(self) -> None:
        """After the engine took the weights' memory back."""
        if self.state.weights is not Weights.ASLEEP:
            return
        self._kept.give_back()
        self.state = EngineState(self._asleep_as, self.state.version)

    def require_ready(self) -> None:
        """Check that it can draft.

        Raises:
            EngineStateError: it cannot.
        """
        if self.state.weights is not Weights.READY:
            raise EngineStateError(
                f"cannot generate: the draft of the engine is {self.state}, it must be READY. "
                "Its weights arrive by a weight sync from the trainer of the draft, or by "
                "load_draft()"
            )

    # ---- a trainer's weights -------------------------------------------------------------------

    def begin_weight_update(self) -> dict[str, nn.Parameter]:
        """See LiveModel."""
        parameters = super().begin_weight_update()
        self._kept.forget()
        return parameters

    def _forget_prefixes(self) -> None:
        # What a draft reads of its old weights would only be accepted less; still it is not kept.
        self._empty_prefix_cache()

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See LiveModel."""
        self.begin_weight_update()
        self._load(checked_tensors(tensors, self._shape))

    def _load(self, source: str | Iterator[tuple[str, torch.Tensor]]) -> None:
        """Have vLLM load weights; it can again after an error."""
        try:
            load_draft(self._engine, source)
        except DraftUntouchedError:
            raise
        except BaseException:
            # has vLLM forget the layers of which only a part came
            load_draft(self._engine, iter(()))
            raise

    def direct_copy_problem(self) -> str | None:
        """See LiveModel."""
        for name, module in self._model.named_modules():
            if problem := vllm_compat.rewritten_weights(name, module):
                return f"the draft: {problem}"
        try:
            self.check_layouts(self.shards(1).rank_layouts(torch.distributed.get_rank()))
        except ValueError as error:
            return f"the draft: {error}"
        return None

    def parameters(self) -> dict[str, nn.Parameter]:
        """See LiveModel; the draft's embedding and output layer are its own."""
        return dict(self._model.named_parameters())

    def shards(self, num_replicas: int) -> VLLMShards:
        """See LiveModel; the draft is cut over as many ranks as the policy."""
        parallel = self._speculative.draft_parallel_config
        return VLLMShards(
            self._shape,
            RolloutParallel(
                tensor=parallel.tensor_parallel_size,
                # vLLM 0.25 says so of drafts without experts, too.
                expert=parallel.enable_expert_parallel and self._shape.num_experts > 0,
                replicas=num_replicas,
            ),
        )

    def check_layouts(self, layouts: list[ParamLayout]) -> None:
        """See LiveModel."""
        live = {name: tuple(parameter.shape) for name, parameter in self.parameters().items()}
        check_live_parameters(layouts, live, "vLLM's draft")

    @property
    def dtype(self) -> torch.dtype:
        """See LiveModel."""
        return self._speculative.draft_model_config.dtype

    @property
    def device(self) -> torch.device:
        """See LiveModel."""
        return next(self._model.parameters()).device

    @cached_property
    def _shape(self) -> ModelShape:
        """Read when a sync needs it: what is not trained may be of any family."""
        config = json.loads((self._directory / "config.json").read_text())
        return ModelShape.from_hf_config(config)
