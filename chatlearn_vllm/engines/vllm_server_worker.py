"""What do the workers of a vLLM server do so that a job can update their weights?

`vllm serve --worker-extension-cls chatlearn_vllm.engines.vllm_server_worker.WeightUpdates` adds the
methods below to vLLM's worker class, to be called over `/collective_rpc`. Nothing else imports this
module: importing it makes CPU layers keep plain weights, because vLLM has no place for code between
a worker's start and its model.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from chatlearn_vllm.engines import vllm_compat
from chatlearn_vllm.engines.weight_stream import receive_tensors

_OF_THE_PROCESS = contextlib.ExitStack()
_OF_THE_PROCESS.enter_context(vllm_compat.unpacked_cpu_weights())

_BOOT_ID = uuid.uuid4().hex
"""Different after each start: a server that was started anew has lost its weights."""


class WeightUpdates:
    """Methods of vLLM's worker, `self`; they answer with maps, which the API passes on."""

    def chatlearn_describe(self) -> dict[str, Any]:
        """What this worker runs, for the checks at the start of a job."""
        config = self.vllm_config
        model, parallel = config.model_config, config.parallel_config
        return {
            "boot_id": _BOOT_ID,
            "weight_version": getattr(self, "_chatlearn_version", None),
            "weights_id": getattr(self, "_chatlearn_weights_id", None),
            "max_model_len": model.max_model_len,
            "vocab_size": model.get_vocab_size(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": str(model.logprobs_mode),
            "device_type": self.device.type,
            "has_sleep_mode": bool(model.enable_sleep_mode),
            "num_workers": parallel.world_size,
            "data_parallel_size": parallel.data_parallel_size,
        }

    def chatlearn_complete_start(self) -> dict[str, Any]:
        """Do what vLLM leaves out on CPUs; once, when all workers are up."""
        stages = self.vllm_config.parallel_config.pipeline_parallel_size
        if vllm_compat.needs_dummy_batch(pipeline_parallel_size=stages):
            self.execute_dummy_batch()
        # Nobody looks up the names of their shared memory any more, and nobody else removes them.
        for path in _mapped_files():
            if path.startswith("/dev/shm/") and "cpushm" in path:
                Path(path).unlink(missing_ok=True)
        return {}

    def chatlearn_load(self, address: list[Any], token: str, timeout_s: float) -> dict[str, Any]:
        """Take a whole checkpoint from a rank of the job, through vLLM's own loader.

        Of several workers the first receives, and passes the tensors on.

        Returns:
            `num_tensors`, or `error` in words; the weights have no version then.
        """
        self._chatlearn_version, self._chatlearn_has_weights = None, False
        self._chatlearn_weights_id = None
        count = 0

        def counted() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal count
            for name, tensor in _shared(self, address, token, timeout_s):
                count += 1
                yield name, tensor

        stream = counted()
        try:
            self.reload_weights(weights_iterator=stream)
            _read_to_the_end(stream)
        except Exception as error:  # told to the job; raised here it would only be in the log
            with contextlib.suppress(Exception):
                _read_to_the_end(stream)  # the other workers and the sender wait for this one
            self.reload_weights(weights_iterator=iter(()))  # forgets layers of which a part came
            return {"error": f"{type(error).__name__}: {error}"}
        self._chatlearn_has_weights = True
        return {"num_tensors": count}

    def chatlearn_set_version(self, version: int) -> dict[str, Any]:
        """Note what the weights are called from now on.

        Returns:
            `boot_id` and `weights_id`, which tells them from another job's of the same version; or
            `error` where this worker was started anew since it was given weights.
        """
        if not getattr(self, "_chatlearn_has_weights", False):
            return {"error": "the server was started anew and has no weights of the job"}
        self._chatlearn_version, self._chatlearn_weights_id = version, uuid.uuid4().hex
        return {"boot_id": _BOOT_ID, "weights_id": self._chatlearn_weights_id}


def _mapped_files() -> set[str]:
    """Files in this process's memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {f"/{path}" for _, slash, path in (line.partition("/") for line in lines) if slash}


def _read_to_the_end(stream: Iterator[Any]) -> None:
    for _ in stream:
        pass


def _shared(
    worker: Any, address: list[Any], token: str, timeout_s: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that come to the first worker, on the device of each."""
    device = worker.device
    if worker.vllm_config.parallel_config.world_size == 1:
        for name, tensor in receive_tensors(address, token, timeout_s=timeout_s):
            yield name, tensor.to(device)
        return
    from vllm.distributed import get_world_group

    group = get_world_group()
    if group.rank_in_group:
        while (about := group.broadcast_object(src=0)) is not None:
            if isinstance(about, str):
                raise RuntimeError(about)
            name, shape, dtype = about
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            yield name, group.broadcast(tensor, src=0)
        return
    try:
        for name, tensor in receive_tensors(address, token, timeout_s=timeout_s):
            about = name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            group.broadcast_object(about, src=0)
            yield name, group.broadcast(tensor.to(device), src=0)
    except Exception as error:  # of the connection or the device; the other workers wait
        group.broadcast_object(f"the first worker failed: {error}", src=0)
        raise
    group.broadcast_object(None, src=0)
