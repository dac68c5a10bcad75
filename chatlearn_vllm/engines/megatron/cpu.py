"""How does megatron-core, which is written for CUDA, run on a machine without a GPU?

One of the project's two documented exceptions to "no patched upstream function" (the other is in
`engines/vllm_compat.py`). Every replacement lasts exactly as long as a `with cuda_means_cpu()`
block and none is ever made where CUDA is available. All of them only answer "CPU" where
megatron-core asks for a CUDA device: `device=torch.cuda.current_device()`, a literal
`device="cuda"`, `.cuda()`, a check for `torch.cuda.FloatTensor`, the CUDA random generator.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


@contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """Within the block, CUDA in a torch call means CPU; nothing happens where CUDA is available.

    Enter it in every call that reaches megatron-core, not once at start: torch function modes
    belong to a thread, and a Ray actor may run each call in another one. May be nested, and used
    as a decorator.
    """
    if torch.cuda.is_available():
        yield
        return
    depth = getattr(_in_thread, "depth", 0)
    _in_thread.depth = depth + 1
    try:
        with _replaced_functions(), nullcontext() if depth else _CudaMeansCpu():
            yield
    finally:
        _in_thread.depth = depth


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites what a torch call says about its device."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # megatron-core's optimizers refuse tensors whose type has no "cuda" in its name.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **kwargs)


# The one CPU generator stands in for the CUDA generator, so that megatron-core's tracker of
# model parallel and data parallel random states works on it.
_REPLACEMENTS: tuple[tuple[Any, str, Callable], ...] = (
    (torch.cuda, "current_device", lambda: _CPU),
    (torch.cuda, "synchronize", lambda *args, **kwargs: None),
    (torch.cuda, "current_stream", lambda *args, **kwargs: None),
    (torch.cuda, "manual_seed", torch.manual_seed),
    (torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
    (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
    (
        megatron_random,
        "_set_cuda_rng_state",
        lambda state, *args, **kwargs: torch.set_rng_state(state),
    ),
)

_in_thread = threading.local()
_lock = threading.Lock()
_originals: list[Callable] = []
_num_users = 0


@contextmanager
def _replaced_functions() -> Iterator[None]:
    """Put the replacements in place for as long as any thread is inside."""
    global _num_users
    with _lock:
        if _num_users == 0:
            for owner, name, replacement in _REPLACEMENTS:
                _originals.append(getattr(owner, name))
                setattr(owner, name, replacement)
        _num_users += 1
    try:
        yield
    finally:
        with _lock:
            _num_users -= 1
            if _num_users == 0:
                for (owner, name, _), original in zip(_REPLACEMENTS, _originals, strict=True):
                    setattr(owner, name, original)
                _originals.clear()
