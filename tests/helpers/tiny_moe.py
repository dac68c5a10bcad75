"""Tiny Hugging Face checkpoints with experts: real Mixtral and Qwen3-MoE weights."""

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.helpers.tiny_llama import save_character_tokenizer


def save_tiny_moe(directory: Path, family: str, *, seed: int = 0, **config: Any) -> Path:
    """Write a three-layer, float32 model of six experts; `config` changes sizes.

    Args:
        directory: is made.
        family: mixtral, or qwen3_moe, whose middle layer has no experts.
        seed: of the weights; norm weights are not all one.
        config: over the sizes here.
    """
    directory.mkdir(parents=True)
    save_character_tokenizer(directory)
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2, rms_norm_eps=1e-5,
        num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    if family == "mixtral":
        made = transformers.MixtralConfig(**(sizes | {"num_local_experts": 6} | config))
        model = transformers.MixtralForCausalLM(made)
    else:
        experts = {"num_experts": 6, "moe_intermediate_size": 48, "mlp_only_layers": [1]}
        made = transformers.Qwen3MoeConfig(**(sizes | experts | {"norm_topk_prob": True} | config))
        model = transformers.Qwen3MoeForCausalLM(made)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.float().save_pretrained(directory)
    return directory
