"""Does a plan move exactly the right weights, for any pair of layouts? Run on plain tensors."""

import gc
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from chatlearn_vllm.layouts import (
    CheckpointShards,
    ListedShards,
    MegatronShards,
    ParamLayout,
    RolloutParallel,
    ShardedModel,
    TrainParallel,
    VLLMShards,
)
from chatlearn_vllm.weight_sync.links import LinkKind, Links, Place, colocated
from chatlearn_vllm.weight_sync.planner import (
    Copy,
    IncompletePlanError,
    RankPlan,
    check_agreement,
    fingerprint,
    plan_reader,
    plan_sender,
    subtract,
)
from tests.helpers.reference_shards import (
    logical_tensors,
    megatron_tensors,
    tiny_shape,
    vllm_tensors,
)

LAYERS = 4
AXES = {
    "tied": [False, True],
    "tp": [1, 2, 4],
    "pp": [1, 2, 4],
    "vpp": [1, 2],
    "first": [None, 1],
    "dp": [1, 2],
    "rollout_tp": [1, 2, 4],
    "rollout_pp": [1, 2, 3],
    "replicas": [1, 3],
    "hosts": [1, 2],
}
DENSE_AXES = {"family": ["llama", "qwen2", "qwen3"]} | AXES
EXPERT_AXES = {
    "family": ["mixtral", "qwen3_moe"], **AXES, "ep": [1, 2, 3], "etp": [1, 2, 4],
    "rollout_ep": [False, True],
}  # fmt: skip


class Case(NamedTuple):
    family: str
    tied: bool
    tp: int
    pp: int
    vpp: int
    first: int | None
    dp: int
    rollout_tp: int
    rollout_pp: int
    replicas: int
    hosts: int
    ep: int = 1
    etp: int | None = None
    rollout_ep: bool = False

    def train(self) -> TrainParallel:
        """With the fewest ranks that make `dp` copies of all weights."""
        experts = 1 if self.etp is None else self.ep * self.etp
        return TrainParallel(
            math.lcm(self.tp, experts) * self.pp * self.dp, tensor=self.tp, pipeline=self.pp,
            virtual_pipeline=self.vpp, expert=self.ep, expert_tensor=self.etp,
            first_stage_layers=self.first,
        )  # fmt: skip

    def rollout(self) -> RolloutParallel:
        return RolloutParallel(self.rollout_tp, self.rollout_pp, self.rollout_ep, self.replicas)

    def is_possible(self) -> bool:
        try:
            self.train().chunks(LAYERS)
        except ValueError:
            return False
        return True


def pairwise(axes: dict[str, list[Any]]) -> Iterator[Case]:
    """Cases in which each possible pair of values of any two axes occurs."""
    cases = [Case(**dict(zip(axes, values, strict=True))) for values in _sample(axes)]
    pairs = {case: frozenset(itertools.combinations(zip(axes, case, strict=False), 2))
             for case in cases if case.is_possible()}  # fmt: skip
    missing = frozenset().union(*pairs.values())
    while missing:
        best = max(pairs, key=lambda case: len(pairs[case] & missing))
        missing -= pairs[best]
        yield best


def _sample(axes: dict[str, list[Any]]) -> list[tuple[Any, ...]]:
    """Some of all combinations, the same ones every time."""
    rng = random.Random(0)
    return [tuple(rng.choice(values) for values in axes.values()) for _ in range(1500)]


def spread(num_senders: int, num_readers: int, ranks_per_replica: int, hosts: int = 1) -> Links:
    """Rank i of either side shares GPU i with the other; the first ranks are on the first host."""
    num_gpus = max(num_senders, num_readers)
    places = [Place(f"host{gpu * hosts // num_gpus}", f"gpu{gpu}") for gpu in range(num_gpus)]
    return Links(places[:num_senders], places[:num_readers], ranks_per_replica)


def slices(rect: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in rect)


def check_arrival(
    plan: RankPlan, sources: dict[int, dict[str, torch.Tensor]], want: dict[str, torch.Tensor]
) -> None:
    """Run a plan; compare each element's value and how often it was written."""
    live = {name: torch.full_like(t, -1) for name, t in want.items()}
    counts = {name: torch.zeros_like(t) for name, t in want.items()}
    for copy in plan.copies:
        target = live[copy.target_param][slices(copy.target)]
        source = sources[copy.source_rank][copy.source_param][slices(copy.source)]
        target.copy_(source.view(target.shape))
        counts[copy.target_param][slices(copy.target)] += 1
    for name, rect in plan.padding:
        live[name][slices(rect)] = 0
        counts[name][slices(rect)] += 1
    for name, value in want.items():
        assert torch.equal(live[name], value), name
        assert (counts[name] == 1).all(), name
    assert plan.num_elements == sum(int((t != 0).sum()) for t in want.values())


@pytest.mark.parametrize(
    "case",
    [*pairwise(DENSE_AXES), *pairwise(EXPERT_AXES)],
    ids=lambda case: "-".join(map(str, case)),
)
def test_every_element_arrives_once_and_both_sides_plan_the_same(case: Case) -> None:
    model = tiny_shape(case.family, tied=case.tied, layers=LAYERS)
    logical = logical_tensors(model)
    senders = MegatronShards(model, case.train())
    readers = VLLMShards(model, case.rollout())
    links = spread(
        senders.num_ranks, readers.num_ranks, case.rollout().ranks_per_replica, case.hosts
    )
    sources = {
        rank: megatron_tensors(model, logical, case.train(), rank)
        for rank in range(senders.num_ranks)
    }
    read: dict[int, dict[int, str]] = {}
    for rank in range(readers.num_ranks):
        plan = plan_reader(rank, readers.rank_layouts(rank), senders, links)
        check_arrival(plan, sources, vllm_tensors(model, logical, case.rollout(), rank))
        check_nearness(rank, plan.copies, senders, links)
        read[rank] = {s: fingerprint(copies) for s, copies in plan.by_source().items()}
    sent = {
        rank: {
            reader: fingerprint(copies)
            for reader, copies in plan_sender(rank, senders, readers, links).items()
        }
        for rank in range(senders.num_ranks)
    }
    check_agreement(read, sent)
    assert {pair for r, own in read.items() for pair in ((s, r) for s in own)} == {
        pair for s, own in sent.items() for pair in ((s, r) for r in own)
    }


def check_nearness(
    reader: int, copies: Sequence[Copy], senders: ShardedModel, links: Links
) -> None:
    """Each copy comes from one of the nearest ranks that hold the same parameter."""
    held_by = ranks_by_shard(senders)
    for source_rank, param in {(copy.source_rank, copy.source_param) for copy in copies}:
        alike = held_by[_shard(senders, source_rank, param)]
        nearest = min(links.kind(reader, rank) for rank in alike)
        assert links.kind(reader, source_rank) == nearest, (param, alike)


def ranks_by_shard(senders: ShardedModel) -> dict[ParamLayout, list[int]]:
    shards: dict[ParamLayout, list[int]] = {}
    for rank in range(senders.num_ranks):
        for layout in senders.rank_layouts(rank):
            shards.setdefault(layout, []).append(rank)
    return shards


def _shard(senders: ShardedModel, rank: int, param: str) -> ParamLayout:
    return next(layout for layout in senders.rank_layouts(rank) if layout.name == param)


def test_ranks_read_from_their_own_host() -> None:
    model = tiny_shape("mixtral")
    senders = MegatronShards(model, TrainParallel(8, tensor=2, expert=2, expert_tensor=1))
    readers = VLLMShards(model, RolloutParallel(tensor=4, replicas=2))
    links = spread(8, 8, ranks_per_replica=4, hosts=2)
    for rank in range(8):
        plan = plan_reader(rank, readers.rank_layouts(rank), senders, links)
        assert {sender // 4 for sender in plan.source_ranks} == {rank // 4}


def test_a_rank_reads_what_its_own_gpu_holds_from_there() -> None:
    model = tiny_shape(groups=4)
    senders = MegatronShards(model, TrainParallel(4, tensor=2))
    readers = VLLMShards(model, RolloutParallel(tensor=2, replicas=2))
    links = spread(4, 4, ranks_per_replica=2)
    for rank in range(4):
        plan = plan_reader(rank, readers.rank_layouts(rank), senders, links)
        sliced = [copy for copy in plan.copies if "linear" in copy.source_param]
        assert {copy.source_rank for copy in sliced} == {rank}


def test_whole_tensors_go_to_the_first_rank_of_each_replica_that_loads_for_the_others() -> None:
    model = tiny_shape()
    senders = MegatronShards(model, TrainParallel(2, tensor=2))
    readers = CheckpointShards(model, num_loaders=2, batch_elements=10**6, ranks_per_loader=2)
    links = colocated(2, readers.num_ranks, ranks_per_replica=2)
    plans = [plan_reader(r, readers.rank_layouts(r), senders, links) for r in range(4)]
    everything = sum(math.prod(model.tensor_shape(name)) for name in model.tensor_names())
    assert [plan.num_elements for plan in plans] == [everything, 0, everything, 0]
    for sender in range(2):
        assert plan_sender(sender, senders, readers, links).keys() == {0, 2}


def test_without_peer_access_a_gpu_of_the_same_host_is_behind_the_network() -> None:
    own, other = Place("h", "g0", frozenset({"g0"})), Place("h", "g1", frozenset({"g1"}))
    links = Links([own, other, other._replace(host="far")], [own], ranks_per_replica=1)
    kinds = [links.kind(0, sender) for sender in range(3)]
    assert kinds == [LinkKind.DEVICE, LinkKind.NETWORK, LinkKind.NETWORK]
    assert Links([other], [own._replace(peers=None)], 1).kind(0, 0) == LinkKind.HOST


@pytest.mark.parametrize(
    "train, rollout",
    [
        (TrainParallel(8, tensor=2), RolloutParallel(tensor=2, replicas=4)),
        (TrainParallel(8, tensor=2), RolloutParallel(tensor=4, replicas=2)),
        (TrainParallel(8, tensor=1), RolloutParallel(tensor=4, replicas=2)),
        (
            TrainParallel(16, tensor=2, expert=2, expert_tensor=1),
            RolloutParallel(tensor=2, expert=True, replicas=8),
        ),
    ],
)
def test_copies_of_the_trainer_share_the_sending(
    train: TrainParallel, rollout: RolloutParallel
) -> None:
    model = tiny_shape("mixtral", groups=4)
    senders, readers = MegatronShards(model, train), VLLMShards(model, rollout)
    far = Links(
        [Place("train", f"t{i}") for i in range(senders.num_ranks)],
        [Place("rollout", f"r{i}") for i in range(readers.num_ranks)],
        rollout.ranks_per_replica,
    )
    for links in (far, colocated(senders.num_ranks, readers.num_ranks, rollout.ranks_per_replica)):
        sent = Counter({rank: 0 for rank in range(senders.num_ranks)})
        for rank in range(readers.num_ranks):
            for copy in plan_reader(rank, readers.rank_layouts(rank), senders, links).copies:
                sent[copy.source_rank] += copy.num_elements
        assert max(sent.values()) <= 1.25 * min(sent.values()), sent


@pytest.mark.parametrize(
    "tp, kinds", [(1, list(LinkKind)), (2, list(LinkKind)), (4, [LinkKind.NETWORK])]
)
def test_links_of_each_kind_are_loaded_equally(tp: int, kinds: list[LinkKind]) -> None:
    """Two hosts with one pipeline stage each: what the own host lacks comes over the network."""
    model = tiny_shape(groups=4, vocab=128)
    senders = MegatronShards(model, TrainParallel(16, tensor=2, pipeline=2))
    readers = VLLMShards(model, RolloutParallel(tensor=tp, replicas=16 // tp))
    links = spread(16, 16, ranks_per_replica=tp, hosts=2)
    sent = {kind: Counter({rank: 0 for rank in range(16)}) for kind in LinkKind}
    for rank in range(16):
        for copy in plan_reader(rank, readers.rank_layouts(rank), senders, links).copies:
            sent[links.kind(rank, copy.source_rank)][copy.source_rank] += copy.num_elements
    for stage in (range(8), range(8, 16)):
        for kind in kinds:
            loads = [sent[kind][rank] for rank in stage]
            assert max(loads) <= 1.05 * min(loads), (kind, loads)


def test_the_same_plan_comes_out_every_time() -> None:
    model = tiny_shape("qwen3_moe")
    sides = [
        (
            MegatronShards(model, TrainParallel(8, tensor=2, expert=2, expert_tensor=1)),
            VLLMShards(model, RolloutParallel(tensor=2, pipeline=2, replicas=2)),
        )
        for _ in range(2)
    ]
    links = [colocated(8, 8, 4) for _ in range(2)]
    # One of the two has answered other questions before.
    for tensor in reversed(list(model.tensor_names())):
        sides[1][0].holders(tensor)
    first, second = (
        plan_reader(5, readers.rank_layouts(5), senders, own_links)
        for (senders, readers), own_links in zip(sides, links, strict=True)
    )
    assert first == second
    first, second = (
        plan_sender(3, senders, readers, own_links)
        for (senders, readers), own_links in zip(sides, links, strict=True)
    )
    assert first == second


def test_planning_leaves_the_garbage_collector_as_it_was() -> None:
    model = tiny_shape()
    senders = MegatronShards(model, TrainParallel(1))
    layouts = VLLMShards(model, RolloutParallel()).rank_layouts(0)
    links = colocated(1, 1, 1)
    nothing = ListedShards({0: []})
    assert gc.isenabled()
    for sources in (senders, nothing):  # with `nothing` it fails
        with nullcontext() if sources is senders else pytest.raises(IncompletePlanError):
            plan_reader(0, layouts, sources, links)
        assert gc.isenabled()
    gc.disable()
    try:
        plan_reader(0, layouts, senders, links)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_weights_that_no_trainer_rank_holds_are_refused_with_tensor_and_range() -> None:
    model = tiny_shape()
    senders = MegatronShards(model, TrainParallel(2, tensor=2))
    readers = VLLMShards(model, RolloutParallel())
    half = ListedShards({0: senders.rank_layouts(0)})
    with pytest.raises(IncompletePlanError, match=r"mlp\.down_proj\.weight\[0:8, 12:24\]"):
        plan_reader(0, readers.rank_layouts(0), half, colocated(2, 1, 1))


def test_a_trained_tensor_that_no_engine_rank_takes_is_refused_with_its_range() -> None:
    model = tiny_shape()
    senders = MegatronShards(model, TrainParallel(1))
    readers = VLLMShards(model, RolloutParallel(tensor=2))
    pruned = ListedShards(
        {
            rank: [layout for layout in readers.rank_layouts(rank) if "o_proj" not in layout.name]
            for rank in range(2)
        }
    )
    message = r"4 trained rectangles .*\n  model\.layers\.0\.self_attn\.o_proj\.weight\[0:8, 0:16\]"
    with pytest.raises(IncompletePlanError, match=message):
        plan_sender(0, senders, pruned, colocated(1, 2, 2))


def test_a_model_of_other_sizes_is_refused() -> None:
    senders = MegatronShards(tiny_shape(), TrainParallel(1))
    readers = VLLMShards(tiny_shape(vocab=120), RolloutParallel())
    with pytest.raises(IncompletePlanError, match=r"embed_tokens\.weight\[100:120, 0:8\]"):
        plan_reader(0, readers.rank_layouts(0), senders, colocated(1, 1, 1))
    with pytest.raises(IncompletePlanError, match=r"model\.layers\.3\.input_layernorm\.weight"):
        shallow = VLLMShards(tiny_shape(layers=3), RolloutParallel())
        plan_sender(0, senders, shallow, colocated(1, 1, 1))


def test_a_fingerprint_tells_every_field_of_every_copy_but_not_their_order() -> None:
    one = Copy(1, "source", ((0, 2), (3, 5)), "target", ((4, 6), (0, 2)))
    other = Copy(1, "source", ((2, 4), (3, 5)), "target", ((6, 8), (0, 2)))
    texts = [
        fingerprint(copies)
        for copies in (
            [],
            [one],
            [other],
            [one, other],
            [one, one],
            [one._replace(source_rank=2)],
            [one._replace(source_param="tied")],
            [one._replace(source=((0, 2), (3, 6)))],
            [one._replace(source=((1, 3), (3, 5)))],
            [one._replace(target_param="tied")],
            [one._replace(target=((4, 6), (1, 3)))],
            [one._replace(target=((0, 1), (4, 6), (0, 2)))],
            # the same numbers, otherwise combined
            [one._replace(source=other.source), other._replace(source=one.source)],
        )
    ]
    assert len(set(texts)) == len(texts)
    assert fingerprint([other, one]) == fingerprint([one, other])


def test_sides_that_planned_differently_are_named_by_pair() -> None:
    read = {0: {0: "a", 1: "b"}, 1: {0: "c"}}
    check_agreement(read, {0: {0: "a", 1: "c"}, 1: {0: "b"}})
    with pytest.raises(IncompletePlanError, match=r"differently: 0 -> 1, 1 -> 0, 1 -> 1$"):
        check_agreement(read, {0: {0: "a", 1: "x"}, 1: {1: "b"}})


def test_tensor_parallel_2_to_3_arrives_where_the_model_divides() -> None:
    model = replace(tiny_shape(heads=6, groups=6, vocab=150), hidden_size=6)
    logical = logical_tensors(model)
    train, rollout = TrainParallel(2, tensor=2), RolloutParallel(tensor=3)
    senders, readers = MegatronShards(model, train), VLLMShards(model, rollout)
    sources = {rank: megatron_tensors(model, logical, train, rank) for rank in range(2)}
    for rank in range(3):
        plan = plan_reader(rank, readers.rank_layouts(rank), senders, colocated(2, 3, 3))
        check_arrival(plan, sources, vllm_tensors(model, logical, rollout, rank))


def test_tensor_parallel_2_to_3_is_refused_with_the_reason_where_it_does_not() -> None:
    with pytest.raises(ValueError, match="attention heads 4 cannot be cut by .* size 3"):
        VLLMShards(tiny_shape(), RolloutParallel(tensor=3))


def test_subtract_leaves_disjoint_pieces_that_cover_the_rest() -> None:
    grid = torch.zeros(5, 7)
    for (r0, r1), (c0, c1) in subtract(((0, 5), (0, 7)), ((1, 3), (2, 6))):
        grid[r0:r1, c0:c1] += 1
    hole = torch.zeros(5, 7)
    hole[1:3, 2:6] = 1
    assert torch.equal(grid, 1 - hole)
