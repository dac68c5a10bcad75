"""Do the numbers of an episode equal those worked out by hand?"""

import json
import math

import pytest
import torch

from chatlearn_vllm.runtime.episode_metrics import (
    reward_metrics,
    rollout_metrics,
    sync_metrics,
    train_metrics,
)
from chatlearn_vllm.runtime.weight_synchronizer import SyncReport


def test_response_tokens_are_counted_per_row_and_per_second():
    mask = torch.tensor([[0.0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1]])
    metrics = rollout_metrics({"loss_mask": mask}, seconds=0.5)
    assert json.loads(json.dumps(metrics)) == {
        "rollout/num_samples": 3,
        "rollout/response_tokens_mean": 2.0,
        "rollout/response_tokens_max": 3.0,
        "rollout/tokens_per_s": 12.0,
    }
    assert math.isfinite(rollout_metrics({"loss_mask": mask}, seconds=0.0)["rollout/tokens_per_s"])


@pytest.mark.parametrize("rewards", [[1, 3, 8], torch.tensor([1.0, 3.0, 8.0])])
def test_rewards_have_a_mean_and_the_deviation_of_a_whole_population(rewards):
    # (9 + 1 + 16) / 3
    metrics = reward_metrics({"rewards": rewards}, "rollout")
    assert metrics == {
        "rollout/reward_mean": 4.0,
        "rollout/reward_std": pytest.approx(math.sqrt(26 / 3)),
    }
    json.dumps(metrics)


@pytest.mark.parametrize("accuracy", [[True, False, True, True], torch.tensor([1.0, 0, 1, 1])])
def test_accuracy_is_the_share_of_right_rows(accuracy):
    metrics = reward_metrics({"rewards": torch.zeros(4), "accuracy": accuracy}, "eval")
    assert metrics == {"eval/reward_mean": 0.0, "eval/reward_std": 0.0, "eval/accuracy": 0.75}
    json.dumps(metrics)


def test_losses_are_averaged_over_the_steps_and_the_ranks_that_report_them():
    ranks = [[{"loss": 1.0, "kl": 2.0}, {"loss": 3.0}], None, [], [{"loss": 8.0}, {"kl": 5.0}]]
    assert train_metrics(ranks) == {"train/loss": 4.0, "train/kl": 3.5}
    assert train_metrics([[{"loss": 1.0}]], "train_value") == {"train_value/loss": 1.0}
    assert train_metrics([None, []]) == {}


def test_a_weight_sync_has_seconds_and_bytes():
    assert sync_metrics(SyncReport(version=3, num_bytes=64, seconds=0.5)) == {
        "sync/seconds": 0.5,
        "sync/bytes": 64,
    }
