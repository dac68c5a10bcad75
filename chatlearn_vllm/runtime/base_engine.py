"""What do all kinds of training have in common: set-up, the loop over episodes, tear-down?"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.data.prompts import (
    PromptSampler,
    check_prompt_order,
    load_prompts,
    require_records,
)
from chatlearn_vllm.job.placement import place
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.modules.megatron_module import MegatronModule
from chatlearn_vllm.modules.vllm_module import VLLMModule
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.observability.metrics import MetricWriter
from chatlearn_vllm.observability.progress import EpisodeProgress
from chatlearn_vllm.observability.timers import PhaseTimers
from chatlearn_vllm.runtime.checkpoint import (
    DriverState,
    check_trainers,
    load_state,
    remove_states,
    save_state,
    saved_episodes,
)
from chatlearn_vllm.runtime.cluster import Cluster
from chatlearn_vllm.runtime.evaluator import Evaluator
from chatlearn_vllm.runtime.named_servers import check_named_servers
from chatlearn_vllm.runtime.rollout_checks import check_model_has, check_room_for_rollouts
from chatlearn_vllm.runtime.stop_request import AbandonedError, StopRequest
from chatlearn_vllm.runtime.vocabulary_checks import check_tokenizer, check_vocabularies
from chatlearn_vllm.runtime.worker_group import WorkerGroup, gather

logger = get_logger(__name__)


class BaseEngine(ABC):
    """Runs a job: places the modules' ranks, loops over episodes, leaves nothing behind.

    Episodes are numbered from 1; "episode 0" is what is measured before training.

    Example:
        engine.set_dataset(prompts)
        history = engine.learn()
    """

    def __init__(self, *modules: BaseModule) -> None:
        """Keep the modules.

        Args:
            modules: all roles of the job, in the order in which they are set up; what is in
                device memory while a later one is built should come first and be offloaded.
        """
        self.modules = modules
        self.job = modules[0].job
        self.args = self.job.runtime
        self.timers = PhaseTimers()
        self.samples_per_prompt = 1
        """Training samples that are made of one drawn prompt."""
        self.evaluator: Evaluator | None = None
        self.groups: dict[str, WorkerGroup] = {}
        """Running ranks by model name; empty before `setup`."""
        self.resumed_from: DriverState | None = None
        """Where an earlier run of this job stopped; None starts at the beginning."""
        self._saved_episode: int | None = None
        self._unconfirmed: DriverState | None = None
        """Of the episode whose trainers are saved and whose line of metrics is still to come."""
        self._stop = StopRequest(self._can_go_on)
        self._records: Sequence[Any] | None = None
        self._num_records = 0
        self._cluster: Cluster | None = None

    # ---- what users call --------------------------------------------------------------------

    def set_dataset(self, prompts: Sequence[Any]) -> Self:
        """Say what to train on; without it, `runtime.data_path` is read.

        Args:
            prompts: strings, or dicts as read from a jsonl file by `load_prompts`.

        Returns:
            This engine.

        Raises:
            UserError: it is a path.
        """
        require_records(prompts)
        self._records = prompts
        return self

    def set_evaluator(self, evaluator: Evaluator) -> None:
        """Evaluate as `runtime.eval_episode_interval` and `enable_eval_before_training` say.

        Raises:
            UserError: the evaluator uses a module that is not part of this engine.
        """
        for module in evaluator.modules:
            if module not in self.modules:
                raise UserError(
                    f"the evaluator's module {module.name!r} is not one of this engine's: "
                    + ", ".join(own.name for own in self.modules)
                )
        self.evaluator = evaluator

    def learn(self) -> list[dict[str, float]]:
        """Run the whole job; what an earlier run has finished already starts nothing.

        Returns:
            The metrics of each episode of this run, with "episode", as in metrics.jsonl.

        Raises:
            RankError: a rank failed; every process of the job has ended when it arrives.
        """
        if self._is_finished():
            return []
        with self.running():
            return self._run_episodes()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block all models run; however it ends, no process is left.

        Raises:
            RankError: a rank failed.
        """
        try:
            self.setup()
            yield
            for group in self.groups.values():
                group.call("shutdown")
        except BaseException:
            self.teardown(failed=True)
            raise
        self.teardown()

    # ---- what kinds of training define ------------------------------------------------------

    @abstractmethod
    def run_episode(self, episode: int) -> dict[str, float]:
        """Do the work of one episode and return its metrics."""

    def before_episodes(self) -> dict[str, float]:
        """Do what comes before the first episode; metrics, if any, are those of episode 0."""
        return {}

    @abstractmethod
    def save_all(self, state: DriverState) -> None:
        """Save everything that is trained before the job ends; other models have ended.

        Args:
            state: to be given to `save`.
        """

    def model_is_built(self, module: BaseModule) -> None:
        """Called after the ranks of `module` are set up and before those of the next one."""

    def count_prompts(self, records: Sequence[Any]) -> int:
        """Hand the training records to who needs them; return how many there are to draw."""
        return len(records)

    @property
    def weight_version(self) -> int:
        """Version that a checkpoint notes down."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint notes down of this kind of training; JSON.

        The next episode may have begun when it is written: it does not change afterwards.
        """
        return {}

    def state_batches(self) -> Any:
        """What a checkpoint holds of this kind of training that is no JSON; None for nothing."""
        return None

    # ---- set-up and tear-down ---------------------------------------------------------------

    def setup(self) -> None:
        """Start the ranks, build the models, and go to where an earlier run stopped."""
        records = self._training_records()
        self._num_records = len(records)
        if self.args.enable_resume_training:
            self.resumed_from = load_state(
                self._state_dir, self.args.load_data_checkpoint_iteration
            )
        if self.resumed_from is not None:
            self._check_resumable(self.resumed_from)
        self.start_models()
        self.sampler = PromptSampler(
            self.count_prompts(records), self.args.seed, self.args.data_shuffle
        )
        self.sampler.next(self.args.consumed_samples // self.samples_per_prompt)
        if self.resumed_from is not None:
            self.sampler.load_state_dict(self.resumed_from.sampler)
            logger.info("resumed after episode %d", self.finished_episodes)

    def _is_finished(self) -> bool:
        """Whether the checkpoint to go on from is that of the last episode."""
        episodes = saved_episodes(self._state_dir) if self.args.enable_resume_training else []
        newest = self.args.load_data_checkpoint_iteration or max(episodes, default=0)
        if newest not in episodes or newest < self.args.num_episode:
            return False
        logger.warning(
            "%s has the checkpoint of episode %d, and runtime.num_episode=%d: nothing is left to "
            "do; raise that key to go on, or set another runtime.exp_name to start anew",
            self._state_dir, newest, self.args.num_episode,
        )  # fmt: skip
        return True

    def _check_resumable(self, state: DriverState) -> None:
        """Check what can be checked of a checkpoint before anything starts.

        Raises:
            UserError: it is damaged, or of a job with other prompts or another order of them.
        """
        check_prompt_order(state.sampler, seed=self.args.seed, shuffle=self.args.data_shuffle)
        if state.has_prompt_per_record:  # else the policy's ranks have to count its prompts
            check_prompt_order(state.sampler, num_prompts=self._num_records)
        directories = [trainer.checkpoint_dir for trainer in self._megatron_trainers()]
        check_trainers(self._state_dir, state.episode, directories)
        if state.algorithm not in ("", type(self).__name__):
            logger.warning(
                "resuming with %s what %s has trained in %s, optimizer states included; another "
                "runtime.exp_name starts anew",
                type(self).__name__, state.algorithm, self._state_dir,
            )  # fmt: skip

    def start_models(self) -> None:
        """Start all ranks, build the models in order, hand out the evaluation's prompts.

        Raises:
            UserError: the evaluator has no prompts, a model has not what its keys ask for, or
                another vocabulary than the policy, which may have no tokenizer, a directory cannot
                be written, or a server that the yaml names is not there; nothing is started then.
        """
        if self.evaluator is not None:
            self.evaluator.require_prompts()
        names = [module.name for module in self.modules]
        if idle := [f"models.{name}" for name in self.job.models if name not in names]:
            engine = type(self).__name__
            logger.warning("not started, as this %s has no use for it: %s", engine, ", ".join(idle))
        for module in self.modules:
            if isinstance(module, VLLMModule):
                check_model_has(module)
        *others, last = self.modules
        if isinstance(last, VLLMModule):  # the policy: kinds of training put it there
            check_vocabularies(last, others)
            check_room_for_rollouts(last, others)
            check_tokenizer(last)
        for key, directory in (
            ("output_dir", self.run_dir), ("data_checkpoint_path", self._state_dir),
        ):  # fmt: skip
            _require_writable(f"runtime.{key}", directory)
        check_named_servers(self.modules)
        self._cluster = Cluster(self.job, self.modules)
        self.groups = self._cluster.start()
        imports = [call for group in self.groups.values() for call in group.start("preload")]
        for module in self.modules:
            self._build_model(module)
        gather(imports)
        if self.evaluator is not None:
            self.evaluator.setup(self.groups)

    def shares_devices(self, module: BaseModule) -> bool:
        """Whether another model of this job runs on the devices of this one."""
        plan = place(self.job, only=[own.name for own in self.modules])
        return plan.shares_devices(module.name)

    def teardown(self, failed: bool = False) -> None:
        """End every process of the job; safe at any point of `setup` or `learn`, and twice.

        Args:
            failed: keep Ray's logs in `run_dir/ray_logs`.
        """
        cluster, self._cluster, self.groups = self._cluster, None, {}
        if cluster is not None:
            cluster.stop(keep_logs_in=self.run_dir / "ray_logs" if failed else None)

    @property
    def run_dir(self) -> Path:
        """Where this job writes."""
        return self.args.run_dir

    @property
    def finished_episodes(self) -> int:
        """Episodes that an earlier run of this job finished."""
        return self.resumed_from.episode if self.resumed_from else 0

    @property
    def _state_dir(self) -> Path:
        if self.args.data_checkpoint_path is not None:
            path = Path(self.args.data_checkpoint_path)
            return path if self.args.exp_name in path.parts else path / self.args.exp_name
        return self.run_dir / "checkpoints" / "driver"

    def _training_records(self) -> Sequence[Any]:
        records = self._records
        if records is None:
            if self.args.data_path is None:
                raise UserError("no training data: call set_dataset() or set runtime.data_path")
            records = load_prompts(self.args.data_path, self.args.training_data_num_limit)
        if not records:
            raise UserError("no training data: the dataset is empty")
        return records

    def _build_model(self, module: BaseModule) -> None:
        start = time.perf_counter()
        group = self.groups[module.name]
        group.call("init")
        group.call("model_setup")
        group.call("validate")
        if self.resumed_from is not None and module.module_args.trainable:
            group.call("load_checkpoint", self.resumed_from.episode)
        self.model_is_built(module)
        logger.info(
            "%s: %d ranks ready in %.1f s",
            module.name,
            len(group.ranks),
            time.perf_counter() - start,
        )

    # ---- episodes ---------------------------------------------------------------------------

    def _run_episodes(self) -> list[dict[str, float]]:
        done, total = self.finished_episodes, self.args.num_episode
        history = []
        with (
            MetricWriter(self.run_dir, first_episode=done + 1 if done else 0) as writer,
            EpisodeProgress(total, done) as progress,
            self._stop,
        ):
            before = self.before_episodes()
            self.timers.take()
            if before and done == 0:
                writer.write(0, before)
                progress.update(0, before)
                history.append({"episode": 0, **before})
            for episode in range(done + 1, total + 1):
                before_it = self._driver_state(episode - 1)
                try:
                    metrics = self._run_timed_episode(episode)
                except AbandonedError:
                    self._end_early(before_it)
                    break
                writer.write(episode, metrics)
                self._confirm_checkpoint(wait=False)
                history.append({"episode": episode, **metrics})
                if episode % self.args.log_interval == 0 or episode == total:
                    progress.update(episode, metrics)
                if self._stop.is_made:
                    self._end_early(self._driver_state(episode))
                    break
            self._confirm_checkpoint()
        return history

    def _run_timed_episode(self, episode: int) -> dict[str, float]:
        with self.timers.phase("episode"):
            for group in self.groups.values():
                group.call("before_episode")
            metrics = self.run_episode(episode)
            for group in self.groups.values():
                group.call("after_episode")
        seconds = self.timers.take()
        # What no phase accounts for: the driver's own work, and hooks before and after.
        seconds["other"] = 2 * seconds["episode"] - sum(seconds.values())
        return metrics | {f"time/{phase}_s": spent for phase, spent in seconds.items()}

    def save_if_due(self, trainer: WorkerGroup, episode: int, *, is_last: bool = True) -> None:
        """Save a trainer every `save_episode_interval` episodes, and after the last one.

        Call it while the trainer is in device memory.

        Args:
            trainer: one of the models that are trained.
            episode: number of the episode.
            is_last: whether all others are saved already; then the driver's state makes the
                checkpoint complete, as soon as the episode is over and its metrics are written.
        """
        interval = self.args.save_episode_interval
        if interval is not None and (episode % interval == 0 or episode == self.args.num_episode):
            self.save(trainer, episode, is_last=is_last)

    def save(
        self,
        trainer: WorkerGroup,
        episode: int,
        *,
        is_last: bool = True,
        state: DriverState | None = None,
    ) -> None:
        """Save a trainer now; see `save_if_due`.

        Args:
            trainer: one of the models that are trained.
            episode: number of the episode.
            is_last: see `save_if_due`.
            state: of the driver after that episode; None: as it is now.
        """
        with self.timers.phase("save"):
            if self._unconfirmed is not None:
                self._confirm_checkpoint()
            # An earlier run may have left that episode's, which speaks of other files.
            remove_states(self._state_dir, [episode])
            trainer.call("save_checkpoint", episode)
            if is_last:
                self._unconfirmed = state or self._driver_state(episode)

    def _driver_state(self, episode: int) -> DriverState:
        """What a checkpoint of an episode notes down, as it is now."""
        return DriverState(
            episode,
            self.weight_version,
            self.sampler.state_dict(),
            self.state_dict(),
            self.state_batches(),
            type(self).__name__,
            self._num_records,
        )

    def _confirm_checkpoint(self, *, wait: bool = True) -> None:
        """Say that the checkpoint of a finished episode is complete; remove what it replaces.

        Args:
            wait: for what trainers write in the background; else do nothing while they do.
        """
        if self._unconfirmed is None:
            return
        groups = [self.groups[trainer.name] for trainer in self._megatron_trainers()]
        if self.args.async_save:
            if not wait and not all(all(group.call("is_checkpoint_written")) for group in groups):
                return
            for group in groups:
                group.call("finish_checkpoint")
        state, self._unconfirmed = self._unconfirmed, None
        save_state(self._state_dir, state, keep=self.args.max_data_ckpt_nums)
        if self._saved_episode is None:
            self._remove_later_states(state.episode)
        self._saved_episode = state.episode
        if self.args.max_ckpt_to_keep is not None:
            self._remove_old_checkpoints(state.episode, self.args.max_ckpt_to_keep)

    def _remove_later_states(self, episode: int) -> None:
        """What an earlier run did after the point that this one went on from is no part of it."""
        others = [
            other
            for other in saved_episodes(self._state_dir)
            if other > self.finished_episodes and other != episode
        ]
        remove_states(self._state_dir, others)
        if others:
            logger.warning(
                "episodes %s of an earlier run can no longer be resumed from: this run went on "
                "from episode %d", ", ".join(map(str, others)), self.finished_episodes,
            )  # fmt: skip

    def _remove_old_checkpoints(self, newest: int, keep: int) -> None:
        """Remove all trainers' checkpoints but some, and the positions that belonged to them."""
        protected = [self.finished_episodes]
        removed: set[int] = set()
        for trainer in self._megatron_trainers():
            group = self.groups[trainer.name]
            removed.update(group.call("prune_checkpoints", keep, newest, protected)[0])
        remove_states(self._state_dir, removed)

    def _megatron_trainers(self) -> list[MegatronModule]:
        return [
            module
            for module in self.modules
            if module.module_args.trainable and isinstance(module, MegatronModule)
        ]

    def _end_frozen_models(self) -> None:
        """What they still work on is not needed, and their device memory is."""
        frozen = [module.name for module in self.modules if not module.module_args.trainable]
        self._cluster.end(frozen)
        self.groups = {name: group for name, group in self.groups.items() if name not in frozen}

    def _can_go_on(self) -> bool:
        return self._cluster is not None and self._cluster.outlives_signal()

    def _end_early(self, state: DriverState) -> None:
        """Save, unless that has been done, or nothing is to be saved.

        Args:
            state: of the last episode that is finished.
        """
        episode = state.episode
        self._confirm_checkpoint()
        is_saved = episode in (self._saved_episode, self.finished_episodes)
        if self.args.save_episode_interval is not None and not is_saved:
            self._end_frozen_models()
            self.save_all(state)
            self._confirm_checkpoint()
        saved = self._saved_episode or self.finished_episodes
        logger.warning(
            "ended by SIGTERM after episode %d of %d%s", episode, self.args.num_episode,
            f"; enable_resume_training: True goes on after episode {saved}" if saved else "",
        )  # fmt: skip


def _require_writable(key: str, directory: Path) -> None:
    """Make a directory, if it is missing, in which the job will write."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        problem = None if os.access(directory, os.W_OK) else "it is read-only for this user"
    except OSError as error:
        problem = str(error)
    if problem is not None:
        raise UserError(f"{key}: cannot write in {directory}: {problem}; name another directory")
