"""The roles of a small GRPO job: the example's policy and trainer, and a reward made for tests."""

from typing import Any

import torch

from chatlearn_vllm import BaseModule
from examples.megatron.models.vllm_policy_inference import VLLMPolicyInference


class CountingPolicy(VLLMPolicyInference):
    """The example's policy, which counts its scheduler steps."""

    steps = 0

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> Any:
        """Count and run the step."""
        self.steps += 1
        return super().forward_step(data, iteration)


class DigitReward(BaseModule):
    """Share of digits among the characters of a response, which any policy can learn to raise."""

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        """`rewards` [B] in [0, 1]."""
        shares = [
            sum(c.isdigit() for c in text) / max(1, len(text)) for text in data["str_outputs"]
        ]
        assert len(data["note"]) == len(shares)  # extra fields of the prompts travel along
        return {"rewards": torch.tensor(shares)}
