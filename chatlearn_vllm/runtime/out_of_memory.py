"""What can a user change when a rank runs out of device memory?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from chatlearn_vllm.config import JobConfig
    from chatlearn_vllm.modules.base import BaseModule

_TOLD = re.compile(
    r"out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|less than desired GPU memory utilization|No available memory for the cache blocks"
    r"|KV cache is needed",  # vLLM's words, of an engine that does not fit
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, tells of too little device memory."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or _TOLD.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def remedies(module: BaseModule, neighbours: Sequence[str]) -> str:
    """Keys of the yaml that make a rank need less memory, or give it more.

    Args:
        module: of the rank that ran out of it.
        neighbours: names of the other models on its device.
    """
    own = [f"models.{module.name}.{change}" for change in module.memory_keys()]
    lines = [*own, *_of_neighbours(module.job, neighbours)]
    return f"out of device memory{_numbers()}. What helps, most first:\n" + "".join(
        f"  {line}\n" for line in lines
    )


def _numbers() -> str:
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return ""
    free, total = torch.cuda.mem_get_info()
    own = torch.cuda.memory_reserved()
    return (
        f" ({_gib(free)} of {_gib(total)} GiB are free now, {_gib(own)} are PyTorch's in this "
        "process)"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}"


def _of_neighbours(job: JobConfig, neighbours: Sequence[str]) -> Iterator[str]:
    for name in neighbours:
        model = job.models[name]
        if not model.offload_weights:
            yield (
                f"models.{name}.free_memory: True  (it is on the same device, and stays there "
                "while others work)"
            )
        elif model.trainable and not model.offload_optimizer_states:
            yield f"models.{name}.offload_optimizer_states: True  (it is on the same device)"
