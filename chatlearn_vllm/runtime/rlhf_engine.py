"""What is trained on in reinforcement learning from human feedback with PPO?

The flow of L. Ouyang et al. 2022, "Training language models to follow instructions with human
feedback", arXiv:2203.02155, section 3.5; docs/algorithms/ppo.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from chatlearn_vllm.algorithms.gae import gae, moments, token_rewards, whiten
from chatlearn_vllm.algorithms.kl import AdaptiveKL, FixedKL, kl_penalty
from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.data.batch import Batch, batch_size
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.runtime.algorithm_checks import check_ppo_keys, warn_of_temperatures
from chatlearn_vllm.runtime.grpo_engine import needed_reference
from chatlearn_vllm.runtime.rollout_engine import RolloutEngine
from chatlearn_vllm.runtime.scores import required_column, rollout_logprobs


class RLHFEngine(RolloutEngine):
    """Trains a policy and a value model with PPO, on rewards less a KL penalty per token.

    Example:
        chatlearn_vllm.init()
        engine = RLHFEngine(policy, reference, reward, value, ppo_policy, ppo_value)
        engine.set_dataset(prompts)
        engine.learn()
    """

    def __init__(
        self,
        policy: BaseModule,
        reference: BaseModule | None,
        reward: BaseModule | Sequence[BaseModule],
        value: BaseModule | None,
        ppo_policy: BaseModule,
        ppo_value: BaseModule,
        *,
        draft_trainer: BaseModule | None = None,
    ) -> None:
        """Say which module plays which role.

        Args:
            policy: a `VLLMModule`; gets the weights of `ppo_policy`.
            reference: returns `ref_logprobs`; None if `init_kl_coef` of `ppo_policy` is 0.
            reward: returns `rewards`; of several they are added, each times its `reward_weight`.
            value: returns `values`; gets the weights of `ppo_value`. None lets `ppo_value` score:
                one model less in memory.
            ppo_policy: a `MegatronModule`, trained on `advantages`.
            ppo_value: a `ValueModule`, trained on `returns`.
            draft_trainer: a `DraftModule` that trains the model which drafts for the policy; None
                if nothing drafts, or a draft is frozen.

        Raises:
            UserError: the reference is missing, or keys of the yaml do not fit together.
        """
        self.reference = needed_reference(self, ppo_policy, reference)
        self.value, self.ppo_value = value, ppo_value
        scorers = [one for one in (self.reference, value) if one is not None]
        super().__init__(
            policy,
            reward,
            ppo_policy,
            scorers=scorers,
            trained={ppo_value: value},
            draft_trainer=draft_trainer,
        )
        has_reference = self.reference is not None
        check_ppo_keys(policy, ppo_policy, ppo_value, self.args, has_reference=has_reference)
        warn_of_temperatures(self.reference, ppo_policy)
        args = ppo_policy.model_args
        frequency = 1 if value is None else value.module_args.sync_frequency
        if frequency != 1:
            raise UserError(
                f"models.{value.name}: sync_frequency={frequency} must be 1: the values of an "
                "episode are those of the weights that its training starts from"
            )
        if args.fix_kl_coef or not has_reference:
            self.kl: FixedKL | AdaptiveKL = FixedKL(args.init_kl_coef)
        else:
            self.kl = AdaptiveKL(args.init_kl_coef, target=args.target, horizon=args.horizon)

    def scorers_of_all_samples(self) -> Sequence[BaseModule]:
        """Rewards, reference and value."""
        return [*self.rewards, *(one for one in (self.reference, self.value) if one is not None)]

    def prepare(self, batch: Batch, episode: int) -> tuple[Batch, dict[str, float]]:
        """Add `values`, `advantages` and `returns`, [B, S-1] each."""
        args = self.policy_trainer.model_args
        mask = batch["loss_mask"][:, 1:]
        if args.tis_imp_ratio_cap is not None:
            rollout_logprobs(self.policy.name, batch, "tis_imp_ratio_cap")
        kl = torch.zeros(mask.shape)
        if self.reference is not None:
            self.add_ref_logprobs(self.reference, batch, episode)
            sampled = rollout_logprobs(self.policy.name, batch, "the KL penalty of the rewards")
            kl = kl_penalty(sampled, batch.pop("ref_logprobs"), "k1", mask=mask)
        with self.timers.phase("value"):
            values = self._values(batch, episode)
        name = (self.value or self.ppo_value).name
        batch |= {**values, "values": required_column(name, values, "values", mask)}
        rewards = token_rewards(
            batch["rewards"], kl, mask, kl_coef=self.kl.coef, clip=args.cliprange_reward
        )
        advantages, batch["returns"] = gae(
            rewards, batch["values"], mask, gamma=args.gamma, lam=args.lam
        )
        batch["advantages"] = whiten(advantages, mask, moments(advantages, mask))
        kl_per_response = kl.sum(1).mean().item()
        metrics = {
            "rollout/kl_to_reference": kl_per_response,
            "rollout/kl_coef": self.kl.coef,
            "rollout/return_mean": (batch["returns"].sum() / mask.sum()).item(),
            "rollout/value_mean": ((batch["values"] * mask).sum() / mask.sum()).item(),
        }
        self.kl.update(kl_per_response, batch_size(batch))
        return batch, metrics

    def _values(self, batch: Batch, episode: int) -> Batch:
        if self.value is not None:
            return self.forward(self.value, batch, episode)
        memory = self._memory[self.ppo_value.name]
        memory.onload("weights")
        values = self.groups[self.ppo_value.name].forward_sharded("forward_step", batch, episode)
        memory.offload("weights")
        return values

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint notes down: also the coefficient of the KL penalty."""
        return {**super().state_dict(), "kl": self.kl.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state)
        if "kl" in state:
            self.kl.load_state_dict(state["kl"])
