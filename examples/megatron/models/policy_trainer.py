"""The policy that learns, with megatron-core: the loss of PPO, GRPO and their relatives."""

from typing import Any

import torch

from chatlearn_vllm import MegatronModule
from chatlearn_vllm.algorithms.importance import truncated_weights
from chatlearn_vllm.algorithms.kl import kl_penalty
from chatlearn_vllm.algorithms.policy import policy_loss


class PolicyTrainer(MegatronModule):
    """Clipped policy loss, with KL penalty, entropy bonus and importance weights if asked for."""

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
            logprobs,
            batch["old_logprobs"],
            batch["advantages"],
            mask,
            cliprange=args.cliprange,
            cliprange_high=args.cliprange_high,
            dual_clip=args.dual_clip,
            ratio_level=args.ratio_level,
        )
        if args.tis_imp_ratio_cap is not None:
            weights, weight_sums = truncated_weights(
                batch["old_logprobs"], batch["logprobs"], mask, cap=args.tis_imp_ratio_cap
            )
            token_loss, sums = token_loss * weights, sums | weight_sums
        if "ref_logprobs" in batch:  # otherwise the KL is part of the rewards, or not asked for
            kl = kl_penalty(logprobs, batch["ref_logprobs"], args.kl_estimator, mask=mask)
            token_loss = token_loss + args.init_kl_coef * kl
            sums["kl"] = kl.detach().sum()
        if args.entropy_coef > 0:
            token_loss = token_loss - args.entropy_coef * entropy
        return token_loss, sums
