"""Parameters of megatron-core and vLLM ranks assembled with torch, independent of the layouts."""

import torch
import torch.nn.functional as F

from chatlearn_vllm.layouts import ModelShape
from chatlearn_vllm.layouts.model import EMBEDDING


def tiny_shape(
    heads: int, groups: int, vocab: int = 128, tied: bool = False, layers: int = 2
) -> ModelShape:
    """A model small enough to enumerate; head_dim differs from hidden_size / heads."""
    return ModelShape(
        num_layers=layers, hidden_size=32, ffn_hidden_size=48, num_attention_heads=heads,
        num_query_groups=groups, head_dim=16, vocab_size=vocab, tie_word_embeddings=tied,
    )  # fmt: skip


def logical_tensors(shape: ModelShape, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every logical tensor with distinct random values."""
    g = torch.Generator().manual_seed(seed)
    h, hd = shape.hidden_size, shape.head_dim
    sizes = {EMBEDDING: (shape.vocab_size, h), "model.norm.weight": (h,)}
    if not shape.tie_word_embeddings:
        sizes["lm_head.weight"] = (shape.vocab_size, h)
    for i in range(shape.num_layers):
        p = f"model.layers.{i}."
        sizes |= {
            p + "self_attn.q_proj.weight": (shape.num_attention_heads * hd, h),
            p + "self_attn.k_proj.weight": (shape.num_query_groups * hd, h),
            p + "self_attn.v_proj.weight": (shape.num_query_groups * hd, h),
            p + "self_attn.o_proj.weight": (h, shape.num_attention_heads * hd),
            p + "mlp.gate_proj.weight": (shape.ffn_hidden_size, h),
            p + "mlp.up_proj.weight": (shape.ffn_hidden_size, h),
            p + "mlp.down_proj.weight": (h, shape.ffn_hidden_size),
            p + "input_layernorm.weight": (h,),
            p + "post_attention_layernorm.weight": (h,),
            p + "self_attn.q_proj.bias": (shape.num_attention_heads * hd,),
            p + "self_attn.k_proj.bias": (shape.num_query_groups * hd,),
            p + "self_attn.v_proj.bias": (shape.num_query_groups * hd,),
            p + "self_attn.q_norm.weight": (hd,),
        }
    return {name: torch.randn(size, generator=g) for name, size in sizes.items()}


def _vocab(w: torch.Tensor, multiple: int) -> torch.Tensor:
    return F.pad(w, (0, 0, 0, -w.size(0) % multiple))


def _output(shape: ModelShape, t: dict[str, torch.Tensor]) -> torch.Tensor:
    return t[EMBEDDING] if shape.tie_word_embeddings else t["lm_head.weight"]


def megatron_shards(
    shape: ModelShape, t: dict[str, torch.Tensor], rank: int, tp: int, layers: range | None = None
) -> dict[str, torch.Tensor]:
    """megatron-core's parameters on one tensor parallel rank, for the given layers."""
    out = {
        "embedding.word_embeddings.weight": _vocab(t[EMBEDDING], tp).chunk(tp)[rank],
        "output_layer.weight": _vocab(_output(shape, t), tp).chunk(tp)[rank],
        "decoder.final_layernorm.weight": t["model.norm.weight"],
    }
    groups = shape.num_query_groups
    for i in layers if layers is not None else range(shape.num_layers):
        h, m = f"model.layers.{i}.", f"decoder.layers.{i}."
        for kind in ("weight", "bias"):
            q, k, v = (t[f"{h}self_attn.{c}_proj.{kind}"].chunk(groups) for c in "qkv")
            rows = [part for triple in zip(q, k, v, strict=True) for part in triple]
            out[f"{m}self_attention.linear_qkv.{kind}"] = torch.cat(rows).chunk(tp)[rank]
        gate, up = (t[f"{h}mlp.{c}_proj.weight"].chunk(tp)[rank] for c in ("gate", "up"))
        out[m + "mlp.linear_fc1.weight"] = torch.cat([gate, up])
        out[m + "mlp.linear_fc2.weight"] = t[h + "mlp.down_proj.weight"].chunk(tp, 1)[rank]
        out[m + "self_attention.linear_proj.weight"] = t[h + "self_attn.o_proj.weight"].chunk(
            tp, 1
        )[rank]
        out[m + "input_layernorm.weight"] = t[h + "input_layernorm.weight"]
        out[m + "pre_mlp_layernorm.weight"] = t[h + "post_attention_layernorm.weight"]
        out[m + "self_attention.q_layernorm.weight"] = t[h + "self_attn.q_norm.weight"]
    return out


def vllm_shards(
    shape: ModelShape, t: dict[str, torch.Tensor], rank: int, tp: int, layers: range | None = None
) -> dict[str, torch.Tensor]:
    """vLLM's parameters on one tensor parallel rank, for the given layers."""
    out = {
        EMBEDDING: _vocab(t[EMBEDDING], 64).chunk(tp)[rank],
        "model.norm.weight": t["model.norm.weight"],
    }
    if not shape.tie_word_embeddings:
        out["lm_head.weight"] = _vocab(t["lm_head.weight"], 64).chunk(tp)[rank]
    kv_parts = min(tp, shape.num_query_groups)
    kv_rank = rank * kv_parts // tp
    for i in layers if layers is not None else range(shape.num_layers):
        p = f"model.layers.{i}."
        for kind in ("weight", "bias"):
            q, k, v = (t[f"{p}self_attn.{c}_proj.{kind}"] for c in "qkv")
            out[f"{p}self_attn.qkv_proj.{kind}"] = torch.cat(
                [q.chunk(tp)[rank], k.chunk(kv_parts)[kv_rank], v.chunk(kv_parts)[kv_rank]]
            )
        out[p + "self_attn.o_proj.weight"] = t[p + "self_attn.o_proj.weight"].chunk(tp, 1)[rank]
        gate, up = (t[f"{p}mlp.{c}_proj.weight"].chunk(tp)[rank] for c in ("gate", "up"))
        out[p + "mlp.gate_up_proj.weight"] = torch.cat([gate, up])
        out[p + "mlp.down_proj.weight"] = t[p + "mlp.down_proj.weight"].chunk(tp, 1)[rank]
        for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm"):
            out[f"{p}{norm}.weight"] = t[f"{p}{norm}.weight"]
    return out
