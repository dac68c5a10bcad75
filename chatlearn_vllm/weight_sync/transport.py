"""How are one process's tensors read by another on the same host, and the planned copies done?

On CUDA the sender hands out one IPC handle per allocation, and the reader's kernel reads the
sender's memory in place, on the same GPU or on another. On CPU the handed-out object is a set of
NumPy arrays: whoever carries it between the processes (Ray's shared-memory object store does)
decides how they travel.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chatlearn_vllm.weight_sync import cuda_ipc, kernels
from chatlearn_vllm.weight_sync.pieces import (
    SpanTable,
    TensorForm,
    addresses_of,
    form_of,
    view_of,
)
from chatlearn_vllm.weight_sync.planner import Copy

STAGING_BYTES = 64 * 2**20
"""Bound of the buffer for pieces that change their dtype between two GPUs' memories."""


@dataclass(frozen=True)
class Export:
    """A picklable description of tensors that another process on this host can open.

    A model may have ten thousand of them, so it is made of columns and not of objects.
    """

    generation: int
    """Rises whenever the memory has moved; an opened export of the same generation stays valid."""
    names: list[str]
    """Of the tensors."""
    places: np.ndarray
    """int64 [3, tensors]: index into `memories`, bytes from its start to the first element, and
    index into `forms`."""
    forms: list[TensorForm]
    """Those that occur."""
    memories: list[cuda_ipc.MemoryHandle | np.ndarray]
    """CPU: uint8 arrays."""


def export_tensors(tensors: Mapping[str, torch.Tensor], generation: int = 0) -> Export:
    """Describe tensors for other processes; they must stay where they are until these are done.

    Allocations that several tensors share are handed out once. Returns when the device has
    finished writing them.
    """
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    allocations = cuda_ipc.Allocations()
    arrays: list[np.ndarray] = []
    index: dict[int, int] = {}
    forms: dict[TensorForm, int] = {}
    places = np.empty((3, len(tensors)), dtype=np.int64)
    for number, tensor in enumerate(tensors.values()):
        if tensor.is_cuda:
            memory, offset = allocations.find(tensor.data_ptr())
        else:
            storage = tensor.detach().untyped_storage()
            offset = tensor.storage_offset() * tensor.element_size()
            memory = index.setdefault(storage.data_ptr(), len(arrays))
            if memory == len(arrays):
                arrays.append(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
        places[:, number] = memory, offset, forms.setdefault(form_of(tensor), len(forms))
    return Export(generation, list(tensors), places, list(forms), arrays or allocations.handles)


class OpenedExport:
    """Another process's tensors, readable here until `close`."""

    def __init__(self, export: Export) -> None:
        self.generation = export.generation
        memories, offsets, forms = export.places.tolist()
        self.forms = {
            name: export.forms[form] for name, form in zip(export.names, forms, strict=True)
        }
        self._mappings: list[cuda_ipc.Mapping] = []
        self.tensors: dict[str, torch.Tensor] = {}
        """On CPU: the tensors, read only. Empty on CUDA, where a kernel reads addresses."""
        self.addresses: dict[str, int] = {}
        """On CUDA: addresses of the tensors' first elements, in this process."""
        flats: list[torch.Tensor] = []
        try:
            for memory in export.memories:
                if isinstance(memory, np.ndarray):
                    flats.append(_from_read_only(memory))
                else:
                    self._mappings.append(cuda_ipc.Mapping(memory))
        except RuntimeError:  # one cannot be opened: those before it must not stay mapped
            self.close()
            raise
        for name, memory, offset in zip(export.names, memories, offsets, strict=True):
            if flats:
                dtype, shape, stride = self.forms[name]
                flat = flats[memory].view(dtype)
                self.tensors[name] = flat.as_strided(shape, stride, offset // dtype.itemsize)
            else:
                self.addresses[name] = self._mappings[memory].address + offset

    def close(self) -> None:
        """Let the memory go; nothing may read it any more."""
        self.tensors = {}
        if self._mappings:
            torch.cuda.synchronize()  # after an error a launch may still be reading
        for mapping in self._mappings:
            mapping.close()
        self._mappings = []


def _from_read_only(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        # Arrays from an object store are read-only, which torch tensors cannot express.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


class Puller:
    """Copies of one engine rank from all training ranks that it can read, repeated every sync.

    On CUDA they are one launch per kind of rectangle. The tiles of all sources take turns in it, so
    the local memory and every link to another GPU are busy from beginning to end.
    """

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._copies = list(copies)
        self._fused: list[Copy] = []
        self._converted: list[Copy] = []
        self._tables: tuple[SpanTable, SpanTable] | None = None
        self._grouped: kernels.GroupedCopy | None = None
        self._addresses: tuple[dict[tuple[int, str], int], dict[str, int]] | None = None

    @torch.no_grad()
    def pull(
        self, sources: Mapping[int, OpenedExport], targets: Mapping[str, torch.Tensor]
    ) -> None:
        """Do the copies; on CUDA launched on the current stream and not waited for.

        Args:
            sources: by training rank.
            targets: by name.

        Raises:
            ValueError: a rectangle does not consist of 32-bit words (CUDA), or a tensor's last
                dimension is not contiguous.
        """
        if not self._copies:
            return
        if any(source.tensors for source in sources.values()):
            for copy in self._copies:
                source = sources[copy.source_rank].tensors[copy.source_param]
                target = view_of(targets[copy.target_param], copy.target, 2)
                target.copy_(view_of(source, copy.source, 2))
            return
        if self._tables is None:
            self._prepare(sources, targets)
        source_addresses = {
            (rank, name): address
            for rank, source in sources.items()
            for name, address in source.addresses.items()
        }
        addresses = source_addresses, addresses_of(targets, self._target_names)
        if addresses != self._addresses:
            from_table, to_table = self._tables
            self._grouped = kernels.GroupedCopy(
                from_table.at(addresses[0]),
                to_table.at(addresses[1]),
                np.array([copy.source_rank for copy in self._fused], dtype=np.int64),
                next(iter(targets.values())).device,
            )
            self._addresses = addresses
        self._grouped.run()
        for copy in self._converted:
            _pull_converted(copy, sources[copy.source_rank], targets)

    def _prepare(
        self, sources: Mapping[int, OpenedExport], targets: Mapping[str, torch.Tensor]
    ) -> None:
        self._target_names = sorted({copy.target_param for copy in self._copies})
        target_forms = {name: form_of(targets[name]) for name in self._target_names}
        source_forms = {
            (rank, name): form
            for rank, source in sources.items()
            for name, form in source.forms.items()
        }
        self._fused, self._converted = [], []
        for copy in self._copies:
            form = source_forms[copy.source_rank, copy.source_param]
            same = form.dtype == target_forms[copy.target_param].dtype
            (self._fused if same else self._converted).append(copy)
        self._tables = (
            SpanTable(
                source_forms,
                [((copy.source_rank, copy.source_param), copy.source) for copy in self._fused],
            ),
            SpanTable(target_forms, [(copy.target_param, copy.target) for copy in self._fused]),
        )


def _pull_converted(copy: Copy, source: OpenedExport, targets: Mapping[str, torch.Tensor]) -> None:
    """Copy a rectangle that changes its dtype, some rows at a time through a bounded buffer."""
    form = source.forms[copy.source_param]
    target = view_of(targets[copy.target_param], copy.target, 2)
    slot, ((first, last), *rest) = copy.source[:-2], copy.source[-2:]
    row_bytes = math.prod(stop - start for start, stop in rest) * form.dtype.itemsize
    step = max(1, STAGING_BYTES // row_bytes)
    for start in range(first, last, step):
        rows = (start, min(start + step, last))
        sizes = [stop - begin for begin, stop in (rows, *rest)]
        staging = torch.empty(sizes, dtype=form.dtype, device=target.device)
        whole = tuple((0, size) for size in sizes)
        kernels.GroupedCopy(
            SpanTable(source.forms, [(copy.source_param, (*slot, rows, *rest))]).at(
                source.addresses
            ),
            SpanTable({"staging": form_of(staging)}, [("staging", whole)]).at(
                {"staging": staging.data_ptr()}
            ),
            np.zeros(1, dtype=np.int64),
            target.device,
        ).run()
        target[rows[0] - first : rows[1] - first].copy_(staging)
