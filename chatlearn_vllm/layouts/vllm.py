"""How does vLLM store a parameter of a Llama-like model on one tensor parallel rank?"""

import re

from chatlearn_vllm.layouts.blocks import (
    Block,
    ParamLayout,
    Range,
    Rect,
    replicated,
    shard_range,
    vocab_shard,
    whole,
)
from chatlearn_vllm.layouts.model import EMBEDDING, ModelShape

_QKV = re.compile(r"(model\.layers\.\d+\.self_attn)\.qkv_proj\.(weight|bias)")
_GATE_UP = re.compile(r"(model\.layers\.\d+\.mlp)\.gate_up_proj\.weight")
_ROW_PARALLEL = re.compile(r"model\.layers\.\d+\.(self_attn\.o_proj|mlp\.down_proj)\.weight")
_REPLICATED = re.compile(
    r"model\.norm\.weight"
    r"|model\.layers\.\d+\.(input_layernorm|post_attention_layernorm"
    r"|self_attn\.q_norm|self_attn\.k_norm)\.weight"
)


def vllm_param_layout(
    model: ModelShape, name: str, local_shape: tuple[int, ...], tp_rank: int, tp_size: int
) -> ParamLayout:
    """Describe one live parameter of a vLLM worker's model.

    Args:
        model: sizes of the whole model.
        name: name in `model.named_parameters()`; vLLM counts layers over the whole model, so a
            pipeline stage needs no further input.
        local_shape: shape of the parameter on this rank.
        tp_rank: tensor parallel rank.
        tp_size: tensor parallel size.

    Raises:
        ValueError: the name is unknown or the shape contradicts the model.
    """
    if name in (EMBEDDING, "lm_head.weight"):
        tensor = EMBEDDING if name == EMBEDDING else model.output_tensor
        return vocab_shard(name, tensor, model.vocab_size, local_shape, tp_rank)
    if _REPLICATED.fullmatch(name):
        return replicated(name, name, local_shape)
    if _ROW_PARALLEL.fullmatch(name):
        rows, columns = model.tensor_shape(name)
        logical: Rect = ((0, rows), shard_range(columns, tp_rank, tp_size))
        return ParamLayout(name, local_shape, (Block(name, logical, whole(local_shape)),))
    if match := _GATE_UP.fullmatch(name):
        shard = shard_range(model.ffn_hidden_size, tp_rank, tp_size)
        pieces = [(f"{match[1]}.{half}_proj.weight", shard) for half in ("gate", "up")]
        return _stacked(name, local_shape, pieces)
    if match := _QKV.fullmatch(name):
        head = model.head_dim
        first, last = shard_range(model.num_attention_heads, tp_rank, tp_size)
        kv_first, kv_last = _kv_heads(model, tp_rank, tp_size)
        pieces = [
            (f"{match[1]}.q_proj.{match[2]}", (first * head, last * head)),
            (f"{match[1]}.k_proj.{match[2]}", (kv_first * head, kv_last * head)),
            (f"{match[1]}.v_proj.{match[2]}", (kv_first * head, kv_last * head)),
        ]
        return _stacked(name, local_shape, pieces)
    raise ValueError(f"vLLM parameter {name!r} has no layout")


def _kv_heads(model: ModelShape, tp_rank: int, tp_size: int) -> Range:
    """Key/value heads of one rank; with more ranks than heads, neighbours hold the same head."""
    if tp_size <= model.num_query_groups:
        return shard_range(model.num_query_groups, tp_rank, tp_size)
    if tp_size % model.num_query_groups:
        raise ValueError(
            f"{model.num_query_groups} key/value heads cannot be replicated evenly over "
            f"tensor parallel size {tp_size}"
        )
    head = tp_rank // (tp_size // model.num_query_groups)
    return head, head + 1


def _stacked(
    name: str, local_shape: tuple[int, ...], pieces: list[tuple[str, Range]]
) -> ParamLayout:
    """A parameter that stacks one row range of each piece."""
    blocks, at = [], 0
    columns = tuple((0, size) for size in local_shape[1:])
    for tensor, rows in pieces:
        size = rows[1] - rows[0]
        blocks.append(Block(tensor, (rows, *columns), ((at, at + size), *columns)))
        at += size
    return ParamLayout(name, local_shape, tuple(blocks))
