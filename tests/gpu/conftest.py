"""Sizes for a GPU, and how many there are."""

import pytest
import torch

LLAMA_100M = dict(
    hidden_size=768, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=12,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=2048, initializer_range=0.02,
)  # fmt: skip
"""A Llama of 113 million parameters beside its embeddings."""


@pytest.fixture
def two_gpus() -> None:
    """For tests that need two devices."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
