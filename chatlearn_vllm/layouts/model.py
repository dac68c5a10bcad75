"""How large is a model: the numbers that its layouts need, from its Hugging Face config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3")
"""Hugging Face `model_type`s whose weights these layouts describe."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense Llama-like decoder."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Number of key/value heads."""
    head_dim: int
    vocab_size: int
    """Rows of the Hugging Face embedding, without any engine's padding."""
    tie_word_embeddings: bool

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Read the sizes from a parsed config.json.

        Raises:
            ValueError: the model type has no layout, or a needed key is missing.
        """
        model_type = config.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise ValueError(
                f"config.json: model_type={model_type!r} has no weight layout; "
                f"supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        needed = (
            "num_hidden_layers", "hidden_size", "intermediate_size",
            "num_attention_heads", "vocab_size",
        )  # fmt: skip
        missing = [key for key in needed if config.get(key) is None]
        if missing:
            raise ValueError(f"config.json: missing {', '.join(missing)} (model_type {model_type})")
        heads = config["num_attention_heads"]
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def output_tensor(self) -> str:
        """Logical name of the output projection: the embedding itself where they are tied."""
        return EMBEDDING if self.tie_word_embeddings else "lm_head.weight"

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a logical tensor.

        Raises:
            KeyError: the model has no such tensor.
        """
        if name in (EMBEDDING, "lm_head.weight"):
            return (self.vocab_size, self.hidden_size)
        q_rows, kv_rows = (
            self.num_attention_heads * self.head_dim,
            self.num_query_groups * self.head_dim,
        )
        rows = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
        module, _, kind = name.rpartition(".")
        last = module.rpartition(".")[2]
        if last in rows:
            return (rows[last], self.hidden_size) if kind == "weight" else (rows[last],)
        shapes = {
            "o_proj": (self.hidden_size, q_rows),
            "gate_proj": (self.ffn_hidden_size, self.hidden_size),
            "up_proj": (self.ffn_hidden_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.ffn_hidden_size),
            "input_layernorm": (self.hidden_size,),
            "post_attention_layernorm": (self.hidden_size,),
            "norm": (self.hidden_size,),
            "q_norm": (self.head_dim,),
            "k_norm": (self.head_dim,),
        }
        return shapes[last]


EMBEDDING = "model.embed_tokens.weight"


def layer_tensor(layer: int, name: str) -> str:
    """Logical name of a tensor of one decoder layer."""
    return f"model.layers.{layer}.{name}"
