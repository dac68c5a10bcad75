"""What are the ranks of a replica that generates with a vLLM server, and what do the others do?

The first rank calls the server (`server_engine.py`). A server that the job has started for several
ranks runs on the devices of all of them; the others keep these devices for it, and get neither
answers nor weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from chatlearn_vllm.engines.generation_engine import GenerationEngine
from chatlearn_vllm.engines.vllm_partial import PartialRequest
from chatlearn_vllm.layouts import (
    ModelShape,
    ParamLayout,
    RolloutParallel,
    ShardedModel,
    VLLMShards,
)


class ServerRank(GenerationEngine):
    """What all ranks have in common: the model is in the server's processes."""

    def __init__(
        self, shape: ModelShape, *, dtype: torch.dtype, ranks_per_replica: int, has_weights: bool
    ) -> None:
        """Set the state.

        Args:
            shape: sizes of the model.
            dtype: in which weights are sent to the server.
            ranks_per_replica: ranks on whose devices the server is; 1 for a server elsewhere.
            has_weights: whether the server has weights of its own, not random ones.
        """
        super().__init__(has_weights=has_weights)
        self._shape = shape
        self._dtype = dtype
        self.ranks_per_loader = ranks_per_replica

    def add_partial_request(self, request: PartialRequest) -> None:
        """Not possible: a server does not say how far a response has come.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"request {request.request_id}: a vLLM server cannot go on with begun responses; set "
            "runtime.max_rollout_round: 1, or inference_engine: vllm"
        )

    def cut(self) -> list[PartialRequest]:
        """Drop all queued and running requests; there are no partial ones."""
        self.abort()
        return []

    def direct_copy_problem(self) -> str | None:
        """Why new weights cannot be written into live parameters: they are in another process."""
        return "the parameters are in the server's processes"

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """None: they are in the server's processes."""
        return {}

    def shards(self, num_replicas: int) -> ShardedModel:
        """The whole model for the first rank of each replica; the server cuts it."""
        return VLLMShards(self._shape, RolloutParallel(replicas=num_replicas))

    def check_layouts(self, layouts: list[ParamLayout]) -> None:
        """Nothing to compare here: vLLM's loader compares in the server."""

    @property
    def model(self) -> torch.nn.Module:
        """An empty module: the model is in the server's processes."""
        return torch.nn.Module()

    @property
    def dtype(self) -> torch.dtype:
        """In which weights are sent: that of the server's model."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """This rank's GPU, if it has one; the first rank gathers weights there."""
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


class ServerPeer(ServerRank):
    """A rank whose device is the server's, beside the first one: it keeps step, and does nothing.

    It notes requests until `run`, so that a module finds as many as its hook has added, and keeps
    the state of the first rank's engine.
    """

    def __init__(
        self, shape: ModelShape, *, dtype: torch.dtype, ranks_per_replica: int, has_weights: bool
    ) -> None:
        """See ServerRank."""
        super().__init__(
            shape, dtype=dtype, ranks_per_replica=ranks_per_replica, has_weights=has_weights
        )
        self._requests: list[str] = []

    def add_request(
        self, request_id: str, prompt: str | None, token_ids: list[int], sampling: dict[str, Any]
    ) -> None:
        """Note the request; the first rank checks it."""
        self._requests.append(request_id)

    @property
    def requests(self) -> tuple[str, ...]:
        """Ids of the requests since `run`, in the order in which they were added."""
        return tuple(self._requests)

    def run(
        self,
        min_finished: int | None = None,
        max_steps: int | None = None,
    ) -> list[Any]:
        """Forget the requests; the answers come to the first rank.

        Raises:
            EngineStateError: the engine is not READY.
        """
        self.require_ready()
        self.abort()
        return []

    def abort(self) -> None:
        """Drop all requests."""
        self._requests = []

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Be STALE while the first rank sends the weights to the server.

        Raises:
            EngineStateError: the weights are asleep.
        """
        self.begin_weight_update()

    def _sleep(self, level: int) -> None:
        """Nothing: the first rank has the server sleep."""

    def _wake_weights(self) -> None:
        """Nothing: the first rank wakes the server."""

    def _wake_kv_cache(self) -> None:
        """Nothing: the first rank wakes the server."""
