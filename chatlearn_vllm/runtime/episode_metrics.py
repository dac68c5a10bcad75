"""Which numbers describe an episode? Names are `phase/quantity_unit`, the same in every sink."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch

from chatlearn_vllm.data.batch import Batch, batch_size
from chatlearn_vllm.runtime.weight_synchronizer import SyncReport

StepStats = dict[str, float]


def rollout_metrics(batch: Batch, seconds: float) -> dict[str, float]:
    """Lengths in tokens and the speed of generation, tokens per second over all replicas."""
    lengths = batch["loss_mask"].sum(dim=1)
    return {
        "rollout/num_samples": batch_size(batch),
        "rollout/response_tokens_mean": lengths.mean().item(),
        "rollout/response_tokens_max": lengths.max().item(),
        "rollout/tokens_per_s": lengths.sum().item() / max(seconds, 1e-9),
    }


def reward_metrics(batch: Batch, prefix: str) -> dict[str, float]:
    """Mean and spread of the reward; accuracy where the reward model says which rows are right.

    Args:
        batch: with `rewards` [B], and `accuracy` [B] in [0, 1] if there is one.
        prefix: "rollout" or "eval".
    """
    rewards = torch.as_tensor(batch["rewards"]).float()
    metrics = {
        f"{prefix}/reward_mean": rewards.mean().item(),
        f"{prefix}/reward_std": rewards.std(unbiased=False).item(),
    }
    if "accuracy" in batch:
        metrics[f"{prefix}/accuracy"] = fmean(batch["accuracy"])
    return metrics


def train_metrics(
    stats_of_ranks: Sequence[Sequence[StepStats] | None], prefix: str = "train"
) -> dict[str, float]:
    """Mean over the optimizer steps of an episode and over the ranks that report.

    Args:
        stats_of_ranks: what `train` returned on each rank, one dict per optimizer step. Ranks
            without a loss, such as the first pipeline stages, return an empty list or None.
        prefix: of the metrics' names.
    """
    steps = [step for stats in stats_of_ranks if stats for step in stats]
    names = dict.fromkeys(name for step in steps for name in step)
    return {
        f"{prefix}/{name}": fmean(step[name] for step in steps if name in step) for name in names
    }


def sync_metrics(report: SyncReport) -> dict[str, float]:
    """What a weight sync moved, and how long it took."""
    return {"sync/seconds": report.seconds, "sync/bytes": report.num_bytes}
