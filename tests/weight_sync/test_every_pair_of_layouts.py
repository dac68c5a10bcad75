"""Does every element arrive once, for every trainer and every rollout of a grid of parallel sizes?

All combinations of TP, PP, VPP, EP and ETP on one side with all of TP, PP and EP on the other, for
a tiny model of each family. What the plans move is compared with parameters that
`reference_shards` assembles without the layouts. Copies of a model, hosts and ties: test_planner.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from chatlearn_vllm.layouts import (
    MegatronShards,
    ModelShape,
    ParamLayout,
    RolloutParallel,
    TrainParallel,
    VLLMShards,
)
from chatlearn_vllm.layouts.blocks import Rect
from chatlearn_vllm.weight_sync.links import colocated
from chatlearn_vllm.weight_sync.planner import Copy, plan_reader, plan_sender
from tests.helpers.reference_shards import (
    FAMILIES,
    Tensors,
    logical_tensors,
    megatron_tensors,
    tiny_shape,
    vllm_tensors,
)

STAGES = [(1, 1), (2, 1), (2, 2), (4, 1)]
"""Pipeline and virtual pipeline sizes."""

Arrays = dict[str, np.ndarray]


class Side(NamedTuple):
    """All ranks of one side."""

    shards: MegatronShards | VLLMShards
    layouts: list[list[ParamLayout]]
    reference: list[Arrays]
    """By rank, from `reference_shards`; no number occurs twice, and none is zero."""


def dense_trainers() -> Iterator[TrainParallel]:
    for tp, (pp, vpp) in itertools.product((1, 2, 4), STAGES):
        yield TrainParallel(tp * pp, tensor=tp, pipeline=pp, virtual_pipeline=vpp)


def expert_trainers() -> Iterator[TrainParallel]:
    for tp, (pp, vpp), ep in itertools.product((1, 2), STAGES[:3], (1, 2, 3)):
        for etp in {1, tp}:
            yield TrainParallel(
                math.lcm(tp, ep * etp) * pp, tensor=tp, pipeline=pp, virtual_pipeline=vpp,
                expert=ep, expert_tensor=etp,
            )  # fmt: skip


def dense_rollouts() -> Iterator[RolloutParallel]:
    for tp, pp in itertools.product((1, 2, 4), (1, 2, 3)):
        yield RolloutParallel(tp, pp)


def expert_rollouts() -> Iterator[RolloutParallel]:
    for tp, pp, ep in itertools.product((1, 2, 4), (1, 2), (False, True)):
        yield RolloutParallel(tp, pp, ep)


def arrays(tensors: Tensors) -> Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def trainer_side(model: ModelShape, logical: Tensors, sizes: TrainParallel) -> Side:
    shards, ranks = MegatronShards(model, sizes), range(sizes.world_size)
    reference = [arrays(megatron_tensors(model, logical, sizes, rank)) for rank in ranks]
    return Side(shards, [], reference)


def rollout_side(model: ModelShape, logical: Tensors, sizes: RolloutParallel) -> Side:
    shards, ranks = VLLMShards(model, sizes), range(sizes.world_size)
    reference = [arrays(vllm_tensors(model, logical, sizes, rank)) for rank in ranks]
    return Side(shards, [shards.rank_layouts(rank) for rank in ranks], reference)


def slices(rect: Rect) -> tuple[slice, ...]:
    return tuple([slice(start, stop) for start, stop in rect])


def check_arrival(copies: tuple[Copy, ...], sources: list[Arrays], want: Arrays) -> None:
    """Each element has its value, and as many were written as there are: each of them once."""
    live = {name: np.zeros_like(value) for name, value in want.items()}
    num_written = 0
    for copy in copies:
        target = live[copy.target_param][slices(copy.target)]
        source = sources[copy.source_rank][copy.source_param][slices(copy.source)]
        target[...] = source.reshape(target.shape)
        num_written += target.size
    for name, value in want.items():
        assert np.array_equal(live[name], value), name
    assert num_written == sum(np.count_nonzero(value) for value in want.values())


def check_pair(train: Side, rollout: Side) -> None:
    num_senders, num_readers = len(train.reference), len(rollout.reference)
    links = colocated(num_senders, num_readers, num_readers)
    read: set[tuple[int, Copy]] = set()
    for rank, (layouts, want) in enumerate(zip(*rollout[1:], strict=True)):
        copies = plan_reader(rank, layouts, train.shards, links).copies
        check_arrival(copies, train.reference, want)
        read.update((rank, copy) for copy in copies)
    sent = [
        (reader, copy)
        for rank in range(num_senders)
        for reader, own in plan_sender(rank, train.shards, rollout.shards, links).items()
        for copy in own
    ]
    assert len(sent) == len(read)
    assert set(sent) == read


@pytest.mark.parametrize("family", FAMILIES)
def test_every_element_arrives_once_from_every_trainer_in_every_rollout(family) -> None:
    model = tiny_shape(family)
    logical = logical_tensors(model)
    trainers, rollouts = dense_trainers(), dense_rollouts()
    if model.num_experts:
        trainers, rollouts = expert_trainers(), expert_rollouts()
    readers = [rollout_side(model, logical, sizes) for sizes in rollouts]
    num_pairs = 0
    for train in (trainer_side(model, logical, sizes) for sizes in trainers):
        for rollout in readers:
            try:
                check_pair(train, rollout)
            except Exception as error:
                error.add_note(f"{train.shards.parallel} -> {rollout.shards.parallel}")
                raise
            num_pairs += 1
    assert num_pairs == (324 if model.num_experts else 108)
