"""Where does the demo's model come from? There is no hub: this script makes one.

python examples/megatron/make_tiny_llama.py --out DIR [--preset demo|100m|1b] [--init-weights] ...

Writes a Hugging Face directory: config.json and generation_config.json of a Llama, its tokenizer
(tokenizer.model is the sentencepiece model, tokenizer.json the same for `transformers` and vLLM),
and with `--init-weights` random weights. Without weights, training starts from random ones.

The tokenizer is trained on the problems of examples/megatron/data/. Each character of arithmetic
is a token, all other text falls back to its bytes. It puts a BOS (id 1) before a text unless told
otherwise, and no EOS (id 2) behind it.
"""

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA_DIR = Path(__file__).with_name("data")

CHARACTERS = "0123456789+-*/=() .,:;?!<>%^_"
"""With 256 bytes and 3 special tokens a vocabulary of 288 = 32 * 9: no padding for TP up to 32."""

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2

# vLLM's CPU attention takes a head size of 32, 64, 80, 96, ... only.
PRESETS = {
    # 1.1 M parameters: learns two-digit sums within minutes on two CPU cores.
    "demo": {
        "hidden_size": 128,
        "num_layers": 4,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 32,
        "ffn_hidden_size": 576,
        "max_position_embeddings": 64,
    },
    # 104 M parameters: for a GPU.
    "100m": {
        "hidden_size": 768,
        "num_layers": 12,
        "num_attention_heads": 12,
        "num_query_groups": 4,
        "head_dim": 64,
        "ffn_hidden_size": 3072,
        "max_position_embeddings": 1024,
    },
    # 1.03 B parameters: the layers of Llama-3.2-1B, 17 of them, as the vocabulary is so small.
    "1b": {
        "hidden_size": 2048,
        "num_layers": 17,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "head_dim": 64,
        "ffn_hidden_size": 8192,
        "max_position_embeddings": 2048,
    },
}


def main() -> None:
    """Read the command line and write the directory."""
    args = _parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(args.out, model_max_length=args.max_position_embeddings)
    write_model(args.out, args)
    print(f"wrote {args.out}: {count_parameters(args) / 1e6:.2f} M parameters")


def write_tokenizer(out: Path, model_max_length: int) -> None:
    """Train the tokenizer and write it in both forms."""
    import sentencepiece
    from transformers import LlamaTokenizer

    vocab_size = 3 + 256 + len(CHARACTERS)
    model = io.BytesIO()
    # Byte-pair encoding whose vocabulary is full before the first merge: one token per character.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_corpus(),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=-1,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    (out / "tokenizer.model").write_bytes(model.getvalue())

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = LlamaTokenizer(
        vocab={pieces.id_to_piece(index): index for index in range(vocab_size)},
        merges=[],
        add_prefix_space=False,
        add_bos_token=True,
        add_eos_token=False,
        model_max_length=model_max_length,
    )
    tokenizer.save_pretrained(out)


def write_model(out: Path, args: argparse.Namespace) -> None:
    """Write config.json, generation_config.json and, on request, random weights."""
    from transformers import GenerationConfig, LlamaConfig

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=3 + 256 + len(CHARACTERS),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_query_groups,
        head_dim=args.head_dim,
        intermediate_size=args.ffn_hidden_size,
        max_position_embeddings=args.max_position_embeddings,
        initializer_range=0.02,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        dtype="bfloat16" if args.bf16 else "float32",
    )
    if args.init_weights:
        import torch
        from transformers import LlamaForCausalLM

        torch.manual_seed(args.seed)
        LlamaForCausalLM(config).to(config.dtype).save_pretrained(out)
    config.save_pretrained(out)
    GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID).save_pretrained(out)


def count_parameters(args: argparse.Namespace) -> int:
    """Number of parameters of the model described by the arguments."""
    vocab_size = 3 + 256 + len(CHARACTERS)
    heads = 2 * args.num_attention_heads + 2 * args.num_query_groups
    attention = args.hidden_size * args.head_dim * heads
    mlp = 3 * args.hidden_size * args.ffn_hidden_size
    layer = attention + mlp + 2 * args.hidden_size
    return args.num_layers * layer + (2 * vocab_size + 1) * args.hidden_size


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a small Llama and its tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    for name, default in PRESETS["demo"].items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, help=f"overrides the preset (demo: {default})")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 weights, else float32")
    parser.add_argument("--init-weights", action="store_true", help="write random weights too")
    parser.add_argument("--seed", type=int, default=42, help="of the random weights")
    args = parser.parse_args()
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def _corpus() -> Iterator[str]:
    """All problems, then each character on its own so that none is missing."""
    for name in ("eval", "sft", "train"):
        for line in (DATA_DIR / f"arithmetic_{name}.jsonl").read_text().splitlines():
            record: dict[str, Any] = json.loads(line)
            yield record["prompt"] + record["answer"]
    yield from CHARACTERS


if __name__ == "__main__":
    main()
