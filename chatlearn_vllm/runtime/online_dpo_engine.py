"""What is trained on in online direct preference optimization?

S. Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback", arXiv:2402.04792:
pairs of the policy's own responses; here the reward ranks them. docs/algorithms/online_dpo.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from chatlearn_vllm.algorithms.preference import best_and_worst
from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.data.batch import Batch, batch_size, select
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.modules.megatron_module import num_optimizer_steps
from chatlearn_vllm.modules.pairs import check_room_for_pairs
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.runtime.algorithm_checks import check_preference_keys, warn_of_temperatures
from chatlearn_vllm.runtime.rollout_engine import RolloutEngine
from chatlearn_vllm.runtime.scatter import train_rows

logger = get_logger(__name__)


class OnlineDPOEngine(RolloutEngine):
    """Trains a policy to prefer the best of its responses to a prompt to the worst.

    Example:
        chatlearn_vllm.init()
        engine = OnlineDPOEngine(policy, reference, reward, policy_trainer)
        engine.set_dataset(prompts)
        engine.learn()
    """

    def __init__(
        self,
        policy: BaseModule,
        reference: BaseModule,
        reward: BaseModule | Sequence[BaseModule],
        policy_trainer: BaseModule,
        *,
        draft_trainer: BaseModule | None = None,
    ) -> None:
        """Say which module plays which role.

        Args:
            policy: a `VLLMModule`; gives at least two responses per prompt.
            reference: returns `ref_logprobs`.
            reward: returns `rewards`; of several they are added, each times its `reward_weight`.
            policy_trainer: a `PreferenceModule`.
            draft_trainer: a `DraftModule` that trains the model which drafts for the policy, on
                the responses of the pairs; None if nothing drafts, or a draft is frozen.

        Raises:
            UserError: a prompt gets one response, or keys of the yaml do not fit together.
        """
        if policy.model_args.responses_per_prompt < 2:
            raise UserError(
                f"models.{policy.name}: num_inference_per_prompt="
                f"{policy.model_args.num_inference_per_prompt} gives one response per prompt, and "
                "Online DPO compares at least two; set num_inference_per_prompt: 2 or more"
            )
        check_room_for_pairs(policy_trainer)
        self.reference = reference
        super().__init__(
            policy, reward, policy_trainer, scorers=[reference], draft_trainer=draft_trainer
        )
        check_preference_keys(policy_trainer, self.args)
        self._count_steps_by_pairs()
        warn_of_temperatures(reference, policy_trainer)
        self._unit = 2 * policy_trainer.module_args.data_parallel_size
        what = f"2 x data parallel size of models.{policy_trainer.name}"
        if draft_trainer is not None:
            self._unit = math.lcm(self._unit, draft_trainer.module_args.data_parallel_size)
            what += f", or a multiple for that of models.{draft_trainer.name}"
        if self.args.train_global_batch_size % self._unit:
            raise UserError(
                f"runtime.train_global_batch_size={self.args.train_global_batch_size} must be a "
                f"multiple of {self._unit} = {what}: rows are trained in pairs"
            )

    def _count_steps_by_pairs(self) -> None:
        """Have learning rates fall over the steps that pairs make, instead of all responses.

        Raises:
            UserError: a warm-up is longer than that.
        """
        num_prompts = self.args.sample_per_episode // self.samples_per_prompt
        # As many as if each prompt gave a pair: how many will, nobody knows.
        num_steps = num_optimizer_steps(self.args, 2 * num_prompts)
        models = dict(self.job.models)
        for trainer in self._targets:
            args = trainer.model_args
            if args.lr_decay_iters is not None or args.lr_decay_style == "constant":
                continue
            if args.lr_warmup_iters >= num_steps:
                raise UserError(
                    f"models.{trainer.name}: lr_warmup_iters={args.lr_warmup_iters} must be less "
                    f"than {num_steps}, the most optimizer steps that the pairs of this job make"
                )
            args = args.model_copy(update={"lr_decay_iters": num_steps})
            models[trainer.name] = models[trainer.name].model_copy(update={"model_args": args})
        self.job = self.job.model_copy(update={"models": models})

    def prepare(self, batch: Batch, episode: int) -> tuple[Batch, dict[str, float]]:
        """The rows of all pairs, chosen and rejected in turns, with `ref_logprobs`."""
        chosen, rejected, margin = best_and_worst(batch["rewards"], batch["prompt_index"])
        num_groups = len(batch["prompt_index"].unique())
        metrics = {
            "rollout/num_pairs": len(chosen),
            "rollout/pair_fraction": len(chosen) / num_groups,
            "rollout/pair_reward_margin_mean": margin.mean().item() if len(chosen) else 0.0,
        }
        # Data parallel ranks get equally many pairs of each optimizer step.
        num_pairs = len(chosen) // (self._unit // 2) * (self._unit // 2)
        rows = torch.stack([chosen[:num_pairs], rejected[:num_pairs]], dim=1).flatten()
        batch = select(batch, rows)
        if num_pairs:
            self.add_ref_logprobs(self.reference, batch, episode)
        else:
            logger.warning("episode %d: no pair of responses with different rewards", episode)
        return batch, metrics

    def rows_of_rank(self, batch: Batch, rank: int, size: int) -> list[int]:
        """Consecutive rows, so that pairs stay together."""
        return train_rows(batch_size(batch), self.args.train_global_batch_size, rank, size)
