"""Which models, spread how over which GPUs, does benchmarks/weight_sync.py measure?"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from chatlearn_vllm.bench.workload import make_model
from chatlearn_vllm.config import JobConfig, load_config

_LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
_QWEN3_30B_A3B = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
}  # fmt: skip
_TINY = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
_TINY_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

SIZES = {
    "real": {"llama": _LLAMA_8B, "qwen3_moe": _QWEN3_30B_A3B},
    "tiny": {"llama": _TINY, "qwen3_moe": _TINY | _TINY_EXPERTS},
}
"""Keys of config.json by size and model type."""


@dataclass(frozen=True)
class Case:
    """A trainer and a rollout; both begin on the first GPU unless `apart`."""

    model_type: str
    trainer_gpus: int
    rollout_gpus: int
    trainer: dict[str, int] = field(default_factory=dict)
    """Parallel sizes: tp, pp, ep; what is left over is data parallel."""
    rollout_tp: int = 1
    apart: bool = False
    """Whether the rollout has GPUs of its own."""

    @property
    def num_gpus(self) -> int:
        """Devices that the case needs."""
        sizes = (self.trainer_gpus, self.rollout_gpus)
        return sum(sizes) if self.apart else max(sizes)

    def describe(self) -> str:
        """The two sides' parallel sizes, for example "tp2 dp2 -> tp4"."""
        tp, pp = self.trainer.get("tp", 1), self.trainer.get("pp", 1)
        sizes = {**self.trainer, "dp": self.trainer_gpus // (tp * pp)}
        trainer = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "tp1"
        replicas = self.rollout_gpus // self.rollout_tp
        rollout = f"{replicas} x tp{self.rollout_tp}" if replicas > 1 else f"tp{self.rollout_tp}"
        return f"{trainer} -> {rollout}" + (", on other GPUs" if self.apart else "")


CASES = {
    "8b-1gpu": Case("llama", 1, 1),
    "8b-2gpu": Case("llama", 2, 2, {"tp": 2}, rollout_tp=2),
    "8b-2gpu-apart": Case("llama", 1, 1, apart=True),
    "8b-2gpu-dp2-tp2": Case("llama", 2, 2, rollout_tp=2),
    "8b-2gpu-tp2-2xtp1": Case("llama", 2, 2, {"tp": 2}),
    "8b-4gpu": Case("llama", 4, 4, {"tp": 2}, rollout_tp=4),
    "8b-4gpu-tp2-tp4": Case("llama", 2, 4, {"tp": 2}, rollout_tp=4),
    "8b-4gpu-tp2pp2-tp4": Case("llama", 4, 4, {"tp": 2, "pp": 2}, rollout_tp=4),
    "8b-4gpu-tp4-2xtp2": Case("llama", 4, 4, {"tp": 4}, rollout_tp=2),
    "8b-4gpu-dp4-tp4": Case("llama", 4, 4, rollout_tp=4),
    "moe-2gpu": Case("qwen3_moe", 2, 2, {"ep": 2}, rollout_tp=2),
    "moe-4gpu": Case("qwen3_moe", 4, 4, {"tp": 2, "ep": 2}, rollout_tp=4),
}
"""By name; the number of GPUs is part of it."""


def make_job(case: Case, size: str, directory: Path) -> JobConfig:
    """Write config.json, a tokenizer and the job's yaml, and read them as a job does.

    Args:
        case: what to spread how.
        size: key of `SIZES`.
        directory: existing and empty.
    """
    config = SIZES[size][case.model_type]
    _make_model(case.model_type, config, directory)
    common = {"load": str(directory), "dtype": "bfloat16", "seq_length": 256, "max_new_tokens": 128}
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "ep": "expert_model_parallel_size",
    }
    trainer = {names[name]: value for name, value in case.trainer.items()}
    engine = {
        "tensor_model_parallel_size": case.rollout_tp, "max_num_seqs": 8, "enforce_eager": True,
    }  # fmt: skip
    if size == "real":
        engine |= {"gpu_memory_utilization": 0.4, "kv_cache_memory_bytes": 2**30}
    job = {
        "models": {
            # Trainable, so that its data parallel ranks are one replica; it gets no optimizer.
            "trainer": {
                "num_gpu": case.trainer_gpus, "trainable": True, "model_args": common | trainer,
            },
            "policy": {"num_gpu": case.rollout_gpus, "model_args": common | engine},
        },
        "runtime": {
            "sample_per_episode": 64, "train_micro_batch_size": 1,
            "output_dir": str(directory), "exp_name": "benchmark",
            "colocation": [] if case.apart else ["trainer,policy"],
        },
    }  # fmt: skip
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return load_config(path)


def _make_model(model_type: str, sizes: dict[str, int], directory: Path) -> None:
    """Write config.json and a tokenizer."""
    from transformers import LlamaConfig, Qwen3MoeConfig

    common: dict[str, Any] = {
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
    }  # fmt: skip
    if model_type == "llama":
        config = LlamaConfig(architectures=["LlamaForCausalLM"], **common, **sizes)
    else:
        config = Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"], **common, **sizes)
    config.save_pretrained(directory)
    written = json.loads((directory / "config.json").read_text())
    assert written["model_type"] == model_type
    make_model(written, directory)
