"""Do adapters arrive merged, and are they proved, whatever types the two sides have?"""

import itertools
from collections.abc import Callable

import pytest
import torch

from chatlearn_vllm.layouts import (
    LowRank,
    MegatronShards,
    RolloutParallel,
    TrainParallel,
    VLLMShards,
)
from chatlearn_vllm.weight_sync.links import colocated
from chatlearn_vllm.weight_sync.lora import adapter_names, merge_into, merged
from chatlearn_vllm.weight_sync.receiver import Arrival, WeightReceiver
from chatlearn_vllm.weight_sync.sender import WeightSender
from tests.helpers.reference_shards import tiny_shape

MODEL = tiny_shape()
LOW_RANK = LowRank(2, 0.5, frozenset({"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}))
TRAIN = TrainParallel(4, tensor=2, pipeline=2)
DTYPES = (torch.float32, torch.bfloat16)

Tensors = dict[str, torch.Tensor]


def trained(rank: int, dtype: torch.dtype) -> Tensors:
    """A training rank's weights and adapters."""
    generator = torch.Generator().manual_seed(rank)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors: Tensors = {}
    for layout in MegatronShards(MODEL, TRAIN).rank_layouts(rank):
        tensors[layout.name] = numbers(*layout.shape)
        if LOW_RANK.adapts(layout.name):
            rows, columns = layout.shape
            matrices = numbers(LOW_RANK.r, columns), numbers(rows, LOW_RANK.r)
            tensors |= zip(adapter_names(layout.name), matrices, strict=True)
    return tensors


def merged_by_hand(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The weights that count, of values that travelled in the rollout's type."""
    arrived = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    result = {}
    for name, weight in arrived.items():
        if LOW_RANK.adapts(name):
            A, B = (arrived[one] for one in adapter_names(name))
            weight = merged(weight, A, B, LOW_RANK.scale)
        result[name] = weight
    return result


def sync(
    held: dict[int, Tensors],
    low_rank: LowRank | None,
    dtype: torch.dtype,
    rank: int,
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[Arrival, Tensors]:
    """Sync into a rollout rank of another layout; whether all is right, and what it has.

    Args:
        held: by training rank.
        low_rank: the adapters among it.
        dtype: of the rollout.
        rank: of the rollout.
        meanwhile: called between the digests of training ranks and the copy.
    """
    sources = MegatronShards(MODEL, TRAIN, low_rank=low_rank)
    targets = VLLMShards(MODEL, RolloutParallel(tensor=4))
    links = colocated(4, 4, 4)
    layouts = targets.rank_layouts(rank)
    live = {layout.name: torch.full(layout.shape, torch.nan, dtype=dtype) for layout in layouts}
    dtypes = {name: tensor.dtype for name, tensor in live.items()}
    exports, sent = {}, {}
    for source, tensors in held.items():
        sender = WeightSender(source, lambda tensors=tensors: tensors, lambda: 0)
        if rank in sender.plan(sources, targets, links, dtypes):
            exports[source], sent[source] = sender.export(), sender.sent()
    receiver = WeightReceiver(rank)
    receiver.plan(sources, targets, links)
    receiver.open(exports)
    meanwhile()
    receiver.pull(live)
    return receiver.compare(sent), live


@pytest.mark.parametrize("ours, theirs", [*itertools.product(DTYPES, DTYPES)], ids=str)
def test_adapters_are_merged_where_they_arrive_and_compared_before(ours, theirs) -> None:
    held = {source: trained(source, ours) for source in range(4)}
    by_hand = {source: merged_by_hand(tensors, theirs) for source, tensors in held.items()}
    for rank in range(4):
        arrival, live = sync(held, LOW_RANK, theirs, rank)
        assert arrival.is_good, arrival.wrong
        _, expected = sync(by_hand, None, theirs, rank)
        torch.testing.assert_close(live, expected)
        untouched = [name for name in live if "norm" in name or "embed" in name]
        assert untouched and all(torch.equal(live[name], expected[name]) for name in untouched)


def test_an_adapter_that_changes_under_a_sync_is_named() -> None:
    held = {source: trained(source, torch.float32) for source in range(4)}
    name, _ = adapter_names("decoder.layers.3.self_attention.linear_proj.weight")

    def change() -> None:
        held[2][name][1, 3] += 1  # rank 2 begins the second stage

    arrival, _ = sync(held, LOW_RANK, torch.float32, 0, change)
    assert arrival.num_wrong == 1
    assert f"{name}[0:2, 0:8] of training rank 2" in arrival.wrong[0]


@pytest.mark.parametrize("max_bytes", [1, 4 * 6, 4 * 6 * 3, 4 * 6 * 7, 10**6])
def test_a_merge_changes_each_row_once_whatever_its_temporary_holds(max_bytes) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, B, A = (torch.randn(shape, generator=generator) for shape in ((7, 6), (7, 2), (2, 6)))
    wide = torch.zeros(9, 10)
    target = wide[1:8, 3:9]
    target.copy_(weight)
    merge_into(target, B, A, 0.5, max_bytes=max_bytes)
    torch.testing.assert_close(target, weight + 0.5 * B @ A)
    torch.testing.assert_close(merged(weight, A, B, 0.5), weight + 0.5 * B @ A)
    wide[1:8, 3:9] = 0
    assert not wide.any()


def test_a_merge_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, B, A = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((40, 30), (40, 8), (8, 30))
    )
    exact = weight.double() + 0.3 * B.double() @ A.double()
    before = weight.clone()
    result = merged(weight, A, B, 0.3)
    assert torch.equal(weight, before) and result.dtype == torch.bfloat16
    half_ulp = 1.001 * 2**-8
    torch.testing.assert_close(result.double(), exact, rtol=half_ulp, atol=1e-6)
