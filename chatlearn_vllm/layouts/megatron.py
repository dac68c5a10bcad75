"""How does megatron-core's GPTModel (local layer spec) store a parameter on one rank?"""

import re

from chatlearn_vllm.layouts.blocks import (
    Block,
    ParamLayout,
    Rect,
    replicated,
    shard_range,
    stack_rows,
    vocab_shard,
    whole,
)
from chatlearn_vllm.layouts.model import EMBEDDING, ModelShape, layer_tensor

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

_REPLICATED = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
_ROW_PARALLEL = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


def megatron_param_layout(
    model: ModelShape, name: str, local_shape: tuple[int, ...], tp_rank: int, tp_size: int
) -> ParamLayout:
    """Describe one parameter of a rank's GPTModel.

    Args:
        model: sizes of the whole model.
        name: parameter name in the bare GPTModel, its layer number counted over the whole model
            (`decoder.layers.<global>.…`), so pipeline and virtual stages need no further input.
        local_shape: shape of the parameter on this rank.
        tp_rank: tensor parallel rank.
        tp_size: tensor model parallel size.

    Raises:
        ValueError: the name is unknown or the shape contradicts the model.
    """
    if name == "embedding.word_embeddings.weight":
        return vocab_shard(name, EMBEDDING, model.vocab_size, local_shape, tp_rank)
    if name == "output_layer.weight":
        return vocab_shard(name, model.output_tensor, model.vocab_size, local_shape, tp_rank)
    if name == "decoder.final_layernorm.weight":
        return replicated(name, "model.norm.weight", local_shape)
    match = _LAYER.fullmatch(name)
    if not match:
        raise ValueError(f"megatron-core parameter {name!r} has no layout")
    layer, rest = int(match[1]), match[2]
    if rest in _REPLICATED:
        return replicated(name, layer_tensor(layer, _REPLICATED[rest]), local_shape)
    if rest in _ROW_PARALLEL:
        tensor = layer_tensor(layer, _ROW_PARALLEL[rest])
        rows, columns = model.tensor_shape(tensor)
        logical: Rect = ((0, rows), shard_range(columns, tp_rank, tp_size))
        return ParamLayout(name, local_shape, (Block(tensor, logical, whole(local_shape)),))
    if rest in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        kind = rest.rpartition(".")[2]
        pieces = _query_groups(model, layer, kind)
        rows = sum(stop - start for _, start, stop in pieces)
        columns = (0, model.hidden_size) if kind == "weight" else None
        # More tensor parallel ranks than query groups cut inside a group: still plain row ranges.
        blocks = stack_rows(name, columns, pieces, shard_range(rows, tp_rank, tp_size))
        return ParamLayout(name, local_shape, blocks)
    if rest == "mlp.linear_fc1.weight":
        start, stop = shard_range(model.ffn_hidden_size, tp_rank, tp_size)
        # Each rank stacks its gate shard on its up shard, not a shard of the stacked pair.
        pieces = [
            (layer_tensor(layer, "mlp.gate_proj.weight"), start, stop),
            (layer_tensor(layer, "mlp.up_proj.weight"), start, stop),
        ]
        blocks = stack_rows(name, (0, model.hidden_size), pieces, (0, 2 * (stop - start)))
        return ParamLayout(name, local_shape, blocks)
    raise ValueError(f"megatron-core parameter {name!r} has no layout")


def _query_groups(model: ModelShape, layer: int, kind: str) -> list[tuple[str, int, int]]:
    """Row order of linear_qkv: for each query group its query heads, its key, its value."""
    q, k, v = (layer_tensor(layer, f"self_attn.{c}_proj.{kind}") for c in "qkv")
    per_group = model.num_attention_heads // model.num_query_groups * model.head_dim
    pieces = []
    for group in range(model.num_query_groups):
        pieces.append((q, group * per_group, (group + 1) * per_group))
        pieces.append((k, group * model.head_dim, (group + 1) * model.head_dim))
        pieces.append((v, group * model.head_dim, (group + 1) * model.head_dim))
    return pieces
