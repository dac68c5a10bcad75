"""The policy that learns, with megatron-core: GRPO's loss."""

from typing import Any

import torch

from chatlearn_vllm import MegatronModule
from chatlearn_vllm.algorithms.grpo import policy_loss
from chatlearn_vllm.algorithms.kl import kl_penalty


class PolicyTrainer(MegatronModule):
    """Clipped policy loss on group advantages, with KL penalty and entropy bonus if asked for."""

    def model_provider(self, *args: Any, **kwargs: Any) -> Any:
        """Build the model that config.json in `load` describes."""
        return super().model_provider(*args, **kwargs)

    def loss(
        self, batch: dict[str, Any], logprobs: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Token losses [b, S'-1] and sums for the metrics."""
        args = self.model_args
        mask = batch["loss_mask"][:, 1:]
        token_loss, sums = policy_loss(
            logprobs, batch["old_logprobs"], batch["advantages"], mask, cliprange=args.cliprange
        )
        if args.init_kl_coef > 0:
            kl = kl_penalty(logprobs, batch["ref_logprobs"], args.kl_estimator)
            token_loss = token_loss + args.init_kl_coef * kl
            sums["kl"] = (kl.detach() * mask).sum()
        if args.entropy_coef > 0:
            token_loss = token_loss - args.entropy_coef * entropy
        return token_loss, sums
