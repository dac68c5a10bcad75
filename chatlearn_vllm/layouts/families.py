"""How are a model family's parameters called on each side, and which tensors do they hold?

One line per parameter of a decoder layer: megatron-core's name, vLLM's name, the tensors of the
Hugging Face checkpoint, and how the parameter is cut over ranks. `megatron.py` and `vllm.py` know
what each `Cut` means on their side; so a new dense family is a table of names.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

Head = Literal["lm", "scalar"]
"""What a model ends with: logits of the vocabulary, or one number per token (a value or reward
model, Hugging Face's `*ForSequenceClassification` with one label)."""

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
SCORE = "score.weight"
FINAL_NORM = "model.norm.weight"


class Cut(Enum):
    """How a parameter is cut over tensor parallel ranks."""

    NONE = auto()
    """Every rank holds all of it."""
    COLUMNS = auto()
    """Second dimension: the input of a row parallel linear layer."""
    QKV = auto()
    """Query, key and value rows, by heads; weight or bias."""
    GATE_UP = auto()
    """Gate and up rows of a gated MLP, each cut on its own."""


@dataclass(frozen=True)
class LayerParam:
    """One parameter of a decoder layer; names without the layer's prefix."""

    megatron: str
    """Below `decoder.layers.<n>.`."""
    vllm: str
    """Below `model.layers.<n>.`."""
    tensors: tuple[str, ...]
    """Below `model.layers.<n>.` in the Hugging Face checkpoint; stacked in this order."""
    cut: Cut = Cut.NONE


@dataclass(frozen=True)
class Experts:
    """The expert weights of a mixture-of-experts layer: one MLP per expert."""

    router: LayerParam
    vllm_w13: str
    """Gate and up of all local experts, [experts, 2 x ffn, hidden]."""
    vllm_w2: str
    """Down of all local experts, [experts, hidden, ffn]."""
    gate: str
    """Checkpoint name below `model.layers.<n>.`, with `{expert}`."""
    up: str
    down: str


@dataclass(frozen=True)
class Family:
    """The layers of a model family."""

    attention: tuple[LayerParam, ...]
    """Attention and norms: in every layer."""
    experts: Experts | None = None
    """None for a dense family."""

    @property
    def vllm_ends_on_every_stage(self) -> bool:
        """Whether vLLM makes embedding, final norm and output layer on every pipeline stage.

        It does so for families with experts; the copies on stages in between are never used.
        """
        return self.experts is not None


def _same(megatron: str, name: str) -> LayerParam:
    """A parameter that vLLM calls as the checkpoint does, whole on every rank."""
    return LayerParam(megatron, name, (name,))


def _qkv(kind: str) -> LayerParam:
    return LayerParam(
        f"self_attention.linear_qkv.{kind}",
        f"self_attn.qkv_proj.{kind}",
        tuple(f"self_attn.{c}_proj.{kind}" for c in "qkv"),
        Cut.QKV,
    )


_LLAMA = (
    _qkv("weight"),
    LayerParam(
        "self_attention.linear_proj.weight",
        "self_attn.o_proj.weight",
        ("self_attn.o_proj.weight",),
        Cut.COLUMNS,
    ),
    _same("input_layernorm.weight", "input_layernorm.weight"),
    _same("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
)
_QK_NORM = (
    _same("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    _same("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
)

DENSE_MLP = (
    LayerParam(
        "mlp.linear_fc1.weight",
        "mlp.gate_up_proj.weight",
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        Cut.GATE_UP,
    ),
    LayerParam(
        "mlp.linear_fc2.weight", "mlp.down_proj.weight", ("mlp.down_proj.weight",), Cut.COLUMNS
    ),
)
"""The MLP of every layer that has no experts."""


def _experts(block: str, gate: str, up: str, down: str) -> Experts:
    return Experts(
        router=_same("mlp.router.weight", f"{block}.gate.weight"),
        vllm_w13=f"{block}.experts.routed_experts.w13_weight",
        vllm_w2=f"{block}.experts.routed_experts.w2_weight",
        gate=f"{block}.experts.{{expert}}.{gate}.weight",
        up=f"{block}.experts.{{expert}}.{up}.weight",
        down=f"{block}.experts.{{expert}}.{down}.weight",
    )


FAMILIES = {
    "llama": Family(_LLAMA),
    "qwen2": Family((*_LLAMA, _qkv("bias"))),
    "qwen3": Family((*_LLAMA, *_QK_NORM)),
    "mixtral": Family(_LLAMA, _experts("block_sparse_moe", "w1", "w3", "w2")),
    "qwen3_moe": Family((*_LLAMA, *_QK_NORM), _experts("mlp", "gate_proj", "up_proj", "down_proj")),
}
"""By Hugging Face `model_type`."""
