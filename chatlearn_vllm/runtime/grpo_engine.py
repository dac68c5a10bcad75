"""What is trained on in group relative policy optimization and its relatives?

GRPO, Dr. GRPO, DAPO, GSPO, RLOO, REINFORCE++: docs/algorithms/grpo.md says which keys make which.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch

from chatlearn_vllm.algorithms.advantages import (
    discounted_returns,
    group_advantages,
    rloo_advantages,
)
from chatlearn_vllm.algorithms.dapo import informative_groups, overlong_penalty
from chatlearn_vllm.algorithms.gae import moments, token_rewards, whiten
from chatlearn_vllm.algorithms.kl import kl_penalty
from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.data.batch import Batch, batch_size, concat, select
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.runtime.algorithm_checks import check_grpo_keys, warn_of_temperatures
from chatlearn_vllm.runtime.memory import gives_memory_back
from chatlearn_vllm.runtime.rollout_engine import RolloutEngine
from chatlearn_vllm.runtime.scores import rollout_logprobs

logger = get_logger(__name__)


class GRPOEngine(RolloutEngine):
    """Trains a policy on rewards, each response compared with the others to its prompt.

    Example:
        chatlearn_vllm.init()
        engine = GRPOEngine(policy, reference, reward, policy_trainer)
        engine.set_dataset(prompts)
        engine.set_evaluator(Evaluator(policy, reward, eval_prompts))
        engine.learn()
    """

    def __init__(
        self,
        policy: BaseModule,
        reference: BaseModule | None,
        reward: BaseModule | Sequence[BaseModule],
        policy_trainer: BaseModule,
        *,
        draft_trainer: BaseModule | None = None,
    ) -> None:
        """Say which module plays which role.

        Args:
            policy: a `VLLMModule`.
            reference: returns `ref_logprobs`; None if the trainer's `init_kl_coef` is 0.
            reward: returns `rewards`, and `accuracy` if it can tell right from wrong; of several
                the rewards are added, each times its `reward_weight`.
            policy_trainer: a `MegatronModule`.
            draft_trainer: a `DraftModule` that trains the model which drafts for the policy; None
                if nothing drafts, or a draft is frozen.

        Raises:
            UserError: the reference is missing, or keys of the yaml do not fit together.
        """
        reference = needed_reference(self, policy_trainer, reference)
        self.reference = reference
        scorers = [reference] if reference is not None else []
        super().__init__(
            policy, reward, policy_trainer, scorers=scorers, draft_trainer=draft_trainer
        )
        check_grpo_keys(policy, policy_trainer)
        warn_of_temperatures(reference, policy_trainer)
        if self.args.dynamic_sampling:
            self._check_dynamic_sampling()

    def collect(self, episode: int) -> tuple[Batch, dict[str, float]]:
        """The episode's responses with rewards; dynamic sampling goes on until they suffice."""
        if not self.args.dynamic_sampling:
            return super().collect(episode)
        wanted = self.args.sample_per_episode
        kept: list[Batch] = []
        left_out: list[Batch] = []
        of_rewards: list[dict[str, float]] = []
        for _ in range(self.args.max_num_gen_batches):
            batch = self.roll_out(episode)
            of_rewards.append(self.add_rewards(batch, episode))
            values = torch.as_tensor(batch.get("accuracy", batch["rewards"])).float()
            is_informative = informative_groups(values, batch["prompt_index"])
            kept.append(select(batch, is_informative.nonzero().flatten()))
            left_out.append(select(batch, (~is_informative).nonzero().flatten()))
            if sum(map(batch_size, kept)) >= wanted:
                break
        with self.timers.phase("offload"):
            self._memory[self.policy.name].offload()
        num_kept = sum(map(batch_size, kept))
        if num_kept < wanted:
            logger.warning(
                "episode %d: %d of %d samples are in groups with different rewards after %d "
                "batches (max_num_gen_batches); the others have no advantage",
                episode, num_kept, wanted, len(kept),
            )  # fmt: skip
        everything = concat([*kept, *left_out])
        metrics = {
            # All rollouts of an episode are equally large.
            **{name: fmean(one[name] for one in of_rewards) for name in of_rewards[0]},
            **self.sample_metrics(everything),
            "rollout/num_gen_batches": len(kept),
            "rollout/informative_fraction": num_kept / batch_size(everything),
        }
        return select(everything, range(wanted)), metrics

    def scorers_of_all_samples(self) -> Sequence[BaseModule]:
        """Rewards, and the reference unless some samples are left out."""
        if self.reference is None or self.args.dynamic_sampling:
            return self.rewards
        return (*self.rewards, self.reference)

    def prepare(self, batch: Batch, episode: int) -> tuple[Batch, dict[str, float]]:
        """Add `advantages`, and `ref_logprobs` if the loss has a KL penalty."""
        args = self.policy_trainer.model_args
        metrics = {}
        if args.overlong_buffer_len is not None:
            penalty = args.overlong_penalty_factor * overlong_penalty(
                batch["loss_mask"].sum(1),
                max_length=self.policy.model_args.max_new_tokens,
                buffer=args.overlong_buffer_len,
            )
            batch["rewards"] = batch["rewards"] + penalty
            metrics["rollout/overlong_penalty_mean"] = penalty.mean().item()
        if args.tis_imp_ratio_cap is not None:
            rollout_logprobs(self.policy.name, batch, "tis_imp_ratio_cap")
        if self.reference is not None:
            self.add_ref_logprobs(self.reference, batch, episode)
        if args.advantage_estimator == "reinforce++":
            batch["advantages"] = self._reinforce_advantages(batch)
        elif args.advantage_estimator == "rloo":
            batch["advantages"] = rloo_advantages(batch["rewards"], batch["prompt_index"])
        else:
            batch["advantages"] = group_advantages(
                batch["rewards"], batch["prompt_index"], normalize_std=args.advantage_std
            )
        return batch, metrics

    def _reinforce_advantages(self, batch: Batch) -> torch.Tensor:
        """[B, S-1]; the KL towards the reference, if there is one, is part of the rewards."""
        args = self.policy_trainer.model_args
        mask = batch["loss_mask"][:, 1:]
        kl = torch.zeros(mask.shape)
        if self.reference is not None:
            sampled = rollout_logprobs(self.policy.name, batch, "the KL penalty of the rewards")
            kl = kl_penalty(sampled, batch.pop("ref_logprobs"), "k1", mask=mask)
        rewards = token_rewards(
            batch["rewards"], kl, mask, kl_coef=args.init_kl_coef, clip=args.cliprange_reward
        )
        returns = discounted_returns(rewards, mask, gamma=args.gamma)
        return whiten(returns, mask, moments(returns, mask))

    def _check_dynamic_sampling(self) -> None:
        for reward in self.rewards:
            if reward.module_args.num_gpu and gives_memory_back(
                reward.module_args, self.shares_devices(reward)
            ):
                raise UserError(
                    f"runtime.dynamic_sampling: models.{reward.name} shares its devices and gives "
                    "their memory back, but has to score while the policy is awake; set its "
                    "free_memory: False or give it devices of its own"
                )


def needed_reference(
    engine: object, policy_trainer: BaseModule, reference: BaseModule | None
) -> BaseModule | None:
    """The reference model if the KL penalty asks for one.

    Raises:
        UserError: it asks for one that is not there.
    """
    kl_coef = policy_trainer.model_args.init_kl_coef
    if kl_coef > 0 and reference is None:
        raise UserError(
            f"models.{policy_trainer.name}: init_kl_coef={kl_coef} needs a reference model; "
            f"give {type(engine).__name__} one or set init_kl_coef: 0"
        )
    if kl_coef == 0 and reference is not None:
        logger.info("%s is not started: init_kl_coef is 0", reference.name)
        return None
    return reference
