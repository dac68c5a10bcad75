"""Are both layouts right? Compared with parameters assembled by hand and with upstream's rules."""

import dataclasses
import math

import pytest
import torch
from megatron.core.parallel_state import RankGenerator
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from vllm.distributed.utils import get_pp_indices

from chatlearn_vllm.layouts import (
    Block,
    MegatronShards,
    ModelShape,
    ParamLayout,
    ReplicatedShards,
    RolloutParallel,
    ShardedModel,
    TrainParallel,
    VLLMShards,
    check_live_parameters,
)
from tests.helpers.reference_shards import (
    FAMILIES,
    logical_tensors,
    megatron_tensors,
    tiny_shape,
    vllm_tensors,
)

MODELS = {
    **{family: tiny_shape(family) for family in FAMILIES},
    "multi-head": tiny_shape(groups=4),
    "one key/value head": tiny_shape(groups=1, vocab=125),
    "tied": tiny_shape(tied=True),
    "tied, with experts": tiny_shape("qwen3_moe", tied=True),
}
DENSE_TRAINERS = [
    TrainParallel(1),
    TrainParallel(2, tensor=2),
    TrainParallel(4, tensor=4),
    TrainParallel(8, tensor=2, pipeline=2),
    TrainParallel(4, tensor=2, pipeline=2, virtual_pipeline=2),
    TrainParallel(3, pipeline=3, first_stage_layers=1, last_stage_layers=1),
]
EXPERT_TRAINERS = [
    TrainParallel(2, expert=2),
    TrainParallel(4, tensor=2, expert=2, expert_tensor=1),
    TrainParallel(4, tensor=1, expert=2, expert_tensor=2),
    TrainParallel(6, tensor=2, expert=3, expert_tensor=1),
    TrainParallel(8, tensor=2, pipeline=2, virtual_pipeline=2, expert=2, expert_tensor=1),
    TrainParallel(8, tensor=2, pipeline=2, expert=2, first_stage_layers=3),
]
DENSE_ROLLOUTS = [
    RolloutParallel(),
    RolloutParallel(tensor=2, replicas=2),
    RolloutParallel(tensor=4),
    RolloutParallel(tensor=2, pipeline=2),
    RolloutParallel(pipeline=3),
]
EXPERT_ROLLOUTS = [
    RolloutParallel(tensor=2, expert=True),
    RolloutParallel(tensor=4, expert=True, replicas=2),
    RolloutParallel(tensor=4, pipeline=3, expert=True),
]


def assemble(layout: ParamLayout, logical: dict[str, torch.Tensor]) -> torch.Tensor:
    out = torch.zeros(layout.shape, dtype=torch.int64)
    for block in layout.blocks:
        value = logical[block.tensor][tuple(slice(*r) for r in block.logical)]
        local = out[tuple(slice(*r) for r in block.local)]
        local += value.view(local.shape)
    return out


def check_rank(shards: ShardedModel, rank: int, want: dict[str, torch.Tensor], logical) -> None:
    layouts = shards.rank_layouts(rank)
    check_live_parameters(layouts, {name: tuple(t.shape) for name, t in want.items()}, "reference")
    for layout in layouts:
        assert torch.equal(assemble(layout, logical), want[layout.name]), (rank, layout.name)


@pytest.mark.parametrize("name", MODELS)
def test_megatron_layouts_give_the_parameters_that_megatron_stores(name: str) -> None:
    model = MODELS[name]
    logical = logical_tensors(model)
    for parallel in DENSE_TRAINERS + (EXPERT_TRAINERS if model.num_experts else []):
        shards = MegatronShards(model, parallel)
        for rank in range(shards.num_ranks):
            check_rank(shards, rank, megatron_tensors(model, logical, parallel, rank), logical)


@pytest.mark.parametrize("name", MODELS)
def test_vllm_layouts_give_the_parameters_that_vllm_stores(name: str) -> None:
    model = MODELS[name]
    logical = logical_tensors(model)
    for parallel in DENSE_ROLLOUTS + (EXPERT_ROLLOUTS if model.num_experts else []):
        shards = VLLMShards(model, parallel)
        for rank in range(shards.num_ranks):
            check_rank(shards, rank, vllm_tensors(model, logical, parallel, rank), logical)


@pytest.mark.parametrize("name", MODELS)
def test_holders_are_the_ranks_whose_layouts_have_the_block(name: str) -> None:
    model = MODELS[name]
    trainers = DENSE_TRAINERS + (EXPERT_TRAINERS if model.num_experts else [])
    rollouts = DENSE_ROLLOUTS + (EXPERT_ROLLOUTS if model.num_experts else [])
    sides = [MegatronShards(model, parallel) for parallel in trainers]
    sides += [VLLMShards(model, parallel) for parallel in rollouts]
    for shards in sides:
        held = {
            (rank, layout.name, block)
            for rank in range(shards.num_ranks)
            for layout in shards.rank_layouts(rank)
            for block in layout.blocks
        }
        listed = [
            (rank, holder.param, holder.block)
            for tensor in model.tensor_names()
            for holder in shards.holders(tensor)
            for rank in holder.ranks
        ]
        assert set(listed) == held
        assert len(listed) == len(held)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_knows_its_checkpoints_tensors_and_their_shapes(name: str) -> None:
    model = MODELS[name]
    shapes = {tensor: model.tensor_shape(tensor) for tensor in model.tensor_names()}
    assert shapes == {name: tuple(t.shape) for name, t in logical_tensors(model).items()}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_scalar_head_is_whole_on_the_last_stage_and_never_tied(family: str) -> None:
    tied = tiny_shape(family, tied=True)
    model = dataclasses.replace(tied, head="scalar")
    assert set(model.tensor_names()) == {*tied.tensor_names(), "score.weight"}
    assert model.tensor_shape("score.weight") == (1, 8)
    shards = MegatronShards(model, TrainParallel(8, tensor=2, pipeline=2))
    whole = ((0, 1), (0, 8))
    for rank in range(8):
        layouts = {layout.name: layout for layout in shards.rank_layouts(rank)}
        head = layouts.pop("output_layer.weight", None)
        assert (head is None) == (rank < 4)
        if head:
            assert head.blocks == (Block("score.weight", whole, whole),)
        of_policy = MegatronShards(tied, shards.parallel).rank_layouts(rank)
        assert layouts == {
            layout.name: layout for layout in of_policy if layout.name != "output_layer.weight"
        }
    (holder,) = shards.holders("score.weight")
    assert holder.ranks == (4, 5, 6, 7)
    assert not shards.holders("lm_head.weight")


def test_the_head_is_no_matter_of_config_json() -> None:
    config = dict(
        model_type="llama", num_hidden_layers=2, hidden_size=8, intermediate_size=16,
        num_attention_heads=2, vocab_size=50, tie_word_embeddings=True,
    )  # fmt: skip
    assert ModelShape.from_hf_config(config).output_tensor == "model.embed_tokens.weight"
    scalar = ModelShape.from_hf_config(config, "scalar")
    assert scalar.output_tensor == "score.weight" and not scalar.tie_word_embeddings


SIZES = dict(
    model_type="llama", num_hidden_layers=4, hidden_size=8, intermediate_size=24,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=100,
)  # fmt: skip
EXPERTS = dict(num_experts=6, moe_intermediate_size=12)


def test_sizes_are_read_from_config_json_as_vllm_reads_them() -> None:
    assert ModelShape.from_hf_config(SIZES | {"head_dim": 4}) == tiny_shape()
    absent = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    shape = ModelShape.from_hf_config(absent)
    assert (shape.num_query_groups, shape.head_dim) == (4, 2)
    config = SIZES | EXPERTS | {"model_type": "qwen3_moe", "head_dim": 4}
    assert ModelShape.from_hf_config(config | {"mlp_only_layers": [1]}) == tiny_shape("qwen3_moe")
    every_second = ModelShape.from_hf_config(config | {"decoder_sparse_step": 2})
    assert every_second.dense_layers == {0, 2}
    mixtral = SIZES | {"model_type": "mixtral", "num_local_experts": 6, "head_dim": None}
    shape = ModelShape.from_hf_config(mixtral)
    assert (shape.num_experts, shape.moe_ffn_hidden_size, shape.head_dim) == (6, 24, 2)


@pytest.mark.parametrize(
    "changes, problem",
    [
        (
            {"model_type": ["llama"]},
            r"model_type=\['llama'\] has no weight layout",
        ),
        ({"hidden_size": None, "vocab_size": None}, "missing hidden_size, vocab_size"),
        ({"hidden_size": 0, "vocab_size": "9"}, "hidden_size=0 must .*; vocab_size='9' must be a"),
        ({"num_hidden_layers": 4.0}, "num_hidden_layers=4.0 must be a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True must be a positive integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of .*heads=3"),
        (
            {"hidden_size": 10},
            "hidden_size=10 must be a multiple of num_attention_heads=4, or",
        ),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' must be true or false"),
        ({"model_type": "qwen3"}, "missing head_dim"),  # 128 for transformers
        ({"model_type": "mixtral"}, "missing num_local_experts"),
        ({"model_type": "qwen3_moe", "num_experts": 6}, "missing moe_intermediate_size"),  # 768
        (
            {"model_type": "qwen3_moe", **EXPERTS, "num_experts": -6, "decoder_sparse_step": 0},
            "num_experts=-6 must be .*; decoder_sparse_step=0 must be",
        ),
        (
            {"model_type": "qwen3_moe", **EXPERTS, "mlp_only_layers": 1},
            "mlp_only_layers=1 must be a list of layer numbers",
        ),
        (
            {"model_type": "qwen3_moe", **EXPERTS, "mlp_only_layers": [0, "1"]},
            r"mlp_only_layers=\[0, '1'\] must be a list of layer numbers",
        ),
    ],
)
def test_a_config_json_that_gives_no_sizes_is_refused_with_all_keys(changes, problem) -> None:
    with pytest.raises(ValueError, match=f"^config.json: {problem}"):
        ModelShape.from_hf_config(SIZES | changes)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_sizes_that_transformers_would_choose_by_itself_must_be_given(family) -> None:
    config = SIZES | EXPERTS | {"model_type": family, "head_dim": 4}
    del config["num_key_value_heads"]
    with pytest.raises(ValueError, match="missing num_key_value_heads"):
        ModelShape.from_hf_config(config)


def test_only_dense_layers_need_a_dense_width_that_can_be_cut() -> None:
    experts = dataclasses.replace(tiny_shape("mixtral"), ffn_hidden_size=25)
    assert MegatronShards(experts, TrainParallel(2, tensor=2)).num_ranks == 2
    assert VLLMShards(experts, RolloutParallel(2)).num_ranks == 2
    mixed = dataclasses.replace(tiny_shape("qwen3_moe"), ffn_hidden_size=25)
    for make in (
        lambda: MegatronShards(mixed, TrainParallel(2, tensor=2)),
        lambda: VLLMShards(mixed, RolloutParallel(2)),
    ):
        with pytest.raises(ValueError, match="ffn_hidden_size 25 cannot be cut"):
            make()


def test_replicas_are_counted_one_after_the_other() -> None:
    model = tiny_shape()
    one = MegatronShards(model, TrainParallel(4, tensor=2, pipeline=2))
    copies = ReplicatedShards(one, 3)
    assert copies.num_ranks == 12
    for rank in range(12):
        assert copies.rank_layouts(rank) == one.rank_layouts(rank % 4)
    for tensor in model.tensor_names():
        held = {
            (rank, layout.name, block)
            for rank in range(12)
            for layout in copies.rank_layouts(rank)
            for block in layout.blocks
            if block.tensor == tensor
        }
        holders = copies.holders(tensor)
        assert {(rank, h.param, h.block) for h in holders for rank in h.ranks} == held
        assert all(list(h.ranks) == sorted(h.ranks) for h in holders)


def test_the_vocabulary_may_be_padded_further_than_needed() -> None:
    model = tiny_shape()
    shards = MegatronShards(model, TrainParallel(2, tensor=2), padded_vocab_size=256)
    first, second = (
        next(layout for layout in shards.rank_layouts(rank) if "embedding" in layout.name)
        for rank in range(2)
    )
    assert first.shape == second.shape == (128, 8)
    assert first.padding == (((100, 128), (0, 8)),)
    assert second.blocks == ()
    assert second.padding == (((0, 128), (0, 8)),)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("ep", [1, 2, 3])
@pytest.mark.parametrize("etp", [1, 2, 4])
@pytest.mark.parametrize("pp", [1, 3])
@pytest.mark.parametrize("dp", [1, 2])
def test_ranks_have_megatrons_coordinates(tp: int, ep: int, etp: int, pp: int, dp: int) -> None:
    per_stage = math.lcm(tp, ep * etp) * dp
    world = per_stage * pp
    parallel = TrainParallel(world, tensor=tp, pipeline=pp, expert=ep, expert_tensor=etp)
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=tp, ep=1, dp=per_stage // tp, pp=pp, cp=1, order=order)
    expert = RankGenerator(tp=etp, ep=ep, dp=per_stage // (ep * etp), pp=pp, cp=1, order=order)
    at = [parallel.coordinates(rank) for rank in range(world)]
    for generator, token, own in (
        (dense, "tp", [c.tensor for c in at]),
        (dense, "pp", [c.pipeline for c in at]),
        (expert, "pp", [c.pipeline for c in at]),
        (expert, "ep", [c.expert for c in at]),
        (expert, "tp", [c.expert_tensor for c in at]),
    ):
        for group in generator.get_ranks(token):
            assert [own[rank] for rank in group] == list(range(len(group)))
    copies = {parallel.dense_ranks(c.pipeline, c.tensor) for c in at}
    assert copies == {tuple(group) for group in dense.get_ranks("dp")}
    copies = {parallel.expert_ranks(c.pipeline, c.expert, c.expert_tensor) for c in at}
    assert copies == {tuple(group) for group in expert.get_ranks("dp")}


def megatron_chunks(num_layers: int, parallel: TrainParallel) -> list[list[range]]:
    config = TransformerConfig(
        num_layers=num_layers, hidden_size=8, num_attention_heads=1, pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
    )  # fmt: skip
    chunks: list[list[range]] = []
    for stage in range(parallel.pipeline):
        chunks.append([])
        for virtual in range(parallel.virtual_pipeline):
            vp_stage = virtual if parallel.virtual_pipeline > 1 else None
            start = get_transformer_layer_offset(config, vp_stage, pp_rank=stage)
            count = get_num_layers_to_build(config, vp_stage, pp_rank=stage)
            chunks[-1].append(range(start, start + count))
    return chunks


@pytest.mark.parametrize(
    "num_layers, sizes",
    [
        (4, {"pipeline": 1}),
        (12, {"pipeline": 4}),
        (12, {"pipeline": 2, "virtual_pipeline": 3}),
        (12, {"pipeline": 3, "virtual_pipeline": 2}),
        (11, {"pipeline": 3, "first_stage_layers": 3}),
        (11, {"pipeline": 3, "last_stage_layers": 5}),
        (13, {"pipeline": 4, "first_stage_layers": 2, "last_stage_layers": 1}),
        (5, {"pipeline": 2, "first_stage_layers": 3, "last_stage_layers": 2}),
        (10, {"pipeline": 3, "virtual_pipeline": 2, "first_stage_layers": 2}),
        (16, {"pipeline": 4, "virtual_pipeline": 2, "first_stage_layers": 4}),
        (61, {"pipeline": 16, "first_stage_layers": 3, "last_stage_layers": 2}),
    ],
)  # fmt: skip
def test_stages_have_megatrons_layers(num_layers: int, sizes: dict[str, int]) -> None:
    parallel = TrainParallel(sizes["pipeline"], **sizes)
    assert parallel.chunks(num_layers) == megatron_chunks(num_layers, parallel)


@pytest.mark.parametrize("pp", range(1, 9))
@pytest.mark.parametrize("num_layers", [8, 13, 61])
def test_stages_have_vllms_layers(num_layers: int, pp: int) -> None:
    stages = RolloutParallel(pipeline=pp).stages(num_layers)
    assert stages == [range(*get_pp_indices(num_layers, stage, pp)) for stage in range(pp)]


@pytest.mark.parametrize(
    "sizes, problem",
    [
        ({"pipeline": 3}, "4 layers cannot be spread over 3 pipeline stages$"),
        (
            {"pipeline": 2, "first_stage_layers": 3, "last_stage_layers": 2},
            "over 2 pipeline stages with 3 in the first and 2 in the last",
        ),
        ({"pipeline": 4, "virtual_pipeline": 2}, "1 layers of a pipeline stage .* 2 virtual"),
        (
            {"pipeline": 1, "first_stage_layers": 2, "last_stage_layers": 2},
            "over 1 pipeline stages with 2 in the first and 2 in the last",
        ),
    ],
)
def test_layers_that_cannot_be_spread_are_refused(sizes: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TrainParallel(sizes["pipeline"], **sizes).chunks(4)


@pytest.mark.parametrize(
    "family, sizes, problem",
    [
        ("llama", {"tensor": 3}, "attention heads 4 cannot be cut by tensor parallel size 3"),
        ("llama", {"expert": 2}, "expert parallel size 2: the model has no experts"),
        ("mixtral", {"expert": 4}, "experts 6 cannot be cut by expert parallel 4"),
        ("mixtral", {"expert_tensor": 5}, "moe_ffn_hidden_size 12 cannot be cut by .* size 5"),
    ],
)
def test_a_trainer_that_cannot_cut_the_model_is_refused(family, sizes, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        MegatronShards(tiny_shape(family), TrainParallel(math.prod(sizes.values()), **sizes))


@pytest.mark.parametrize(
    "model, sizes, problem",
    [
        (tiny_shape(), {"tensor": 3}, "attention heads 4 cannot be cut by tensor parallel size 3"),
        (tiny_shape(heads=6), {"tensor": 3}, "the padded vocabulary 128 cannot be cut"),
        (tiny_shape(heads=12, groups=3, vocab=150), {"tensor": 2}, "3 key/value heads cannot"),
        (tiny_shape(), {"expert": True}, "enable_expert_parallel: the model has no experts"),
        (tiny_shape(), {"pipeline": 5}, "4 layers cannot be spread over 5 stages"),
        (dataclasses.replace(tiny_shape(), head="scalar"), {}, "a model with head 'scalar' cannot"),
    ],
)
def test_a_rollout_that_cannot_cut_the_model_is_refused(model, sizes, problem) -> None:
    with pytest.raises(ValueError, match=f"rollout: {problem}"):
        VLLMShards(model, RolloutParallel(**sizes))


def test_ranks_that_do_not_make_whole_copies_are_refused() -> None:
    with pytest.raises(ValueError, match="6 training ranks are not a multiple of tp x pp = 4"):
        TrainParallel(6, tensor=2, pipeline=2)
    with pytest.raises(ValueError, match="6 training ranks are not .* ep x etp x pp = 4"):
        TrainParallel(6, tensor=2, expert=2)


def test_a_parameter_with_a_hole_is_refused() -> None:
    with pytest.raises(ValueError, match=r"p \(4,\): 1 elements in no block"):
        ParamLayout("p", (4,), (Block("t", ((0, 3),), ((0, 3),)),))


def test_a_parameter_written_twice_is_refused() -> None:
    twice = (Block("t", ((0, 3),), ((0, 3),)), Block("t", ((0, 2),), ((2, 4),)))
    with pytest.raises(ValueError, match="overlap"):
        ParamLayout("p", (4,), twice)


def test_live_parameters_that_differ_are_all_named() -> None:
    layouts = VLLMShards(tiny_shape(), RolloutParallel()).rank_layouts(0)
    live = {layout.name: layout.shape for layout in layouts}
    del live["model.norm.weight"]
    live["model.layers.0.self_attn.qkv_proj.weight"] = (9, 8)
    live["model.layers.0.mlp.gate.weight"] = (6, 8)
    with pytest.raises(ValueError, match="vLLM's parameters") as error:
        check_live_parameters(layouts, live, "vLLM")
    assert str(error.value).splitlines()[1:] == [
        "  model.layers.0.mlp.gate.weight: has no layout",
        "  model.layers.0.self_attn.qkv_proj.weight: is (9, 8), the layout says (32, 8)",
        "  model.norm.weight: the model has no such parameter",
    ]


def test_an_unsupported_model_type_names_those_with_a_layout() -> None:
    with pytest.raises(ValueError, match=r"model_type='mamba'.*llama, qwen2, qwen3"):
        ModelShape.from_hf_config({"model_type": "mamba"})
