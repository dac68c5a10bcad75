"""A reward that is a rule: does the response state the right number?"""

from typing import Any

import torch

from chatlearn_vllm import BaseModule
from examples.megatron.data.arithmetic import score


class ArithmeticReward(BaseModule):
    """Compares each response with the `answer` field of its prompt's record; CPU only."""

    def forward_step(self, data: dict[str, Any], iteration: int = 0) -> dict[str, Any]:
        """1.0 for a right answer, else 0.0, as `rewards` and `accuracy` [B]."""
        pairs = zip(data["str_outputs"], data["answer"], strict=True)
        right = torch.tensor([score(response, answer) for response, answer in pairs])
        return {"rewards": right, "accuracy": right}
