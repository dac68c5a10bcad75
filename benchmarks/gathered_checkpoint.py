"""What is the sync compared with? Whole tensors, gathered bucket by bucket on every training rank.

So do frameworks that hand weights to colocated engines through vLLM's `load_weights`: the shards of
a bucket are broadcast over the pipeline, gathered over tensor and expert parallel ranks, and put
together as Hugging Face tensors in one flat buffer, which the engine on the same GPU opens. Here
with few large collectives, one buffer that is allocated and opened once, and no copy beyond these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from chatlearn_vllm.layouts import Block, MegatronShards, ParamLayout


class TensorInBucket(NamedTuple):
    """Where a Hugging Face tensor lies in a bucket."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """In elements."""


class _Move(NamedTuple):
    """A copy of `sizes` elements from a rank's parameter into the bucket; all in elements."""

    member: int
    param: int
    sizes: tuple[int, ...]
    read_offset: int
    read_strides: tuple[int, ...]
    write_offset: int
    write_strides: tuple[int, ...]


@dataclass
class _Bucket:
    stage: int
    is_expert: bool
    params: list[ParamLayout] = field(default_factory=list)
    """As the first rank of the group knows them; shapes are the same on all."""
    tensors: list[TensorInBucket] = field(default_factory=list)
    moves: list[_Move] = field(default_factory=list)
    num_elements: int = 0


class GatheredCheckpoint:
    """This training rank's part in gathering the model; every method is collective."""

    def __init__(
        self,
        shards: MegatronShards,
        parameters: Mapping[str, torch.Tensor],
        bucket_bytes: int,
    ) -> None:
        """Plan the buckets and allocate the buffer.

        Args:
            shards: the training ranks.
            parameters: this rank's, by name.
            bucket_bytes: a bucket is closed before it exceeds this; a larger parameter has one of
                its own, and 0 gives each its own.
        """
        self._shards, self._parameters = shards, parameters
        self._stage, self._within = divmod(dist.get_rank(), shards.parallel.ranks_per_stage)
        some = next(iter(parameters.values()))
        self._dtype, self._device = some.dtype, some.device
        self._buckets = list(self._plan(bucket_bytes // self._dtype.itemsize))
        size = max(bucket.num_elements for bucket in self._buckets)
        self.buffer = torch.empty(size, dtype=self._dtype, device=self._device)
        """Holds the bucket that was gathered last."""

    def __len__(self) -> int:
        """Number of buckets."""
        return len(self._buckets)

    @torch.no_grad()
    def gather(self, number: int) -> list[TensorInBucket]:
        """Fill the buffer with a bucket."""
        bucket = self._buckets[number]
        sources = self._sources(bucket)
        for move in bucket.moves:
            flat, start = sources[move.member][move.param]
            offset = flat.storage_offset() + start + move.read_offset
            read = flat.as_strided(move.sizes, move.read_strides, offset)
            write = self.buffer.as_strided(move.sizes, move.write_strides, move.write_offset)
            write.copy_(read)
        return bucket.tensors

    def _sources(self, bucket: _Bucket) -> list[list[tuple[torch.Tensor, int]]]:
        """By member of the group and parameter: a flat tensor and where the parameter begins."""
        num_members = len(self._members(bucket.stage, bucket.is_expert))
        is_own = bucket.stage == self._stage
        if num_members == 1 and self._shards.parallel.pipeline == 1:
            return [[(self._parameters[param.name].view(-1), 0) for param in bucket.params]]
        sizes = [math.prod(param.shape) for param in bucket.params]
        local = torch.empty(sum(sizes), dtype=self._dtype, device=self._device)
        if is_own:
            own = [self._parameters[param.name].view(-1) for param in bucket.params]
            torch.cat(own, out=local)
        if self._shards.parallel.pipeline > 1:
            source = bucket.stage * self._shards.parallel.ranks_per_stage + self._within
            group = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(local, src=source, group=group)
        gathered = local
        if num_members > 1:
            gathered = local.new_empty(num_members * len(local))
            dist.all_gather_into_tensor(gathered, local, group=_group(bucket.is_expert))
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        return [
            [(gathered, member * len(local) + start) for start in starts]
            for member in range(num_members)
        ]

    # ---- planning -----------------------------------------------------------------------------

    def _plan(self, limit: int) -> Iterator[_Bucket]:
        seen: set[str] = set()
        for stage in range(self._shards.parallel.pipeline):
            for is_expert in (False, True):
                members = self._members(stage, is_expert)
                by_member = [self._params(rank, is_expert) for rank in members]
                bucket = _Bucket(stage, is_expert)
                for layouts in zip(*by_member, strict=True):
                    names = {block.tensor for layout in layouts for block in layout.blocks}
                    if names & seen:  # the second copy of tied embeddings
                        continue
                    seen |= names
                    shapes = [self._shards.model.tensor_shape(name) for name in names]
                    size = sum(map(math.prod, shapes))
                    if bucket.params and bucket.num_elements + size > limit:
                        yield bucket
                        bucket = _Bucket(stage, is_expert)
                    self._add(bucket, layouts)
                if bucket.params:
                    yield bucket

    def _members(self, stage: int, is_expert: bool) -> list[int]:
        """Ranks that hold the shards of this rank's copy of a stage, in the group's order."""
        parallel = self._shards.parallel
        size = parallel.etp * parallel.expert if is_expert else parallel.tensor
        first = stage * parallel.ranks_per_stage + self._within // size * size
        return list(range(first, first + size))

    def _params(self, rank: int, is_expert: bool) -> list[ParamLayout]:
        return [
            layout
            for layout in self._shards.rank_layouts(rank)
            if (".experts." in layout.name) == is_expert
        ]

    def _add(self, bucket: _Bucket, layouts: Sequence[ParamLayout]) -> None:
        """Append one parameter of all members."""
        number = len(bucket.params)
        bucket.params.append(layouts[0])
        offsets: dict[str, int] = {}
        taken: set[Block] = set()
        for member, layout in enumerate(layouts):
            by_tensor: dict[str, list[Block]] = {}
            for block in layout.blocks:
                key = block._replace(local=())
                if key not in taken:  # else another member has it as well
                    taken.add(key)
                    by_tensor.setdefault(block.tensor, []).append(block)
            for tensor, blocks in by_tensor.items():
                shape = self._shards.model.tensor_shape(tensor)
                if tensor not in offsets:
                    offsets[tensor] = bucket.num_elements
                    bucket.tensors.append(TensorInBucket(tensor, shape, bucket.num_elements))
                    bucket.num_elements += math.prod(shape)
                bucket.moves += _moves(member, number, blocks, layout.shape, shape, offsets[tensor])


def _group(is_expert: bool) -> dist.ProcessGroup:
    if is_expert:
        return parallel_state.get_expert_tensor_and_model_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def _moves(
    member: int,
    param: int,
    blocks: Sequence[Block],
    local_shape: tuple[int, ...],
    shape: tuple[int, ...],
    offset: int,
) -> list[_Move]:
    """Copies of one tensor's blocks; evenly spaced ones (heads of a query group) are one copy."""
    reads = [_corner(block.local, local_shape) for block in blocks]
    writes = [_corner(block.logical, shape) for block in blocks]
    sizes = {tuple(stop - start for start, stop in block.local) for block in blocks}
    steps = {
        (reads[i + 1] - reads[i], writes[i + 1] - writes[i]) for i in range(len(blocks) - 1)
    } or {(0, 0)}
    if len(sizes) > 1 or len(steps) > 1:
        return [
            move
            for block in blocks
            for move in _moves(member, param, [block], local_shape, shape, offset)
        ]
    (size,), ((read_step, write_step),) = sizes, steps
    return [
        _Move(
            member,
            param,
            (len(blocks), *size),
            reads[0],
            (read_step, *_strides(local_shape)),
            offset + writes[0],
            (write_step, *_strides(shape)),
        )
    ]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) if len(shape) == 1 else (shape[1], 1)


def _corner(rect: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> int:
    """Offset of a rectangle's first element in a contiguous tensor."""
    strides = _strides(shape)
    return sum(start * stride for (start, _), stride in zip(rect, strides, strict=True))
