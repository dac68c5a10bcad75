"""What do episodes that begin with samples of a policy have in common, in order?"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.data.balance import balanced, row_lengths
from chatlearn_vllm.data.batch import Batch, select
from chatlearn_vllm.data.carried import Carried, carried_metrics
from chatlearn_vllm.data.relay_buffer import RelayBuffer, RelaySampleFn, all_samples
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.modules.receives_weights import DRAFT, MODEL
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.runtime.base_engine import BaseEngine
from chatlearn_vllm.runtime.checkpoint import DriverState
from chatlearn_vllm.runtime.draft_training import check_draft_trainer, check_draft_without_trainer
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
from chatlearn_vllm.runtime.role_keys import tell_unread_keys
from chatlearn_vllm.runtime.rollout import Rollout, check_weight_version
from chatlearn_vllm.runtime.rollout_checks import (
    check_beam_search,
    check_partial_rollouts,
    check_sleep_level,
    check_takes_weights,
    with_levels_that_mean_something,
)
from chatlearn_vllm.runtime.scatter import train_rows
from chatlearn_vllm.runtime.scores import required_column
from chatlearn_vllm.runtime.speculation import SpeculationSwitch
from chatlearn_vllm.runtime.weight_synchronizer import WeightSynchronizer

logger = get_logger(__name__)


class RolloutEngine(BaseEngine):
    """Prompts, responses, rewards, training, weight sync, evaluation.

    Subclasses say what is made of the scored responses (`prepare`), and which models besides the
    policy are trained on it.
    """

    _speculation: SpeculationSwitch | None = None
    """Of a policy that drafts tokens and verifies them; there from `setup` on."""

    def __init__(
        self,
        policy: BaseModule,
        reward: BaseModule | Sequence[BaseModule] | None,
        policy_trainer: BaseModule,
        *,
        scorers: Sequence[BaseModule] = (),
        trained: Mapping[BaseModule, BaseModule | None] | None = None,
        draft_trainer: BaseModule | None = None,
    ) -> None:
        """Say which module plays which role.

        Args:
            policy: a `VLLMModule`.
            reward: returns `rewards`, and `accuracy` if it can tell right from wrong; of several
                the rewards are added, each times its `reward_weight` in the yaml. None if the
                subclass has no such role.
            policy_trainer: a `MegatronModule`, whose weights go to the policy.
            scorers: frozen models besides the rewards.
            trained: further `MegatronModule`s that are trained, in order, before the policy; each
                with the scorer that gets its weights, if there is one.
            draft_trainer: a `DraftModule`, trained before all others on the same samples; its
                weights go to the model that drafts for the policy whenever the policy gets new
                ones. None if nothing drafts, or a draft is frozen.

        Raises:
            UserError: keys of the yaml do not fit together.
        """
        if reward is None:
            self.rewards: tuple[BaseModule, ...] = ()
        else:
            self.rewards = (reward,) if isinstance(reward, BaseModule) else tuple(reward)
            if not self.rewards:
                raise UserError("an engine needs at least one reward module")
        self.policy, self.policy_trainer = policy, policy_trainer
        self.draft_trainer = draft_trainer
        drafts = {} if draft_trainer is None else {draft_trainer: policy}
        others = {**drafts, **(trained or {})}
        self._targets = {**others, policy_trainer: policy}
        self._check_roles([policy, *self.rewards, *scorers])
        # The policy comes last: vLLM sizes its KV cache by what the others left free.
        super().__init__(policy_trainer, *others, *scorers, *self.rewards, policy)
        self.samples_per_prompt = policy.model_args.responses_per_prompt
        # Fails here, before anything starts, if the batch sizes do not fit together.
        for trainer in self._targets:
            train_rows(
                self.args.sample_per_episode,
                self.args.train_global_batch_size,
                data_parallel_rank=0,
                data_parallel_size=trainer.module_args.data_parallel_size,
            )
        self._relay_sample_fn: RelaySampleFn = all_samples
        check_beam_search(policy, policy_trainer)
        sleeps = gives_memory_back(policy.module_args, self.shares_devices(policy))
        check_sleep_level(policy, sleeps=sleeps)
        for target in self._targets.values():
            if target is not None:
                check_takes_weights(target)
        if draft_trainer is None:
            check_draft_without_trainer(policy)
        else:
            check_draft_trainer(policy, draft_trainer)
        self.check_policy_and_trainer()

    def _check_roles(self, frozen: Sequence[BaseModule]) -> None:
        """Check that those are trained, by the yaml, whom this engine trains.

        Raises:
            UserError: says who is not, and who is without being trained here.
        """
        name = type(self).__name__
        problems = [
            f"models.{module.name}: {name} trains it; set trainable: True"
            for module in self._targets
            if not module.module_args.trainable
        ]
        problems += [
            f"models.{module.name}: trainable: True, but {name} does not train it; set it to False"
            for module in frozen
            if module.module_args.trainable
        ]
        if problems:
            problems.append(f"or give {name} its models in the order of its arguments")
            raise UserError("\n".join(problems))

    def set_relay_sample_fn(self, function: RelaySampleFn) -> None:
        """Say what is trained on; without it, all samples of the episodes that are kept.

        Args:
            function: called on the driver, once an episode, with those of the last
                `runtime.max_relay_episode` episodes, the present one last.
        """
        self._relay_sample_fn = function

    # ---- what kinds of training define ------------------------------------------------------

    @abstractmethod
    def prepare(self, batch: Batch, episode: int) -> tuple[Batch, dict[str, float]]:
        """Make training data of an episode's responses and rewards.

        Args:
            batch: see data/batch.py; with `rewards`.
            episode: number of the episode.

        Returns:
            The batch that is trained on, and metrics.
        """

    def rows_of_rank(self, batch: Batch, rank: int, size: int) -> list[int]:
        """Rows that data parallel rank `rank` of `size` trains on, optimizer step by step."""
        return balanced(row_lengths(batch), size, self.args.train_global_batch_size)[rank]

    def collect(self, episode: int) -> tuple[Batch, dict[str, float]]:
        """The episode's responses with their rewards; the policy leaves device memory."""
        batch = self.roll_out(episode)
        with self.timers.phase("offload"):
            self._memory[self.policy.name].offload()
        metrics = self.add_rewards(batch, episode)
        return batch, metrics | self.sample_metrics(batch)

    def sample_metrics(self, batch: Batch) -> dict[str, float]:
        """What describes all responses of an episode, with their rewards."""
        return {
            **rollout_metrics(batch, self.timers.seconds("rollout")),
            "rollout/weight_version": self.weight_version,
            **self._draft_version(),
            **(self._speculation.after_rollout(self.weight_version) if self._speculation else {}),
            **(carried_metrics(batch, self._carried) if "token_versions" in batch else {}),
            **(reward_metrics(batch, "rollout") if "rewards" in batch else {}),
        }

    def _draft_version(self) -> dict[str, float]:
        """Which weights drafted, where they change."""
        if self.draft_trainer is None:
            return {}
        return {"rollout/draft_version": self._syncs[self.draft_trainer].version}

    # ---- set-up -----------------------------------------------------------------------------

    def setup(self) -> None:
        """Start and build everything; plan the weight syncs."""
        self._memory: dict[str, Any] = {}
        self._num_samples = 0
        self._carried: list[Carried] = []
        """Prompts that earlier episodes did not finish, with partial rollouts."""
        self._relay = RelayBuffer(self.args.max_relay_episode, self.args.relay_episode_offset)
        self._rollout_version = 0
        self._rollout: Rollout | None = None
        """That of the present episode."""
        super().setup()
        self._speculation = self._speculation_switch()
        if self.resumed_from is not None:
            self._num_samples = self.finished_episodes * self.args.sample_per_episode
            self.load_state_dict(self.resumed_from.engine)
            self._relay.load_state_dict(self.resumed_from.batches or ())
        version = self.resumed_from.weight_version if self.resumed_from else 0
        self._syncs = {
            trainer: self._plan_sync(trainer, target, version)
            for trainer, target in self._targets.items()
            if target is not None
        }

    def _speculation_switch(self) -> SpeculationSwitch | None:
        args = self.policy.model_args
        if args.speculative_config is None:
            return None
        return SpeculationSwitch(self.groups[self.policy.name], args.speculative_min_gain)

    def _plan_sync(
        self, trainer: BaseModule, target: BaseModule, version: int
    ) -> WeightSynchronizer:
        sync = WeightSynchronizer(
            self.groups[trainer.name],
            self.groups[target.name],
            version,
            keep_open=not self._memory[trainer.name].moves_weights,
            stride=self.args.validate_param_sync_stride if self.args.validate_param_sync else None,
            part=DRAFT if trainer is self.draft_trainer else MODEL,
        )
        sync.setup()
        return sync

    def model_is_built(self, module: BaseModule) -> None:
        """Move a colocated model out of the way of the next one."""
        memory_class: type[Any] = ScorerMemory
        if module is self.policy:
            memory_class = PolicyMemory
        elif module in self._targets:
            memory_class = TrainerMemory
        memory = memory_class(
            self.groups[module.name], module.module_args, self.shares_devices(module)
        )
        self._memory[module.name] = memory
        memory.offload()

    def check_policy_and_trainer(self) -> None:
        """Check what the policy's keys mean for the model whose weights it gets, and the reverse.

        Raises:
            UserError: they do not fit together.
        """
        both = self.policy, self.policy_trainer
        check_partial_rollouts(*both, self.args)
        self.args = with_levels_that_mean_something(*both, self.args)
        self.job = self.job.model_copy(update={"runtime": self.args})
        targets = [one for one in self._targets.values() if one is not None]
        tell_unread_keys(
            self.modules, policy=self.policy, rewards=self.rewards, targets=dict.fromkeys(targets)
        )

    def start_models(self) -> None:
        """See BaseEngine; rewards have to be made of responses.

        Raises:
            UserError: as there, and for a reward that cannot.
        """
        for reward in self.rewards:
            if type(reward).forward_step is BaseModule.forward_step:
                raise UserError(
                    f"models.{reward.name}: {type(reward).__name__} has no forward_step(self, "
                    "data, iteration=0), which makes `rewards` of responses"
                )
        super().start_models()

    def count_prompts(self, records: Sequence[Any]) -> int:
        """Hand the prompts to the policy's ranks."""
        return self.groups[self.policy.name].call("build_prompts", records)[0]

    @property
    def weight_sync(self) -> WeightSynchronizer:
        """What copies the trainer's weights into the policy; there from `setup` on."""
        return self._syncs[self.policy_trainer]

    @property
    def weight_version(self) -> int:
        """Version of the weights that made the last responses; a resumed job syncs to the next."""
        return self._rollout_version

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint notes down of this kind of training."""
        state: dict[str, Any] = {"num_samples": self._num_samples}
        if self._carried:
            state["carried"] = [one.state_dict() for one in self._carried]
        return state

    def state_batches(self) -> Any:
        """The relay buffer, if the next episode trains on any of it."""
        return self._relay.state_dict() or None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; an older one may lack keys."""
        self._num_samples = state.get("num_samples", self._num_samples)
        self._carried = [Carried.from_state_dict(one) for one in state.get("carried", ())]
        if self._carried and self.args.max_rollout_round == 1:
            logger.warning(
                "%d prompts that the checkpoint has begun are left out: runtime.max_rollout_round "
                "is 1", len(self._carried),
            )  # fmt: skip
            self._carried = []

    # ---- the episode ------------------------------------------------------------------------

    def before_episodes(self) -> dict[str, float]:
        """First weight syncs, then the first evaluation if the yaml asks for it."""
        metrics = {}
        for trainer in self._syncs:
            if trainer is not self.draft_trainer:  # whose weights go with those of the policy
                self._memory[trainer.name].onload("weights")
                metrics |= self._leave(trainer, sync=True)
        asks = self.args.eval_episode_interval > 0 or self.args.enable_eval_before_training
        if self.evaluator is None and asks:
            logger.warning(
                "no effect of eval_episode_interval and enable_eval_before_training: this job has "
                "no evaluator; give it one with set_evaluator (the scripts of the examples do if "
                "runtime.eval_data_path is set)"
            )
        if self.args.enable_eval_before_training and self.finished_episodes == 0:
            metrics |= self._evaluate(episode=0)
        return metrics

    def run_episode(self, episode: int) -> dict[str, float]:
        """Prompts, rollouts, rewards, training, weight sync, evaluation."""
        with self._stop.abandons():
            batch, metrics = self.collect(episode)
            batch, prepared = self.prepare(batch, episode)
        metrics |= prepared
        batch = self._relay_sample_fn(self._relay.add(episode, batch))
        for trainer, target in self._targets.items():
            metrics |= self._train(trainer, batch, episode)
            frequency = target.module_args.sync_frequency if target is not None else 0
            metrics |= self._leave(trainer, sync=self._is_due(frequency, episode))
        if self._is_due(self.args.eval_episode_interval, episode):
            metrics |= self._evaluate(episode)
        return metrics

    def save_all(self, state: DriverState) -> None:
        """Save all trainers, one after the other in memory."""
        for trainer in self._targets:
            self._memory[trainer.name].onload()
            is_last = trainer is self.policy_trainer
            self.save(self.groups[trainer.name], state.episode, is_last=is_last, state=state)
            self._memory[trainer.name].offload()

    def roll_out(self, episode: int) -> Batch:
        """Responses of the policy, which is awake, to the next prompts of the data."""
        with self.timers.phase("rollout"):
            batch = self._generate(episode)
        self._rollout_version = self.weight_sync.version
        check_weight_version(batch, self._rollout_version)
        return batch

    def _generate(self, episode: int) -> Batch:
        per_prompt = self.samples_per_prompt
        num_prompts = self.args.sample_per_episode // per_prompt
        is_partial = self.args.max_rollout_round > 1
        scorers = [] if is_partial else self._scoring_meanwhile()
        self._rollout = Rollout(
            self.groups[self.policy.name],
            max_open=math.ceil(self.policy.model_args.max_num_seqs / per_prompt),
            scorers=[self.groups[module.name] for module in scorers],
        )
        first_sample = self._num_samples
        if not is_partial:
            prompts = self.sampler.next(num_prompts)
            self._num_samples += num_prompts * per_prompt
            return self._rollout.generate(prompts, first_sample, per_prompt, episode)
        num_running = math.ceil(num_prompts * (1 + self.args.rollout_over_sampling))
        prompts = self.sampler.next(max(0, num_running - len(self._carried)))
        self._num_samples += len(prompts) * per_prompt
        new = [
            Carried(index, first_sample + number * per_prompt, 0, [])
            for number, index in enumerate(prompts)
        ]
        batch, self._carried = self._rollout.generate_until(
            [*self._carried, *new], num_prompts, per_prompt, episode, self.args.max_rollout_round
        )
        return batch

    def add_rewards(self, batch: Batch, episode: int) -> dict[str, float]:
        """Add `rewards`, and what else the reward modules return, to the batch.

        Returns:
            Of several modules the mean reward of each, before its weight.

        Raises:
            ValueError: a module returned no `rewards` [B], or such that are not finite.
        """
        metrics = {}
        total: torch.Tensor | float = 0.0
        with self.timers.phase("reward"):
            for module in self.rewards:
                found = self.forward(module, batch, episode)
                rewards = required_column(module.name, found, "rewards")
                del found["rewards"]
                if len(self.rewards) > 1:
                    metrics[f"rollout/rewards/{module.name}_mean"] = rewards.mean().item()
                total = total + module.module_args.reward_weight * rewards
                batch |= found
        if self.rewards:
            batch["rewards"] = total
        return metrics

    def scorers_of_all_samples(self) -> Sequence[BaseModule]:
        """Frozen models that score every sample as it comes from the policy.

        Where they are in memory beside the policy, they work while it does.
        """
        return self.rewards

    def _scoring_meanwhile(self) -> list[BaseModule]:
        modules = self.scorers_of_all_samples()
        return [module for module in modules if self._memory[module.name].is_resident]

    def add_ref_logprobs(self, reference: BaseModule, batch: Batch, episode: int) -> None:
        """Add `ref_logprobs` [B, S-1] to the batch.

        Raises:
            ValueError: the reference returned none, or some that are not finite.
        """
        with self.timers.phase("reference"):
            scores = self.forward(reference, batch, episode)
        mask = batch["loss_mask"][:, 1:]
        scores["ref_logprobs"] = required_column(reference.name, scores, "ref_logprobs", mask)
        batch |= scores

    def forward(self, module: BaseModule, batch: Batch, episode: int) -> Batch:
        """What a frozen model's `forward_step` returns for all rows."""
        if self._rollout is not None and self._rollout.scores_meanwhile(module.name):
            return self._rollout.scores(module.name)
        with self.in_memory(module):
            return self.groups[module.name].forward("forward_step", batch, episode)

    @contextmanager
    def in_memory(self, module: BaseModule) -> Iterator[None]:
        """Within the block a frozen model is on its device."""
        self._memory[module.name].onload()
        yield
        self._memory[module.name].offload()

    def _train(self, module: BaseModule, batch: Batch, episode: int) -> dict[str, float]:
        trainer = self.groups[module.name]
        with self.timers.phase("onload"):
            self._memory[module.name].onload()
        with self.timers.phase("train"):
            stats = trainer.call_sharded(
                "train",
                lambda rank, size: select(batch, self.rows_of_rank(batch, rank, size)),
                episode,
            )
        self.save_if_due(trainer, episode, is_last=module is self.policy_trainer)
        return train_metrics(stats, "train" if module is self.policy_trainer else module.name)

    def _leave(self, trainer: BaseModule, sync: bool) -> dict[str, float]:
        """A trainer leaves device memory; the model that uses its weights gets them if `sync`.

        Of the policy, which works next, weights and KV cache come back to the device. A draft gets
        its weights with the policy's, because then its memory is there.
        """
        target = self._targets[trainer]
        memory = self._memory[trainer.name]
        with self.timers.phase("offload"):
            memory.offload("grads", "optimizer")
        metrics = {}
        if trainer is self.policy_trainer:
            metrics = self._wake_policy(trainer, sync)
        elif sync and target is not None and trainer is not self.draft_trainer:
            with self.timers.phase("onload"):
                self._memory[target.name].onload()
            with self.timers.phase("sync"):
                self._syncs[trainer].sync()
            with self.timers.phase("offload"):
                self._memory[target.name].offload()
        with self.timers.phase("offload"):
            memory.offload("weights")
        if trainer is self.policy_trainer:
            if sync and self.draft_trainer is not None:
                metrics |= self._sync_draft(self.draft_trainer)
            with self.timers.phase("offload"):
                self._memory[self.policy.name].wake_kv_cache()
        return metrics

    def _sync_draft(self, trainer: BaseModule) -> dict[str, float]:
        memory = self._memory[trainer.name]
        with self.timers.phase("onload"):
            memory.onload("weights")
        with self.timers.phase("sync"):
            report = self._syncs[trainer].sync()
        with self.timers.phase("offload"):
            memory.offload("weights")
        return {"sync/draft_seconds": report.seconds, "sync/draft_bytes": report.num_bytes}

    def _wake_policy(self, trainer: BaseModule, sync: bool) -> dict[str, float]:
        with self.timers.phase("offload"):
            self._memory[self.policy.name].wake_weights()
        metrics = {}
        if sync:
            with self.timers.phase("sync"):
                metrics = sync_metrics(self._syncs[trainer].sync())
        return metrics | {"sync/weight_version": self.weight_sync.version}

    def _evaluate(self, episode: int) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        with self.timers.phase("eval"):
            metrics = self.evaluator.evaluate(self.groups, episode, self.run_dir, self.in_memory)
        if self._speculation is not None and self.evaluator.policy is self.policy:
            metrics |= self._speculation.after_evaluation()
        return metrics

    @staticmethod
    def _is_due(interval: int, episode: int) -> bool:
        return interval > 0 and episode % interval == 0
