"""Which ranks hold a tensor, when it is asked for in other ways than a plan of one model asks?"""

import pickle

import pytest

from chatlearn_vllm.layouts import (
    CheckpointShards,
    LowRank,
    MegatronShards,
    ReplicatedShards,
    RolloutParallel,
    ShardedModel,
    TrainParallel,
    VLLMShards,
)
from tests.helpers.reference_shards import tiny_shape

MODEL = tiny_shape("qwen3_moe")
"""Four layers, of which the second is dense; six experts."""
EXPERT = "model.layers.{}.mlp.experts.{}.gate_proj.weight"
LOW_RANK = LowRank(4, 0.5, frozenset({"linear_qkv", "linear_fc2"}))


def all_kinds() -> list[ShardedModel]:
    return [
        MegatronShards(MODEL, TrainParallel(4, tensor=2, expert=2, expert_tensor=1)),
        VLLMShards(MODEL, RolloutParallel(tensor=2, replicas=2)),
        CheckpointShards(MODEL, num_loaders=4, batch_elements=500),
    ]


@pytest.mark.parametrize("shards", all_kinds(), ids=lambda shards: type(shards).__name__)
def test_nobody_holds_a_tensor_that_the_model_does_not_have(shards) -> None:
    assert shards.holders(EXPERT.format(3, 5))
    for tensor in (
        EXPERT.format(3, 6),  # experts and layers are counted from 0
        EXPERT.format(3, 60),
        EXPERT.format(1, 0),  # that layer is dense
        EXPERT.format(4, 0),
        "model.layers.3.mlp.gate_proj.weight",
        "model.layers.4.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "score.weight",
    ):
        assert not shards.holders(tensor), tensor


@pytest.mark.parametrize("shards", all_kinds(), ids=lambda shards: type(shards).__name__)
def test_shards_that_travelled_are_the_same_whatever_they_were_asked_before(shards) -> None:
    again = pickle.loads(pickle.dumps(shards))
    shards.holders(EXPERT.format(0, 0))
    assert again == shards and not again != shards
    assert pickle.loads(pickle.dumps(shards)) == again
    assert again.holders(EXPERT.format(2, 1)) == shards.holders(EXPERT.format(2, 1))


def test_shards_of_other_sizes_or_of_the_other_side_differ() -> None:
    megatron, vllm, checkpoint = all_kinds()
    assert megatron != vllm and vllm != checkpoint
    assert megatron != MegatronShards(MODEL, TrainParallel(4, tensor=2, expert=2))
    assert megatron != MegatronShards(MODEL, megatron.parallel, low_rank=LOW_RANK)
    assert vllm != VLLMShards(tiny_shape("qwen3_moe", vocab=101), vllm.parallel)
    assert checkpoint != CheckpointShards(MODEL, num_loaders=4, batch_elements=501000)
    assert vllm != "model"


def test_adapters_belong_to_the_weights_of_their_modules_only() -> None:
    layer = "decoder.layers.0."
    assert LOW_RANK.adapts(layer + "self_attention.linear_qkv.weight")
    assert LOW_RANK.adapts(layer + "mlp.experts.local_experts.1.linear_fc2.weight")
    for other in (
        "self_attention.linear_qkv.bias",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1.weight",
        "linear_qkv.layer_norm.weight",
        "linear_qkv_2.weight",
    ):
        assert not LOW_RANK.adapts(layer + other), other


def test_replicas_have_the_adapters_and_batches_of_the_one() -> None:
    one = CheckpointShards(MODEL, num_loaders=1, batch_elements=500)
    copies = ReplicatedShards(one, 2)
    assert copies.low_rank is None
    assert copies.num_batches == one.num_batches > 3
    for name in MODEL.tensor_names():
        assert copies.batch_of(name) == one.batch_of(name)
    trained = MegatronShards(MODEL, TrainParallel(1), low_rank=LOW_RANK)
    assert ReplicatedShards(trained, 2).low_rank == LOW_RANK
    assert (trained.num_batches, trained.batch_of("anything")) == (1, 0)


def test_a_batch_is_closed_before_it_grows_too_large_and_batches_follow_the_layers() -> None:
    for limit in (1, 96, 500, 10**6):
        shards = CheckpointShards(MODEL, num_loaders=1, batch_elements=limit)
        sizes: list[list[int]] = [[] for _ in range(shards.num_batches)]
        number = 0
        for layout in shards.rank_layouts(0):
            assert shards.batch_of(layout.name) in (number, number + 1)
            number = shards.batch_of(layout.name)
            sizes[number].append(layout.blocks[0].num_elements)
        assert all(sum(batch) <= limit or len(batch) == 1 for batch in sizes)
        for batch, following in zip(sizes, sizes[1:], strict=False):
            assert sum(batch) + following[0] > limit


def test_only_the_ranks_that_load_hold_whole_tensors() -> None:
    shards = CheckpointShards(MODEL, num_loaders=2, batch_elements=500, ranks_per_loader=3)
    assert shards.num_ranks == 6
    assert [len(shards.rank_layouts(rank)) > 0 for rank in range(6)] == [True, False, False] * 2
    for name in MODEL.tensor_names():
        (holder,) = shards.holders(name)
        assert holder.ranks == (0, 3) and holder.param == name
        assert [layout for layout in shards.rank_layouts(3) if layout.name == name][0].blocks == (
            holder.block,
        )
