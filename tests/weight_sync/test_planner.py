"""Does a plan move exactly the right weights, for any pair of layouts? Run on plain tensors."""

import itertools

import pytest
import torch

from chatlearn_vllm.layouts import ParamLayout, megatron_param_layout, vllm_param_layout
from chatlearn_vllm.weight_sync.planner import (
    IncompletePlanError,
    check_all_sources_used,
    plan_rank,
    subtract,
)
from chatlearn_vllm.weight_sync.transport import export_tensors, open_export, run_plan
from tests.helpers.reference_shards import (
    logical_tensors,
    megatron_shards,
    tiny_shape,
    vllm_shards,
)

PARALLEL = list(itertools.product([1, 2, 4], [1, 2]))


def stage_params(params, layers, first, last, embed, head):
    """The parameters of one pipeline stage out of those of a whole tensor parallel rank."""
    kept = {}
    for name, value in params.items():
        layer = next((int(p) for p in name.split(".") if p.isdigit()), None)
        if layer is not None:
            keep = layer in layers
        else:
            keep = (first and name in embed) or (last and name in head)
        if keep:
            kept[name] = value
    return kept


def trainer(shape, logical, tp, pp, dp=1):
    """Tensors and layouts of all training ranks; ranks ordered tp fastest, then dp, then pp."""
    tensors, layouts = {}, {}
    per_stage = shape.num_layers // pp
    for stage, replica, tp_rank in itertools.product(range(pp), range(dp), range(tp)):
        rank = (stage * dp + replica) * tp + tp_rank
        layers = range(stage * per_stage, (stage + 1) * per_stage)
        tensors[rank] = stage_params(
            megatron_shards(shape, logical, tp_rank, tp),
            layers, stage == 0, stage == pp - 1,
            {"embedding.word_embeddings.weight"},
            {"output_layer.weight", "decoder.final_layernorm.weight"},
        )  # fmt: skip
        layouts[rank] = [
            megatron_param_layout(shape, name, tuple(t.shape), tp_rank, tp)
            for name, t in tensors[rank].items()
        ]
    return tensors, layouts


def rollout(shape, logical, tp, pp):
    """Expected tensors and layouts of one replica's ranks."""
    tensors, layouts = [], []
    per_stage = shape.num_layers // pp
    head = {"lm_head.weight", "model.norm.weight"}
    if shape.tie_word_embeddings:
        head.add("model.embed_tokens.weight")
    for stage, tp_rank in itertools.product(range(pp), range(tp)):
        layers = range(stage * per_stage, (stage + 1) * per_stage)
        params = stage_params(
            vllm_shards(shape, logical, tp_rank, tp),
            layers, stage == 0, stage == pp - 1, {"model.embed_tokens.weight"}, head,
        )  # fmt: skip
        tensors.append(params)
        layouts.append(
            [vllm_param_layout(shape, n, tuple(t.shape), tp_rank, tp) for n, t in params.items()]
        )
    return tensors, layouts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("train", PARALLEL)
@pytest.mark.parametrize("roll", PARALLEL)
def test_every_element_arrives_for_any_pair_of_layouts(train, roll, tied) -> None:
    shape = tiny_shape(heads=4, groups=2, vocab=100, tied=tied)
    logical = logical_tensors(shape)
    sources, source_layouts = trainer(shape, logical, *train)
    wanted, target_layouts = rollout(shape, logical, *roll)
    check_all_sources_used(target_layouts, source_layouts)
    opened = {rank: open_export(export_tensors(tensors)) for rank, tensors in sources.items()}
    for want, layouts in zip(wanted, target_layouts, strict=True):
        live = {name: torch.full_like(t, float("nan")) for name, t in want.items()}
        plan = plan_rank(layouts, source_layouts)
        num_bytes = run_plan(plan, opened, live)
        for name in want:
            assert torch.equal(live[name], want[name]), name
        assert num_bytes == 4 * plan.num_elements
        counts = {name: torch.zeros(t.shape) for name, t in want.items()}
        for copy in plan.copies:
            counts[copy.target_param][tuple(slice(*r) for r in copy.target)] += 1
        for name, rect in plan.padding:
            counts[name][tuple(slice(*r) for r in rect)] += 1
        assert all((count == 1).all() for count in counts.values())


def test_preferred_ranks_are_read_where_they_hold_the_weights() -> None:
    shape = tiny_shape(heads=4, groups=2)
    logical = logical_tensors(shape)
    _, source_layouts = trainer(shape, logical, tp=2, pp=1, dp=2)
    _, target_layouts = rollout(shape, logical, tp=2, pp=1)
    for prefer in ([0, 1], [2, 3]):
        for layouts in target_layouts:
            assert set(plan_rank(layouts, source_layouts, prefer).source_ranks) <= set(prefer)


def test_the_same_plan_comes_out_every_time() -> None:
    shape = tiny_shape(heads=4, groups=2)
    logical = logical_tensors(shape)
    _, source_layouts = trainer(shape, logical, tp=2, pp=2)
    _, target_layouts = rollout(shape, logical, tp=1, pp=2)
    backwards = dict(reversed(source_layouts.items()))
    assert plan_rank(target_layouts[0], source_layouts) == plan_rank(target_layouts[0], backwards)


def test_a_missing_trainer_rank_is_refused_with_what_it_would_have_sent() -> None:
    shape = tiny_shape(heads=4, groups=2)
    logical = logical_tensors(shape)
    _, source_layouts = trainer(shape, logical, tp=2, pp=1)
    _, target_layouts = rollout(shape, logical, tp=1, pp=1)
    del source_layouts[1]
    with pytest.raises(IncompletePlanError, match=r"mlp\.down_proj\.weight\[0:32, 24:48\]"):
        plan_rank(target_layouts[0], source_layouts)


def test_a_trained_tensor_that_no_engine_rank_takes_is_refused() -> None:
    shape = tiny_shape(heads=4, groups=2)
    logical = logical_tensors(shape)
    _, source_layouts = trainer(shape, logical, tp=1, pp=1)
    _, target_layouts = rollout(shape, logical, tp=2, pp=1)
    pruned: list[list[ParamLayout]] = [
        [layout for layout in layouts if "o_proj" not in layout.name] for layouts in target_layouts
    ]
    with pytest.raises(IncompletePlanError, match=r"2 trained.*\n.*layers\.0\.self_attn\.o_proj"):
        check_all_sources_used(pruned, source_layouts)


def test_subtract_leaves_disjoint_pieces_that_cover_the_rest() -> None:
    grid = torch.zeros(5, 7)
    for (r0, r1), (c0, c1) in subtract(((0, 5), (0, 7)), ((1, 3), (2, 6))):
        grid[r0:r1, c0:c1] += 1
    hole = torch.zeros(5, 7)
    hole[1:3, 2:6] = 1
    assert torch.equal(grid, 1 - hole)


def test_tensors_that_share_a_storage_are_exported_once() -> None:
    flat = torch.arange(12.0)
    export = export_tensors({"a": flat[:4].view(2, 2), "b": flat[4:]})
    assert len(export.storages) == 1
