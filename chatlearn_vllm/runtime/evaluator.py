"""How well does the policy answer prompts that it is not trained on?"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch

from chatlearn_vllm.config.problems import UserError
from chatlearn_vllm.data.batch import Batch, batch_size
from chatlearn_vllm.data.prompts import load_prompts, require_records
from chatlearn_vllm.job.flow import Call, FlowError, FlowFunction, Handle, apply, record
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.observability.logging import get_logger
from chatlearn_vllm.observability.tables import metric_table, sample_table
from chatlearn_vllm.runtime.episode_metrics import reward_metrics
from chatlearn_vllm.runtime.flow_steps import (
    call_function,
    merged,
    policy_call,
    require_frozen,
    run_flow,
)
from chatlearn_vllm.runtime.rollout import Rollout
from chatlearn_vllm.runtime.scores import required_column
from chatlearn_vllm.runtime.worker_group import WorkerGroup

logger = get_logger(__name__)

SAMPLE_FIELDS_LEFT_OUT = ("no_padded_query_ids", "all_tokens", "loss_mask", "logprobs")
TABLE_COLUMNS = {"str_prompts": "prompt", "str_outputs": "answer", "rewards": "reward"}
"""Of a batch -> what they are called in the table of samples."""
TABLE_ROWS = 4


class Evaluator:
    """Answers the evaluation prompts with the `eval_*` sampling keys and scores the answers.

    Example:
        engine.set_evaluator(Evaluator(policy, reward, eval_prompts))  # or a list of rewards

        def eval_flow(prompts):
            return reward.eval_forward(policy.eval_forward(prompts))

        engine.set_evaluator(Evaluator(eval_flow).set_dataset(eval_prompts))
    """

    def __init__(
        self,
        policy: BaseModule | FlowFunction,
        reward: BaseModule | Sequence[BaseModule] | None = None,
        prompts: Sequence[Any] | None = None,
    ) -> None:
        """Say who answers, who scores and what is asked.

        Args:
            policy: a flow, see docs/flows.md: calls `eval_forward` of a policy on its argument, of
                others on the policy's samples, and returns what is looked at. Or a policy of the
                engine (a `VLLMModule`), which stands for the flow that `reward` scores.
            reward: with a policy; a module of the engine, or several, whose rewards are added as in
                training, each times its `reward_weight`. Its `eval_forward` returns `rewards` [B],
                and `accuracy` [B] if it can tell right from wrong.
            prompts: strings, or dicts as read from a jsonl file; None: see `set_dataset`.

        Raises:
            FlowError: the flow is none, or does what an evaluation cannot do.
        """
        is_flow = not isinstance(policy, BaseModule)
        rewards = [reward] if isinstance(reward, BaseModule) else reward
        if is_flow != (reward is None) or not (is_flow or _are_modules(rewards)):
            raise FlowError(
                "Evaluator takes a policy, a reward module and prompts, or a flow: "
                "Evaluator(policy, reward, prompts), with a list of modules in the place of reward "
                "if there are several, or Evaluator(eval_flow, prompts=prompts)"
            )
        self.flow = record(policy if is_flow else _scored_by(rewards, policy))
        self.flow.require_methods("eval_forward")
        self.flow.require_result()
        self._policy_call = policy_call(self.flow, "eval_forward")
        require_frozen(self.flow, self.modules)
        self._prompts: Sequence[Any] | None = None
        if prompts is not None:
            self.set_dataset(prompts)
        self._num_prompts = 0
        self._last: Mapping[str, float] = {}
        """Metrics of the last evaluation."""

    @property
    def modules(self) -> tuple[BaseModule, ...]:
        """All that it calls."""
        return self.flow.modules

    @property
    def policy(self) -> BaseModule:
        """Who answers."""
        return self._policy_call.module

    def set_dataset(self, prompts: Sequence[Any]) -> Self:
        """Say what is asked; without it, `runtime.eval_data_path` is read.

        Args:
            prompts: strings, or dicts as read from a jsonl file.

        Returns:
            This evaluator.

        Raises:
            UserError: there is no prompt, or it is a path.
        """
        require_records(prompts)
        if not prompts:
            raise UserError("Evaluator needs at least one prompt")
        self._prompts = prompts
        return self

    def require_prompts(self) -> Sequence[Any]:
        """The prompts; read from `runtime.eval_data_path` if none were set.

        Raises:
            UserError: there is neither.
        """
        if self._prompts is None:
            args = self.policy.runtime_args
            if args.eval_data_path is None:
                raise UserError(
                    "no evaluation data: call set_dataset() or set runtime.eval_data_path"
                )
            self.set_dataset(load_prompts(args.eval_data_path, args.eval_data_num_limit))
        return self._prompts

    def setup(self, groups: Mapping[str, WorkerGroup]) -> None:
        """Hand the prompts to the policy's ranks. Once, before the first `evaluate`."""
        self._num_prompts = groups[self.policy.name].call(
            "build_prompts", self.require_prompts(), is_eval=True
        )[0]

    def evaluate(
        self,
        groups: Mapping[str, WorkerGroup],
        episode: int,
        output_dir: Path,
        in_memory: Callable[[BaseModule], AbstractContextManager[None]] = nullcontext,
        train_iteration: int | None = None,
    ) -> dict[str, float]:
        """Answer and score all prompts; one response each.

        Args:
            groups: the running models by name.
            episode: how many episodes the weights have been trained for.
            output_dir: the samples go to `eval/episode_<episode>.jsonl` in it, a table of the
                metrics and of some samples to `eval/episode_<episode>.txt` and to the log.
            in_memory: a module scores in a block of this, where it may have to be brought to its
                device; the policy stays awake beside it.
            train_iteration: how many optimizer steps the weights have been trained for; None: as
                many as the yaml says for so many episodes.

        Returns:
            `eval/reward_mean`, `eval/reward_std` and `eval/accuracy` (of what the flow returns, if
            there is any), of several rewards the mean of each before its weight,
            `eval/num_samples`, and what `post_process_func` adds.

        Raises:
            RankError: a rank failed.
            FlowError: results do not fit together.
        """
        metrics: dict[str, float] = {}

        def run_call(call: Call, inputs: Batch) -> Batch:
            if call.module is None:
                columns, found = call_function(self.flow, call, inputs)
                metrics.update(found)
                return columns
            group = groups[call.module.name]
            if call is self._policy_call:
                # All split beforehand, so that a repeated evaluation gives the same.
                return Rollout(group).generate(
                    range(self._num_prompts),
                    first_sample=0,
                    samples_per_prompt=1,
                    iteration=episode,
                    is_eval=True,
                )
            with in_memory(call.module):
                return group.forward("eval_forward", inputs, episode)

        results = run_flow(self.flow, run_call)
        batch = merged(self.flow, "the returned handles", self.flow.returned, results)
        if "rewards" in batch:
            metrics = {**reward_metrics(batch, "eval"), **metrics}
        metrics["eval/num_samples"] = batch_size(batch)
        of_module: dict[str, list[Batch]] = {}
        for call in self.flow.calls:
            if call.module is not None:
                of_module.setdefault(call.module.name, []).append(results[call])
        if train_iteration is None:
            train_iteration = episode * _steps_per_episode(self.policy)
        eval_info = {"episode_iteration": episode, "train_iteration": train_iteration}
        metrics |= self.post_process_func(of_module, eval_info) or {}
        self._report(output_dir / "eval" / f"episode_{episode:06d}", batch, metrics)
        return metrics

    def post_process_func(
        self, results: dict[str, list[Batch]], eval_info: dict[str, int]
    ) -> Mapping[str, float] | None:
        """User hook: look at all results of an evaluation.

        Args:
            results: for each module, by name, one batch per call of it in the flow: its columns
                and those of its inputs. All rows, on the CPU.
            eval_info: `episode_iteration` and `train_iteration`: episodes and optimizer steps that
                the weights have been trained for.

        Returns:
            Further metrics; they go where the others go.
        """

    def _report(self, path: Path, batch: Batch, metrics: Mapping[str, float]) -> None:
        """Write samples and tables to files that begin with `path`, the tables to the log, too."""
        write_samples(path.with_suffix(".jsonl"), batch)
        columns = {
            title: _entries(batch[key]) for key, title in TABLE_COLUMNS.items() if key in batch
        }
        tables = metric_table(metrics, self._last)
        if columns:
            tables += f"\n\n{sample_table(columns, TABLE_ROWS)}"
        path.with_suffix(".txt").write_text(tables + "\n", encoding="utf-8")
        logger.info("%s\n%s", path.with_suffix(".txt"), tables)
        self._last = metrics


def write_samples(path: Path, batch: Batch) -> None:
    """Write a batch for people: one JSON object per sample, without per-token tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        key: _entries(value) for key, value in batch.items() if key not in SAMPLE_FIELDS_LEFT_OUT
    }
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        for row in range(batch_size(batch)):
            sample = {key: column[row] for key, column in columns.items()}
            file.write(json.dumps(sample, ensure_ascii=False, default=str) + "\n")
    os.replace(unfinished, path)


def _are_modules(rewards: Any) -> bool:
    return (
        isinstance(rewards, Sequence)
        and bool(rewards)
        and all(isinstance(reward, BaseModule) for reward in rewards)
    )


def _scored_by(rewards: Sequence[BaseModule], policy: BaseModule) -> FlowFunction:
    def eval_flow(prompts: Handle) -> Handle:
        answers = policy.eval_forward(prompts)
        if len(rewards) == 1:
            return rewards[0].eval_forward(answers)
        for reward in rewards:
            answers = apply(_kept(reward), reward.eval_forward(answers))
        return apply(_sum_of(rewards), answers)

    return eval_flow


def _kept(reward: BaseModule) -> Callable[[Batch], tuple[Batch, dict[str, float]]]:
    def keep(batch: Batch) -> tuple[Batch, dict[str, float]]:
        scores = required_column(reward.name, batch, "rewards")
        name = f"rewards/{reward.name}"
        return {name: scores}, {f"eval/{name}_mean": scores.mean().item()}

    return keep


def _sum_of(rewards: Sequence[BaseModule]) -> Callable[[Batch], Batch]:
    def add(batch: Batch) -> Batch:
        return {
            "rewards": sum(
                reward.module_args.reward_weight * batch[f"rewards/{reward.name}"]
                for reward in rewards
            )
        }

    return add


def _steps_per_episode(module: BaseModule) -> int:
    args = module.runtime_args
    steps = math.ceil(args.sample_per_episode / args.train_global_batch_size)
    return steps * args.num_training_epoch


def _entries(column: Any) -> list[Any]:
    return column.tolist() if isinstance(column, torch.Tensor) else column
