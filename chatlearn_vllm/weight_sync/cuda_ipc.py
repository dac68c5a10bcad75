"""How does one process read another's GPU memory? CUDA IPC through the driver's C interface.

`torch.multiprocessing` does the same for tensors, but opens a handle on the GPU that owns the
memory (which costs the reader a CUDA context there, about half a gigabyte), counts references
across processes, and offers no way to close. Here a reader opens on its own GPU, wherever the
memory lies, and closes when it says so; the sender must keep the memory until then.
"""

import ctypes
from bisect import bisect_right
from functools import cache
from typing import NamedTuple

import torch

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class MemoryHandle(NamedTuple):
    """An allocation that other processes on the host can open; picklable."""

    handle: bytes
    base: int
    """Address of the allocation in the sender's process; keeps two handles apart."""
    num_bytes: int


class Mapping:
    """Another process's allocation, readable from this process's current GPU until `close`."""

    def __init__(self, handle: MemoryHandle) -> None:
        """Map it into the current device's address space.

        Raises:
            RuntimeError: CUDA cannot, for example because the GPUs cannot reach each other, or
                because this process made the handle.
        """
        address = ctypes.c_uint64()
        wanted = _Handle()
        ctypes.memmove(ctypes.byref(wanted), handle.handle, _HANDLE_BYTES)
        torch.cuda.current_stream()  # there is a context from here on
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), wanted, _LAZY_PEER_ACCESS)
        self.address = address.value

    def close(self) -> None:
        """Unmap; work that reads the memory must be done."""
        if self.address:
            _call("cuIpcCloseMemHandle", ctypes.c_uint64(self.address))
            self.address = 0


class Allocations:
    """The allocations that hold some addresses; the driver is asked once for each."""

    def __init__(self) -> None:
        self.handles: list[MemoryHandle] = []
        """In the order in which `find` met them."""
        self._bases: list[int] = []
        self._numbers: list[int] = []

    def find(self, address: int) -> tuple[int, int]:
        """Index into `handles` of the allocation that holds an address, and the offset in it.

        Raises:
            RuntimeError: see `export_memory`.
        """
        place = bisect_right(self._bases, address)
        if place:
            number = self._numbers[place - 1]
            offset = address - self._bases[place - 1]
            if offset < self.handles[number].num_bytes:
                return number, offset
        handle, offset = export_memory(address)
        self._bases.insert(place, handle.base)
        self._numbers.insert(place, len(self.handles))
        self.handles.append(handle)
        return len(self.handles) - 1, offset


def export_memory(address: int) -> tuple[MemoryHandle, int]:
    """Handle of the allocation that holds an address, and the address's offset in it.

    Raises:
        RuntimeError: the memory cannot be shared (made by the driver's virtual memory calls, as
            with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True).
    """
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    _call(
        "cuMemGetAddressRange_v2",
        ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address),
    )  # fmt: skip
    _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    raw = bytes(memoryview(handle).cast("B"))
    return MemoryHandle(raw, base.value, size.value), address - base.value


def gpu_and_peers(device: torch.device) -> tuple[str | None, frozenset[str]]:
    """UUID of a GPU and of those of this host whose memory it can read; (None, {}) on CPU."""
    if device.type != "cuda":
        return None, frozenset()
    index = torch.cuda.current_device() if device.index is None else device.index
    others = [i for i in range(torch.cuda.device_count()) if i != index]
    peers = [i for i in others if torch.cuda.can_device_access_peer(index, i)]
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in (index, *peers)]
    return uuids[0], frozenset(uuids[1:])


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(function: str, *arguments: object) -> None:
    status = getattr(_driver(), function)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown"
        raise RuntimeError(f"CUDA driver: {function}: {reason} (error {status})")
