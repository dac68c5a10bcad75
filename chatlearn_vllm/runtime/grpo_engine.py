"""What happens in one episode of group relative policy optimization, in order?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chatlearn_vllm.algorithms.advantages import group_advantages
from chatlearn_vllm.config.sampling import incomparable_logprobs
from chatlearn_vllm.config.schema import MismatchWarnConfig
from chatlearn_vllm.data.batch import Batch, batch_size, select
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.runtime.engine import Engine
from chatlearn_vllm.runtime.episode_metrics import (
    reward_metrics,
    rollout_metrics,
    sync_metrics,
    train_metrics,
)
from chatlearn_vllm.runtime.memory import (
    PolicyMemory,
    ScorerMemory,
    TrainerMemory,
    gives_memory_back,
)
from chatlearn_vllm.runtime.rollout import check_weight_version, generate
from chatlearn_vllm.runtime.scatter import train_rows
from chatlearn_vllm.runtime.weight_synchronizer import WeightSynchronizer

logger = get_logger(__name__)


class GRPOEngine(Engine):
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
        reward: BaseModule,
        policy_trainer: BaseModule,
    ) -> None:
        """Say which module plays which role.

        Args:
            policy: a `VLLMModule`.
            reference: returns `ref_logprobs`; None if the trainer's `init_kl_coef` is 0.
            reward: returns `rewards`, and `accuracy` if it can tell right from wrong.
            policy_trainer: a `MegatronModule`.

        Raises:
            ValueError: the reference is missing, or keys of the yaml do not fit together.
        """
        kl_coef = policy_trainer.model_args.init_kl_coef
        if kl_coef > 0 and reference is None:
            raise ValueError(
                f"models.{policy_trainer.name}: init_kl_coef={kl_coef} needs a reference model; "
                "give GRPOEngine one or set init_kl_coef: 0"
            )
        if kl_coef == 0 and reference is not None:
            logger.info("%s is not started: init_kl_coef is 0", reference.name)
            reference = None
        scorers = [reward] if reference is None else [reference, reward]
        # The policy comes last: vLLM sizes its KV cache by what the others left free.
        super().__init__(policy_trainer, *scorers, policy)
        self.policy, self.reference = policy, reference
        self.reward, self.policy_trainer = reward, policy_trainer
        self.samples_per_prompt = policy.model_args.responses_per_prompt
        # Fails here, before anything starts, if the batch sizes do not fit together.
        train_rows(
            self.args.sample_per_episode,
            self.args.train_global_batch_size,
            data_parallel_rank=0,
            data_parallel_size=policy_trainer.module_args.data_parallel_size,
        )
        self._check_sleep_level()
        self._drop_levels_that_mean_nothing()

    # ---- set-up -----------------------------------------------------------------------------

    def setup(self) -> None:
        """Start and build everything; plan the weight sync."""
        self._memory: dict[str, Any] = {}
        super().setup()
        version = self.resumed_from.weight_version if self.resumed_from else 0
        self.weight_sync = WeightSynchronizer(
            self.groups[self.policy_trainer.name],
            self.groups[self.policy.name],
            version,
            keep_open=not self._memory[self.policy_trainer.name].moves_weights,
            stride=self.args.validate_param_sync_stride if self.args.validate_param_sync else None,
        )
        self.weight_sync.setup()

    def model_is_built(self, module: BaseModule) -> None:
        """Move a colocated model out of the way of the next one."""
        memory_class = {self.policy: PolicyMemory, self.policy_trainer: TrainerMemory}.get(
            module, ScorerMemory
        )
        memory = memory_class(
            self.groups[module.name], module.module_args, self._shares_devices(module)
        )
        self._memory[module.name] = memory
        memory.offload()

    def _shares_devices(self, module: BaseModule) -> bool:
        running = {own.name for own in self.modules}
        return any(
            module.name in group and len(running.intersection(group)) > 1
            for group in self.args.colocation_groups()
        )

    def _check_sleep_level(self) -> None:
        sleep_level = self.policy.model_args.sleep_level
        sleeps = gives_memory_back(self.policy.module_args, self._shares_devices(self.policy))
        if sleeps and self._sync_frequency != 1 and sleep_level != 1:
            raise ValueError(
                f"models.{self.policy.name}: sync_frequency={self._sync_frequency} leaves "
                f"episodes without a weight sync, and sleep_level={sleep_level} drops the weights "
                "in between; set sleep_level: 1"
            )

    def _drop_levels_that_mean_nothing(self) -> None:
        """Tell once, not in every episode, that the two sides' log-probabilities must differ."""
        policy, runtime = self.policy, self.args
        reasons = incomparable_logprobs(policy.model_args, self.policy_trainer.model_args)
        if not reasons:
            return
        why = (
            f"the log-probabilities of models.{policy.name} are not those of "
            f"models.{self.policy_trainer.name} even with equal weights ({'; '.join(reasons)})"
        )
        if stop := runtime.mismatch_stop.set_levels():
            raise ValueError(
                f"runtime.mismatch_stop={stop} means nothing here: {why}; sample from the whole "
                "softmax at the trainer's temperature, or leave mismatch_stop out"
            )
        logger.warning("no mismatch_warn in this job: %s", why)
        none = MismatchWarnConfig(**dict.fromkeys(MismatchWarnConfig.model_fields))
        self.args = runtime.model_copy(update={"mismatch_warn": none})
        self.job = self.job.model_copy(update={"runtime": self.args})

    def count_prompts(self, records: Sequence[Any]) -> int:
        """Hand the prompts to the policy's ranks."""
        return self.groups[self.policy.name].call("build_prompts", records)[0]

    @property
    def weight_version(self) -> int:
        """Version of the policy's weights."""
        return self.weight_sync.version

    # ---- the episode ------------------------------------------------------------------------

    def before_episodes(self) -> dict[str, float]:
        """First weight sync, then the first evaluation if the yaml asks for it."""
        self._memory[self.policy_trainer.name].onload("weights")
        metrics = self._return_to_policy(sync=True)
        if self.args.enable_eval_before_training:
            metrics |= self._evaluate(episode=0)
        return metrics

    def run_episode(self, episode: int) -> dict[str, float]:
        """Prompts, rollouts, rewards, training, weight sync, evaluation."""
        batch, metrics = self._roll_out(episode)
        self._memory[self.policy.name].offload()
        metrics |= self._score(batch, episode)
        metrics |= self._train(batch, episode)
        metrics |= self._return_to_policy(sync=self._is_due(self._sync_frequency, episode))
        if self._is_due(self.args.eval_episode_interval, episode):
            metrics |= self._evaluate(episode)
        return metrics

    def _roll_out(self, episode: int) -> tuple[Batch, dict[str, float]]:
        prompts = self.sampler.next(self.args.sample_per_episode // self.samples_per_prompt)
        with self.timers.phase("rollout"):
            batch = generate(
                self.groups[self.policy.name],
                prompts,
                first_sample=(episode - 1) * self.args.sample_per_episode,
                samples_per_prompt=self.samples_per_prompt,
                iteration=episode,
            )
        check_weight_version(batch, self.weight_version)
        metrics = rollout_metrics(batch, self.timers.seconds("rollout"))
        return batch, metrics | {"rollout/weight_version": self.weight_version}

    def _score(self, batch: Batch, episode: int) -> dict[str, float]:
        """Add `rewards`, `advantages`, and `ref_logprobs` if there is a reference, to the batch."""
        with self.timers.phase("reward"):
            batch |= self._forward(self.reward, batch, episode)
        if self.reference is not None:
            with self.timers.phase("reference"):
                batch |= self._forward(self.reference, batch, episode)
        batch["advantages"] = group_advantages(
            batch["rewards"],
            batch["prompt_index"],
            normalize_std=self.policy_trainer.model_args.advantage_std,
        )
        return reward_metrics(batch, "rollout")

    def _forward(self, module: BaseModule, batch: Batch, episode: int) -> Batch:
        memory = self._memory[module.name]
        memory.onload()
        result = self.groups[module.name].forward("forward_step", batch, episode)
        memory.offload()
        return result

    def _train(self, batch: Batch, episode: int) -> dict[str, float]:
        trainer = self.groups[self.policy_trainer.name]
        with self.timers.phase("onload"):
            self._memory[self.policy_trainer.name].onload()
        with self.timers.phase("train"):
            stats = trainer.call_sharded(
                "train",
                lambda rank, size: select(
                    batch,
                    train_rows(batch_size(batch), self.args.train_global_batch_size, rank, size),
                ),
                episode,
            )
        self.save_if_due(trainer, episode)
        return train_metrics(stats)

    def _return_to_policy(self, sync: bool) -> dict[str, float]:
        """The trainer leaves device memory, the policy comes back, with new weights if `sync`."""
        trainer, policy = self._memory[self.policy_trainer.name], self._memory[self.policy.name]
        metrics = {}
        with self.timers.phase("offload"):
            trainer.offload("grads", "optimizer")
            policy.wake_weights()
        if sync:
            with self.timers.phase("sync"):
                metrics = sync_metrics(self.weight_sync.sync())
        with self.timers.phase("offload"):
            trainer.offload("weights")
            policy.wake_kv_cache()
        return metrics | {"sync/weight_version": self.weight_version}

    def _evaluate(self, episode: int) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        with self.timers.phase("eval"):
            return self.evaluator.evaluate(self.groups, episode, self.run_dir)

    @property
    def _sync_frequency(self) -> int:
        return self.policy.module_args.sync_frequency

    @staticmethod
    def _is_due(interval: int, episode: int) -> bool:
        return interval > 0 and episode % interval == 0
