"""How is a rank's device memory given to another process and taken back, contents included?"""

from collections.abc import Callable, Iterable, Iterator

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.optimizer.optimizer import MegatronOptimizer


class StorageOffloader:
    """Moves the storages of some tensors out of device memory and back, in place.

    The storage is resized to nothing and later to its old size, so every view of it (param.data,
    main_grad, bucket views, optimizer shards) stays a valid object and nothing is rebound. Only
    addresses change: CUDA IPC handles and registered buffers must be made anew. Touching a view
    in between is undefined. The pinned host copies stay allocated from the first `offload` on:
    pinning costs more than copying.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]], *, keeps_content: bool):
        """Args:
        tensors: lists the tensors; called at each `offload`, since an optimizer makes its
            state late. Storages that cannot be resized stay: CPU memory that was once shown
            as a NumPy array, as the weight sync does.
        keeps_content: False drops the content; it is zero after `onload`.
        """
        self._tensors = tensors
        self._keeps_content = keeps_content
        self._away: list[tuple[torch.UntypedStorage, int]] | None = None
        self._hosts: list[torch.Tensor] = []
        self.num_moves = 0
        """How often the storages came back, each time to another place."""

    @property
    def is_offloaded(self) -> bool:
        """Whether the storages are away."""
        return self._away is not None

    def offload(self) -> int:
        """Give the memory back; returns its bytes. Does nothing the second time."""
        if self._away is not None:
            return 0
        storages = distinct_storages(self._tensors())
        if self._keeps_content:
            self._provide_hosts([storage.nbytes() for storage in storages])
            for storage, host in zip(storages, self._hosts, strict=True):
                host.copy_(_view(storage), non_blocking=True)
        _synchronize()
        self._away = [(storage, storage.nbytes()) for storage in storages]
        for storage in storages:
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return sum(num_bytes for _, num_bytes in self._away)

    def onload(self) -> int:
        """Take the memory back; returns its bytes. Does nothing where nothing is away."""
        if self._away is None:
            return 0
        for number, (storage, num_bytes) in enumerate(self._away):
            storage.resize_(num_bytes)
            if self._keeps_content:
                _view(storage).copy_(self._hosts[number], non_blocking=True)
            else:
                _view(storage).zero_()
        _synchronize()
        total = sum(num_bytes for _, num_bytes in self._away)
        self._away = None
        self.num_moves += 1
        return total

    def _provide_hosts(self, sizes: list[int]) -> None:
        del self._hosts[len(sizes) :]
        for number, size in enumerate(sizes):
            if number == len(self._hosts):
                self._hosts.append(_pinned(size))
            elif self._hosts[number].numel() != size:
                self._hosts[number] = _pinned(size)


def distinct_storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """The storages under some tensors, each once, in order, that are not empty and resizable."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.resizable():
            found.setdefault(storage.data_ptr(), storage)
    return list(found.values())


def weight_tensors(
    chunks: Iterable[torch.nn.Module], data_parallel: Iterable[DistributedDataParallel]
) -> Iterator[torch.Tensor]:
    """The parameters: flat buffers with the distributed optimizer, else single tensors."""
    for chunk in data_parallel:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            if buffer.param_data is not None:
                yield buffer.param_data
    for module in chunks:
        for parameter in module.parameters():
            yield parameter.data


def grad_tensors(data_parallel: Iterable[DistributedDataParallel]) -> Iterator[torch.Tensor]:
    """The flat gradient buffers."""
    for chunk in data_parallel:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield buffer.grad_data


def optimizer_tensors(
    optimizer: MegatronOptimizer, weights: Iterable[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Main parameters and Adam moments, less what lies in the storage of a weight.

    With float32 parameters the main parameters are views of the weights; these stay with them.
    """
    of_weights = {tensor.untyped_storage().data_ptr() for tensor in weights}
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state.get(parameter, {})
                moments = [
                    value
                    for value in state.values()
                    if torch.is_tensor(value) and value.dim()  # `step` is a number
                ]
                for tensor in [parameter.data, *moments]:
                    if tensor.untyped_storage().data_ptr() not in of_weights:
                        yield tensor


def clear_rotary_cache() -> None:
    """Forget the rotary embeddings that megatron-core keeps in device memory by sequence length."""
    RotaryEmbedding.forward.cache_clear()


def _view(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _pinned(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
