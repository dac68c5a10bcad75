"""Which model and which prompts does every case get?"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatlearn_vllm.bench.options import BenchOptions
from chatlearn_vllm.config.model_files import read_json_object

NUM_SPECIAL = 3
"""<pad>=0, <s>=1, </s>=2 of a made tokenizer."""

_TINY = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "tie_word_embeddings": False,
}  # fmt: skip
_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
_SIZES = {"tiny": _TINY, "1b": _1B, "8b": _8B}
"""tiny: for CPUs; 1b, 8b: those of Llama 3.2 1B and Llama 3.1 8B."""

# Beside them lie training_args.bin, adapter_model.safetensors and others that are no model.
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "consolidated*.safetensors")
_TOKENIZERS = (
    "tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json",
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    text: str
    """What it says; a name where its tokens are random."""
    token_ids: list[int]


def made_config(shape: str, max_position_embeddings: int) -> dict[str, Any]:
    """The config.json of a Llama.

    Args:
        shape: one of options.SHAPES.
        max_position_embeddings: longest sequence, in tokens.
    """
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "initializer_range": 0.02, "max_position_embeddings": max_position_embeddings,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": True,
        "dtype": "bfloat16", **_SIZES[shape],
    }  # fmt: skip


def make_model(config: dict[str, Any], directory: Path) -> None:
    """Write config.json and a tokenizer, without weights.

    Args:
        config: of `made_config`.
        directory: to be made.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    _make_tokenizer(directory, config["vocab_size"])


def _make_tokenizer(directory: Path, vocab_size: int) -> None:
    """One token per byte, then words, so that each id of the vocabulary has a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", *letters]
    tokens += [f"Ġw{number}" for number in range(vocab_size - len(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "pad_token": "<pad>", "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def config_of(options: BenchOptions) -> dict[str, Any]:
    """The config.json of the model that is given, or will be made."""
    if options.model is not None:
        return model_config(Path(options.model))
    drafts = 2 * (options.num_speculative_tokens + 1)  # room behind the longest sequence
    return made_config(options.shape, max(options.seq_length + drafts, 2 * options.max_tokens))


@contextlib.contextmanager
def model_dir(options: BenchOptions, out: Path) -> Iterator[Path]:
    """The directory of the model, there for the time of the context where none was given."""
    if options.model is not None:
        yield Path(options.model).resolve()
        return
    # A new name: what stands in the directory of results is the user's.
    directory = Path(tempfile.mkdtemp(prefix=f"model-{options.shape}-", dir=out)).resolve()
    try:
        make_model(config_of(options), directory)
        yield directory
    finally:
        shutil.rmtree(directory)


def has_weights(directory: Path) -> bool:
    """Whether a model's directory holds weights; without, they are random."""
    return any(next(directory.glob(pattern), None) for pattern in _WEIGHTS)


def has_tokenizer(directory: Path) -> bool:
    """Whether a model's directory holds a tokenizer, of whatever kind."""
    return any(next(directory.glob(pattern), None) for pattern in _TOKENIZERS)


def model_config(directory: Path) -> dict[str, Any]:
    """The parsed config.json."""
    return read_json_object(directory / "config.json")


def prompts_of_pass(options: BenchOptions, directory: Path, number: int) -> list[Prompt]:
    """The prompts of one pass; those of different passes differ, so no cache knows them.

    Args:
        options: number, length and source of prompts.
        directory: of the model, whose tokenizer reads texts.
        number: of the pass.
    """
    if options.prompt_file is not None:
        return _read_prompts(options, directory, number)
    vocab_size = model_config(directory)["vocab_size"]
    rng = random.Random(f"{options.seed}/{number}")
    return [
        Prompt(
            f"pass {number}, prompt {row}",
            [rng.randrange(NUM_SPECIAL, vocab_size) for _ in range(options.prompt_tokens)],
        )
        for row in range(options.prompts)
    ]


def latency_prompts(options: BenchOptions, directory: Path) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to be answered one by one, and those of the pass to be answered together.

    No earlier pass has any of them: else the time to first token would be the prefix cache's.
    """
    together = options.repeat + options.warmup
    alone: list[Prompt] = []
    for number in itertools.count(together + 1):
        if len(alone) >= options.latency_requests:
            break
        alone += prompts_of_pass(options, directory, number)
    return alone[: options.latency_requests], prompts_of_pass(options, directory, together)


def num_prompts_needed(options: BenchOptions) -> int:
    """How many different prompts a case of vLLM answers."""
    num_passes = options.repeat + options.warmup + (options.latency_requests > 0)
    return num_passes * options.prompts + options.latency_requests


def _read_prompts(options: BenchOptions, directory: Path, number: int) -> list[Prompt]:
    from transformers import AutoTokenizer

    from chatlearn_vllm.data.prompts import load_prompts

    texts = [record["prompt"] for record in load_prompts(options.prompt_file)]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    start = number * options.prompts
    chosen = [texts[(start + row) % len(texts)] for row in range(options.prompts)]
    # Their ends: there stands what the model has to answer.
    return [Prompt(text, tokenizer.encode(text)[-options.prompt_tokens :]) for text in chosen]
