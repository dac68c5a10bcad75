"""How are one process's tensors read by another on the same host, and the planned copies done?

On CUDA the sender hands out CUDA IPC handles, one per storage, and the receiver reads the sender's
memory in place. On CPU the handed-out object is a set of NumPy arrays: whoever carries it between
the processes (Ray's shared-memory object store does) decides how they travel.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from chatlearn_vllm.layouts.blocks import Rect
from chatlearn_vllm.weight_sync.planner import RankPlan

STAGING_BYTES = 64 * 2**20
"""Bound of the staging copy for pieces that come from another GPU."""


@dataclass(frozen=True)
class ExportedTensor:
    """Where a tensor lies in an exported storage."""

    storage: int
    """Index into `Export.storages`."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """First element, counted in elements of `dtype` from the start of the storage."""


@dataclass(frozen=True)
class Export:
    """A picklable description of tensors that another process on this host can open."""

    tensors: dict[str, ExportedTensor]
    storages: list[Any]
    """CPU: uint8 arrays. CUDA: what `torch.multiprocessing` needs to open an IPC handle."""


def export_tensors(tensors: Mapping[str, torch.Tensor]) -> Export:
    """Describe tensors for another process; they must stay where they are until it has read them.

    Storages that several tensors share are handed out once. Returns when the device has finished
    writing them.
    """
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    exported: dict[str, ExportedTensor] = {}
    storages: list[Any] = []
    index: dict[int, int] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in index:
            index[key] = len(storages)
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            storages.append(_cuda_handle(flat) if flat.is_cuda else flat.numpy())
        exported[name] = ExportedTensor(
            index[key],
            tensor.dtype,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            tensor.storage_offset(),
        )
    return Export(exported, storages)


def open_export(export: Export) -> dict[str, torch.Tensor]:
    """The exported tensors as views of the sender's memory; read only, drop them when done.

    A CUDA export is for other processes: CUDA does not open a handle where it was made.
    """
    opened = []
    for storage in export.storages:
        if isinstance(storage, np.ndarray):
            with warnings.catch_warnings():
                # Arrays from an object store are read-only, which torch tensors cannot express.
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                flat = torch.from_numpy(storage)
        else:
            rebuild, arguments = storage
            flat = rebuild(*arguments)
        opened.append(flat)
    return {
        name: opened[t.storage].view(t.dtype).as_strided(t.shape, t.stride, t.offset)
        for name, t in export.tensors.items()
    }


def _cuda_handle(flat: torch.Tensor) -> tuple[Any, tuple]:
    from torch.multiprocessing.reductions import reduce_tensor

    return reduce_tensor(flat)


@torch.no_grad()
def run_plan(
    plan: RankPlan,
    sources: Mapping[int, Mapping[str, torch.Tensor]],
    targets: Mapping[str, torch.Tensor],
) -> int:
    """Do a plan's copies into live parameters.

    Args:
        plan: this rank's plan.
        sources: opened tensors of the training ranks of `plan.source_ranks`, by rank.
        targets: this rank's parameters, written in place.

    Returns:
        Bytes written, on return complete on the device.
    """
    num_bytes = 0
    for copy in plan.copies:
        source = sources[copy.source_rank][copy.source_param][_slices(copy.source)]
        target = targets[copy.target_param][_slices(copy.target)]
        if source.is_cuda and source.device != target.device:
            _copy_from_peer(source, target)
        else:
            target.copy_(source)
        num_bytes += target.numel() * target.element_size()
    for name, rect in plan.padding:
        targets[name][_slices(rect)].zero_()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return num_bytes


def _copy_from_peer(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy between GPUs through ordinary memory of the target's GPU.

    vLLM's sleep mode keeps weights in driver-mapped memory that a copy straight from a peer's IPC
    memory cannot write ("invalid argument").
    """
    rows = max(1, STAGING_BYTES // max(1, source[0].numel() * source.element_size()))
    for start in range(0, source.shape[0], rows):
        piece = slice(start, start + rows)
        target[piece].copy_(source[piece].to(target.device))


def _slices(rect: Rect) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in rect)
