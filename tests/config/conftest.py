"""A directory of yaml files to write a job into."""

from collections.abc import Callable
from pathlib import Path

import pytest

Write = Callable[[str, str], Path]

JOB = """
models:
  policy: {num_gpu: 2, model_config_file: policy.yaml}
  reward: {num_cpu: 1}
  policy_trainer: {num_gpu: 2, trainable: True}
runtime:
  sample_per_episode: 16
  train_micro_batch_size: 2
  train_global_batch_size: 8
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file below the test's own directory."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def job(write: Write) -> Path:
    """A job without errors; tests break it by overrides or by rewriting policy.yaml."""
    write("policy.yaml", "seq_length: 64\nmax_new_tokens: 32\n")
    return write("job.yaml", JOB)
