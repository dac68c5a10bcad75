"""How well does the policy answer prompts that it is not trained on?"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from chatlearn_vllm.data.batch import Batch, batch_size
from chatlearn_vllm.modules.base import BaseModule
from chatlearn_vllm.runtime.episode_metrics import reward_metrics
from chatlearn_vllm.runtime.rollout import generate
from chatlearn_vllm.runtime.worker_group import WorkerGroup

SAMPLE_FIELDS_LEFT_OUT = ("no_padded_query_ids", "all_tokens", "loss_mask", "logprobs")


class Evaluator:
    """Answers the evaluation prompts with the `eval_*` sampling keys and scores the answers.

    Example:
        engine.set_evaluator(Evaluator(policy, reward, eval_prompts))
    """

    def __init__(self, policy: BaseModule, reward: BaseModule, prompts: Sequence[Any]) -> None:
        """Say who answers, who scores and what is asked.

        Args:
            policy: a `VLLMModule` of the engine; its `eval_forward` is called per scheduler step.
            reward: a module of the engine; its `eval_forward` returns `rewards` [B], and
                `accuracy` [B] if it can tell right from wrong.
            prompts: strings, or dicts as read from a jsonl file.
        """
        if not prompts:
            raise ValueError("Evaluator needs at least one prompt")
        self.policy = policy
        self.reward = reward
        self.prompts = prompts
        self._num_prompts = 0

    def setup(self, groups: Mapping[str, WorkerGroup]) -> None:
        """Hand the prompts to the policy's ranks. Once, before the first `evaluate`."""
        self._num_prompts = groups[self.policy.name].call(
            "build_prompts", self.prompts, is_eval=True
        )[0]

    def evaluate(
        self,
        groups: Mapping[str, WorkerGroup],
        episode: int,
        output_dir: Path,
        in_memory: Callable[[BaseModule], AbstractContextManager[None]] = nullcontext,
    ) -> dict[str, float]:
        """Answer and score all prompts; one response each.

        Args:
            groups: the running models by name.
            episode: how many episodes the weights have been trained for.
            output_dir: the samples go to `eval/episode_<episode>.jsonl` in it.
            in_memory: the reward module scores in a block of this, where it may have to be brought
                to its device; the policy stays awake beside it.

        Returns:
            `eval/reward_mean`, `eval/accuracy` (if the reward model reports one), and
            `eval/num_samples`.
        """
        batch = generate(
            groups[self.policy.name],
            range(self._num_prompts),
            first_sample=0,
            samples_per_prompt=1,
            iteration=episode,
            is_eval=True,
        )
        with in_memory(self.reward):
            batch |= groups[self.reward.name].forward("eval_forward", batch, episode)
        write_samples(output_dir / "eval" / f"episode_{episode:06d}.jsonl", batch)
        return {**reward_metrics(batch, "eval"), "eval/num_samples": batch_size(batch)}


def write_samples(path: Path, batch: Batch) -> None:
    """Write a batch for people: one JSON object per sample, without per-token tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        key: value.tolist() if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key not in SAMPLE_FIELDS_LEFT_OUT
    }
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        for row in range(batch_size(batch)):
            sample = {key: column[row] for key, column in columns.items()}
            file.write(json.dumps(sample, ensure_ascii=False, default=str) + "\n")
    os.replace(unfinished, path)
