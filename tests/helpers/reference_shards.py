"""Parameters of megatron-core and vLLM ranks assembled with torch, independent of the layouts."""

import itertools
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F

from chatlearn_vllm.layouts import ModelShape, RolloutParallel, TrainParallel

FAMILIES = ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe")
EMBEDDING = "model.embed_tokens.weight"

Tensors = dict[str, torch.Tensor]


def tiny_shape(
    family: str = "llama",
    *,
    heads: int = 4,
    groups: int = 2,
    vocab: int = 100,
    tied: bool = False,
    layers: int = 4,
) -> ModelShape:
    """A model small enough to enumerate; head_dim differs from hidden_size / heads.

    Families with experts have six; the second layer of qwen3_moe has none.
    """
    has_experts = family in ("mixtral", "qwen3_moe")
    return ModelShape(
        num_layers=layers, hidden_size=8, ffn_hidden_size=24, num_attention_heads=heads,
        num_query_groups=groups, head_dim=4, vocab_size=vocab, tie_word_embeddings=tied,
        model_type=family, num_experts=6 if has_experts else 0,
        moe_ffn_hidden_size=12 if has_experts else 0,
        dense_layers=frozenset({1}) if family == "qwen3_moe" else frozenset(),
    )  # fmt: skip


def logical_tensors(model: ModelShape) -> Tensors:
    """Every logical tensor; no number occurs twice in the model, and none is zero."""
    numbers = itertools.count(1)
    return {
        name: torch.tensor(list(itertools.islice(numbers, rows * (columns or 1)))).view(
            (rows, columns) if columns else (rows,)
        )
        for name, rows, columns in _sizes(model)
    }


def megatron_tensors(model: ModelShape, t: Tensors, parallel: TrainParallel, rank: int) -> Tensors:
    """megatron-core's parameters on one training rank, layers counted over the whole model."""
    at = parallel.coordinates(rank)
    tp, stage = parallel.tensor, parallel.pipeline - 1
    out: Tensors = {}
    if at.pipeline == 0:
        out["embedding.word_embeddings.weight"] = _padded(t[EMBEDDING], tp).chunk(tp)[at.tensor]
    if at.pipeline == stage:
        out["decoder.final_layernorm.weight"] = t["model.norm.weight"]
        if not model.tie_word_embeddings:
            out["output_layer.weight"] = _padded(t["lm_head.weight"], tp).chunk(tp)[at.tensor]
        elif stage > 0:
            out["output_layer.weight"] = _padded(t[EMBEDDING], tp).chunk(tp)[at.tensor]
    for layer in itertools.chain(*parallel.chunks(model.num_layers)[at.pipeline]):
        hf, own = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in _qkv_kinds(model):
            q, k, v = (
                t[f"{hf}self_attn.{c}_proj.{kind}"].chunk(model.num_query_groups) for c in "qkv"
            )
            rows = torch.cat([part for triple in zip(q, k, v, strict=True) for part in triple])
            out[f"{own}self_attention.linear_qkv.{kind}"] = rows.chunk(tp)[at.tensor]
        output = t[hf + "self_attn.o_proj.weight"].chunk(tp, 1)[at.tensor]
        out[own + "self_attention.linear_proj.weight"] = output
        out[own + "input_layernorm.weight"] = t[hf + "input_layernorm.weight"]
        out[own + "pre_mlp_layernorm.weight"] = t[hf + "post_attention_layernorm.weight"]
        if model.model_type.startswith("qwen3"):
            for c in "qk":
                norm = t[f"{hf}self_attn.{c}_norm.weight"]
                out[f"{own}self_attention.{c}_layernorm.weight"] = norm
        if not _has_experts(model, layer):
            fc1, fc2 = _mlp(t, hf + "mlp.", ("gate_proj", "up_proj", "down_proj"), at.tensor, tp)
            out |= {own + "mlp.linear_fc1.weight": fc1, own + "mlp.linear_fc2.weight": fc2}
            continue
        block, names = _expert_names(model)
        out[own + "mlp.router.weight"] = t[f"{hf}{block}.gate.weight"]
        local_experts = torch.arange(model.num_experts).chunk(parallel.expert)[at.expert].tolist()
        for local, expert in enumerate(local_experts):
            prefix = f"{hf}{block}.experts.{expert}."
            fc1, fc2 = _mlp(t, prefix, names, at.expert_tensor, parallel.etp)
            expert_prefix = f"{own}mlp.experts.local_experts.{local}."
            out |= {
                expert_prefix + "linear_fc1.weight": fc1, expert_prefix + "linear_fc2.weight": fc2
            }  # fmt: skip
    return out


def vllm_tensors(model: ModelShape, t: Tensors, parallel: RolloutParallel, rank: int) -> Tensors:
    """vLLM's parameters on one rank of all replicas."""
    within = rank % (parallel.tensor * parallel.pipeline)
    stage, tp_rank = divmod(within, parallel.tensor)
    tp, last = parallel.tensor, parallel.pipeline - 1
    everywhere = model.num_experts > 0
    out: Tensors = {}
    if everywhere or stage == 0 or (stage == last and model.tie_word_embeddings):
        out[EMBEDDING] = _padded(t[EMBEDDING], 64).chunk(tp)[tp_rank]
    if everywhere or stage == last:
        out["model.norm.weight"] = t["model.norm.weight"]
        if not model.tie_word_embeddings:
            out["lm_head.weight"] = _padded(t["lm_head.weight"], 64).chunk(tp)[tp_rank]
    kv_parts = min(tp, model.num_query_groups)
    kv_rank = tp_rank * kv_parts // tp
    for layer in parallel.stages(model.num_layers)[stage]:
        p = f"model.layers.{layer}."
        for kind in _qkv_kinds(model):
            q, k, v = (t[f"{p}self_attn.{c}_proj.{kind}"] for c in "qkv")
            out[f"{p}self_attn.qkv_proj.{kind}"] = torch.cat(
                [q.chunk(tp)[tp_rank], k.chunk(kv_parts)[kv_rank], v.chunk(kv_parts)[kv_rank]]
            )
        out[p + "self_attn.o_proj.weight"] = t[p + "self_attn.o_proj.weight"].chunk(tp, 1)[tp_rank]
        for norm in _norms(model):
            out[f"{p}{norm}.weight"] = t[f"{p}{norm}.weight"]
        if not _has_experts(model, layer):
            fc1, fc2 = _mlp(t, p + "mlp.", ("gate_proj", "up_proj", "down_proj"), tp_rank, tp)
            out |= {p + "mlp.gate_up_proj.weight": fc1, p + "mlp.down_proj.weight": fc2}
            continue
        block, names = _expert_names(model)
        out[f"{p}{block}.gate.weight"] = t[f"{p}{block}.gate.weight"]
        experts, cut = torch.arange(model.num_experts), (tp_rank, tp)
        if parallel.expert:
            experts, cut = experts.tensor_split(tp)[tp_rank], (0, 1)
        pairs = [_mlp(t, f"{p}{block}.experts.{e}.", names, *cut) for e in experts.tolist()]
        out[f"{p}{block}.experts.routed_experts.w13_weight"] = torch.stack([w for w, _ in pairs])
        out[f"{p}{block}.experts.routed_experts.w2_weight"] = torch.stack([w for _, w in pairs])
    return out


def _sizes(model: ModelShape) -> Iterator[tuple[str, int, int | None]]:
    """Name, rows and columns of the checkpoint's tensors; no columns for a vector."""
    h, hd, ffn = model.hidden_size, model.head_dim, model.ffn_hidden_size
    q_rows, kv_rows = model.num_attention_heads * hd, model.num_query_groups * hd
    yield EMBEDDING, model.vocab_size, h
    yield "model.norm.weight", h, None
    if not model.tie_word_embeddings:
        yield "lm_head.weight", model.vocab_size, h
    for layer in range(model.num_layers):
        p = f"model.layers.{layer}."
        for kind in _qkv_kinds(model):
            columns = h if kind == "weight" else None
            yield f"{p}self_attn.q_proj.{kind}", q_rows, columns
            yield f"{p}self_attn.k_proj.{kind}", kv_rows, columns
            yield f"{p}self_attn.v_proj.{kind}", kv_rows, columns
        yield p + "self_attn.o_proj.weight", h, q_rows
        for norm in _norms(model):
            yield f"{p}{norm}.weight", hd if norm.endswith(("q_norm", "k_norm")) else h, None
        if not _has_experts(model, layer):
            yield p + "mlp.gate_proj.weight", ffn, h
            yield p + "mlp.up_proj.weight", ffn, h
            yield p + "mlp.down_proj.weight", h, ffn
            continue
        block, (gate, up, down) = _expert_names(model)
        yield f"{p}{block}.gate.weight", model.num_experts, h
        for expert in range(model.num_experts):
            yield f"{p}{block}.experts.{expert}.{gate}.weight", model.moe_ffn_hidden_size, h
            yield f"{p}{block}.experts.{expert}.{up}.weight", model.moe_ffn_hidden_size, h
            yield f"{p}{block}.experts.{expert}.{down}.weight", h, model.moe_ffn_hidden_size


def _mlp(
    t: Tensors, prefix: str, names: Iterable[str], part: int, num_parts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate on up, and down, of one part of a gated MLP."""
    gate, up, down = (t[f"{prefix}{name}.weight"] for name in names)
    fc1 = torch.cat([gate.chunk(num_parts)[part], up.chunk(num_parts)[part]])
    return fc1, down.chunk(num_parts, 1)[part]


def _expert_names(model: ModelShape) -> tuple[str, tuple[str, str, str]]:
    """The block of a layer that holds the experts; their gate, up and down weights."""
    if model.model_type == "mixtral":
        return "block_sparse_moe", ("w1", "w3", "w2")
    return "mlp", ("gate_proj", "up_proj", "down_proj")


def _has_experts(model: ModelShape, layer: int) -> bool:
    return model.num_experts > 0 and layer not in model.dense_layers


def _qkv_kinds(model: ModelShape) -> tuple[str, ...]:
    return ("weight", "bias") if model.model_type == "qwen2" else ("weight",)


def _norms(model: ModelShape) -> tuple[str, ...]:
    norms = ("input_layernorm", "post_attention_layernorm")
    if model.model_type.startswith("qwen3"):
        norms += ("self_attn.q_norm", "self_attn.k_norm")
    return norms


def _padded(weight: torch.Tensor, multiple: int) -> torch.Tensor:
    return F.pad(weight, (0, 0, 0, -weight.size(0) % multiple))
