"""Are the two layouts right? Compared with parameters assembled by hand from logical tensors."""

import pytest
import torch

from chatlearn_vllm.layouts import (
    Block,
    ModelShape,
    ParamLayout,
    megatron_param_layout,
    vllm_param_layout,
)
from tests.helpers.reference_shards import (
    logical_tensors,
    megatron_shards,
    tiny_shape,
    vllm_shards,
)

SHAPES = {
    "grouped-query": tiny_shape(heads=4, groups=2),
    "multi-head": tiny_shape(heads=4, groups=4),
    "one key/value head": tiny_shape(heads=4, groups=1),
    "odd vocabulary": tiny_shape(heads=4, groups=2, vocab=125),
    "tied": tiny_shape(heads=4, groups=2, tied=True),
}


def assemble(layout: ParamLayout, logical: dict[str, torch.Tensor]) -> torch.Tensor:
    out = torch.zeros(layout.shape)
    for block in layout.blocks:
        local = tuple(slice(*r) for r in block.local)
        out[local] = logical[block.tensor][tuple(slice(*r) for r in block.logical)]
    return out


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_megatron_layout_gives_the_parameters_that_megatron_stores(name: str, tp_size: int) -> None:
    shape = SHAPES[name]
    logical = logical_tensors(shape)
    for tp_rank in range(tp_size):
        for param, want in megatron_shards(shape, logical, tp_rank, tp_size).items():
            layout = megatron_param_layout(shape, param, tuple(want.shape), tp_rank, tp_size)
            assert torch.equal(assemble(layout, logical), want), param


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_vllm_layout_gives_the_parameters_that_vllm_stores(name: str, tp_size: int) -> None:
    shape = SHAPES[name]
    logical = logical_tensors(shape)
    for tp_rank in range(tp_size):
        for param, want in vllm_shards(shape, logical, tp_rank, tp_size).items():
            layout = vllm_param_layout(shape, param, tuple(want.shape), tp_rank, tp_size)
            assert torch.equal(assemble(layout, logical), want), param


def test_a_parameter_with_a_hole_is_refused() -> None:
    with pytest.raises(ValueError, match=r"p \(4,\): 1 elements in no block"):
        ParamLayout("p", (4,), (Block("t", ((0, 3),), ((0, 3),)),))


def test_a_parameter_written_twice_is_refused() -> None:
    twice = (Block("t", ((0, 3),), ((0, 3),)), Block("t", ((0, 2),), ((2, 4),)))
    with pytest.raises(ValueError, match="overlap"):
        ParamLayout("p", (4,), twice)


def test_unknown_parameters_are_named() -> None:
    shape = SHAPES["tied"]
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.mlp\.router"):
        megatron_param_layout(shape, "decoder.layers.0.mlp.router.weight", (4, 4), 0, 1)
    with pytest.raises(ValueError, match=r"mlp\.gate\.weight"):
        vllm_param_layout(shape, "model.layers.0.mlp.gate.weight", (4, 4), 0, 1)


def test_a_shape_that_contradicts_the_model_is_refused() -> None:
    shape = SHAPES["grouped-query"]
    with pytest.raises(ValueError, match="elements in no block|is not inside"):
        vllm_param_layout(shape, "model.layers.0.self_attn.qkv_proj.weight", (9, 32), 0, 1)


def test_an_unsupported_model_type_names_those_with_a_layout() -> None:
    with pytest.raises(ValueError, match=r"model_type='mamba'.*llama, qwen2, qwen3"):
        ModelShape.from_hf_config({"model_type": "mamba"})
