"""Tiny Hugging Face checkpoints made on the spot: real Llama weights and a real tokenizer."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def save_tiny_llama(
    directory: Path, *, tied: bool = False, vocab_size: int = 100, seed: int = 0, **config: Any
):
    """Write a two-layer, float32 Llama with one token per printable character.

    Grouped-query attention (4 heads, 2 key/value heads), head_dim 32 (the least vLLM's CPU
    attention takes), norm weights that are not all one; `config` changes sizes. Returns the model.
    """
    save_character_tokenizer(directory)
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied,
        initializer_range=0.2, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(sizes | config))).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def save_character_tokenizer(directory: Path) -> None:
    """Write a tokenizer with <pad>=0, <s>=1, </s>=2 and one token per printable ASCII character."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters = [byte_level.pre_tokenize_str(chr(code))[0][0] for code in range(32, 127)]
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)
