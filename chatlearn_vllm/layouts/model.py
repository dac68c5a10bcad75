"""How large is a model: the numbers that its layouts need, from its Hugging Face config.json."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from chatlearn_vllm.layouts.families import (
    DENSE_MLP,
    EMBEDDING,
    FAMILIES,
    FINAL_NORM,
    OUTPUT,
    SCORE,
    Experts,
    Family,
    Head,
    LayerParam,
)
from chatlearn_vllm.layouts.hf_config import model_sizes

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like decoder, dense or with experts."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Of dense layers."""
    num_attention_heads: int
    num_query_groups: int
    """Number of key/value heads."""
    head_dim: int
    vocab_size: int
    """Rows of the Hugging Face embedding, without any engine's padding."""
    tie_word_embeddings: bool
    model_type: str = "llama"
    """Key of `families.FAMILIES`."""
    num_experts: int = 0
    """Per mixture-of-experts layer; 0 for a dense model."""
    moe_ffn_hidden_size: int = 0
    """Of one expert."""
    dense_layers: frozenset[int] = frozenset()
    """Layers without experts, in a model that has experts elsewhere."""
    head: Head = "lm"
    """What it ends with. A scalar head is never tied to the embedding."""

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], head: Head = "lm") -> "ModelShape":
        """Read the sizes from a parsed config.json.

        Args:
            config: that of either kind of model; both have the same keys here.
            head: what the model ends with.

        Raises:
            ValueError: the model type has no layout, or keys are missing or cannot be sizes.
        """
        sizes = model_sizes(config)
        sizes["tie_word_embeddings"] &= head == "lm"
        return cls(**sizes, head=head)

    @property
    def family(self) -> Family:
        """Names of the parameters."""
        return FAMILIES[self.model_type]

    @property
    def has_dense_layers(self) -> bool:
        """Whether a layer has an MLP of `ffn_hidden_size`."""
        return self.family.experts is None or bool(self.dense_layers)

    @property
    def output_tensor(self) -> str:
        """Logical name of what the head holds: the embedding itself where they are tied."""
        if self.head == "scalar":
            return SCORE
        return EMBEDDING if self.tie_word_embeddings else OUTPUT

    def experts_of(self, layer: int) -> Experts | None:
        """Names of a layer's expert weights; None where it has a dense MLP."""
        return None if layer in self.dense_layers else self.family.experts

    def layer_params(self, layer: int) -> tuple[LayerParam, ...]:
        """All parameters of a layer but the expert weights."""
        experts = self.experts_of(layer)
        mlp = DENSE_MLP if experts is None else (experts.router,)
        return (*self.family.attention, *mlp)

    def tensor_names(self) -> Iterator[str]:
        """Names of all logical tensors, in the order of the layers."""
        yield EMBEDDING
        for layer in range(self.num_layers):
            for param in self.layer_params(layer):
                yield from (layer_tensor(layer, name) for name in param.tensors)
            experts = self.experts_of(layer)
            for expert in range(self.num_experts if experts else 0):
                for name in (experts.gate, experts.up, experts.down):
                    yield layer_tensor(layer, name.format(expert=expert))
        yield FINAL_NORM
        if self.output_tensor != EMBEDDING:
            yield self.output_tensor

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a logical tensor.

        Raises:
            KeyError: the model has no such tensor.
        """
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if ".experts." in name:
            rows, columns = self._expert_shapes[last]
        elif last == "gate":
            rows, columns = self.num_experts, self.hidden_size
        else:
            rows, columns = self._shapes[last]
        return (rows,) if kind == "bias" or columns is None else (rows, columns)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, int | None]]:
        """(rows, columns) by the module's last name."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        q_rows = self.num_attention_heads * self.head_dim
        kv_rows = self.num_query_groups * self.head_dim
        return {
            "embed_tokens": (self.vocab_size, hidden),
            "lm_head": (self.vocab_size, hidden),
            "score": (1, hidden),
            "q_proj": (q_rows, hidden),
            "k_proj": (kv_rows, hidden),
            "v_proj": (kv_rows, hidden),
            "o_proj": (hidden, q_rows),
            "gate_proj": (ffn, hidden),
            "up_proj": (ffn, hidden),
            "down_proj": (hidden, ffn),
            "input_layernorm": (hidden, None),
            "post_attention_layernorm": (hidden, None),
            "norm": (hidden, None),
            "q_norm": (self.head_dim, None),
            "k_norm": (self.head_dim, None),
        }

    @cached_property
    def _expert_shapes(self) -> dict[str, tuple[int, int]]:
        hidden, ffn = self.hidden_size, self.moe_ffn_hidden_size
        up, down = (ffn, hidden), (hidden, ffn)
        return {
            "gate_proj": up, "up_proj": up, "down_proj": down, "w1": up, "w3": up, "w2": down,
        }  # fmt: skip


def layer_tensor(layer: int, name: str) -> str:
    """Logical name of a tensor of one decoder layer."""
    return f"model.layers.{layer}.{name}"


def layer_and_expert(tensor: str) -> tuple[int | None, int | None]:
    """Which layer a logical tensor belongs to and which expert in it; None where in none."""
    match = _LAYER.fullmatch(tensor)
    if not match:
        return None, None
    expert = _EXPERT.search(tensor)
    return int(match[1]), int(expert[1]) if expert else None
