"""How are a checkpoint's tensors written while training goes on?

megatron-core plans an asynchronous save and leaves the writing to its caller. Its own callers fork
a process, whose memory stays as it was at that moment; that is not done here: a rank has threads of
gloo, NCCL and Ray, any of which may hold a lock for ever in the child. A thread writes instead, and
needs copies: what megatron-core passes on are the live tensors where these are in host memory.
"""

from __future__ import annotations

import queue
import threading
import traceback

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync,
    WriteBucket,
)


class BackgroundWriter:
    """Writes this rank's part of one checkpoint.

    Example:
        writer = BackgroundWriter(dist_checkpointing.save(..., async_sharded_save=True))
        train()
        writer.finish()  # on all ranks
    """

    def __init__(self, request: AsyncRequest) -> None:
        """Copy this rank's tensors to host memory and start to write them. Not collective."""
        self._request = request
        self._error: str | None = None
        self._buckets: list[WriteBucket] = []
        if request.async_fn is not None:  # None: this rank has nothing to write
            _, buckets, self._results = request.async_fn_args
            self._transforms = request.async_fn.args[0]
            self._buckets = [_copied(bucket) for bucket in buckets]
        self._thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether this rank's files are written, or have failed. Not collective."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the files of all ranks and write their index. Collective.

        Raises:
            RuntimeError: on all ranks: some could not write; names each and its error.
        """
        self._thread.join()
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, self._error)
        failed = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error]
        if failed:
            raise RuntimeError("a checkpoint could not be written: " + "\n".join(failed))
        for finalize in self._request.finalize_fns:
            finalize()

    def _write(self) -> None:
        try:
            results = dict(map(self._write_file, range(len(self._buckets))))
        except BaseException:  # raised by `finish`, on all ranks
            self._error = traceback.format_exc()
            return
        if self._buckets:
            self._results.put(results)
            self._buckets = []  # the copies

    def _write_file(self, number: int) -> tuple[int, list]:
        """Write one file with megatron-core's function, which reports through queues."""
        results: queue.Queue = queue.Queue()
        running: queue.Queue = queue.Queue()
        running.put(number)
        FileSystemWriterAsync.write_preloaded_data(
            self._transforms, number, self._buckets[number], results, running, use_fsync=True
        )
        _, result = results.get_nowait()
        if isinstance(result, Exception):
            raise result
        return number, result


def _copied(bucket: WriteBucket) -> WriteBucket:
    """The bucket with tensors of its own, in host memory; the rest of it is serialized already."""
    path, name, (byte_items, tensor_items) = bucket
    copies = [(item, tensor.detach().to("cpu", copy=True)) for item, tensor in tensor_items]
    tensor_items.clear()  # megatron-core keeps the list: it must not keep the tensors
    return path, name, (byte_items, copies)
