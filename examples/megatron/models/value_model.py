"""The value model of PPO, with megatron-core: a frozen copy that scores, and one that learns."""

from typing import Any

import torch

from chatlearn_vllm import ValueModule
from chatlearn_vllm.algorithms.value import value_loss


class ValueInference(ValueModule):
    """Scores responses before they are trained on; gets the weights of the one that learns."""


class ValueTrainer(ValueModule):
    """Learns to predict returns."""

    def loss(
        self, batch: dict[str, Any], values: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Token losses [b, S'-1] and sums for the metrics."""
        return value_loss(
            values,
            batch["values"],
            batch["returns"],
            batch["loss_mask"][:, 1:],
            cliprange=self.model_args.cliprange_value,
        )
