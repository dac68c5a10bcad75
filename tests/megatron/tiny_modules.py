"""Modules on tiny checkpoints, as a job's ranks hold them; `built` is used on the ranks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chatlearn_vllm.config import JobConfig, ModelArgs, ModelConfig, RuntimeConfig
from chatlearn_vllm.modules.megatron_module import MegatronModule


def job(path: Path, world_size: int, trainable: bool = True, **settings: Any) -> JobConfig:
    """A job with the model `trainer`; by default two steps on 4 of 8 samples each.

    `settings` are keys of the model's file, of the model or of the runtime; `tp`, `pp` for short.
    """

    def taken(*keys: str) -> dict[str, Any]:
        return {key: settings.pop(key) for key in keys if key in settings}

    runtime = {"sample_per_episode": 8, "train_global_batch_size": 4} | taken(
        "sample_per_episode", "train_global_batch_size", "train_micro_batch_size",
        "num_training_epoch", "mismatch_stop", "async_save",
    )  # fmt: skip
    model = ModelConfig(
        name="trainer",
        num_gpu=world_size,
        trainable=trainable,
        generation_batch_size=3,
        tensor_model_parallel_size=settings.pop("tp", 1),
        pipeline_model_parallel_size=settings.pop("pp", 1),
        **taken("offload_weights", "free_memory"),
        model_args=ModelArgs(
            load=str(path), **{"dtype": "float32", "lr": 1e-3, "weight_decay": 0.1, **settings}
        ),
    )
    models = {"trainer": model}
    return JobConfig(path="test.yaml", models=models, runtime=RuntimeConfig(**runtime))


@contextmanager
def built(kind: type[MegatronModule], path: Path, **settings: Any) -> Iterator[MegatronModule]:
    """A module on the calling ranks, see `job`; its parallel groups end with the block."""
    module = kind("trainer", job(path, int(os.environ["WORLD_SIZE"]), **settings))
    module.init()
    try:
        module.model_setup()
        yield module
    finally:
        module.shutdown()


def assert_same_metrics(
    found: list[dict[str, float]], expected: list[dict[str, float]], *, rel: float = 2e-4
) -> None:
    """As many steps, with the same metrics of the same values."""
    assert len(found) == len(expected) == 2
    for found_step, expected_step in zip(found, expected, strict=True):
        assert found_step == pytest.approx(expected_step, rel=rel, abs=2e-6)
