"""When is drafting switched off and on, and what does an episode tell of it?"""

import logging

import pytest
import yaml

from chatlearn_vllm.config import load_config
from chatlearn_vllm.engines.speculation import SpeculationStats
from chatlearn_vllm.runtime.grpo_engine import GRPOEngine
from chatlearn_vllm.runtime.speculation import SpeculationSwitch
from tests.helpers.toy_modules import ToyModule, ToyTrainer


class Policy:
    """Two replicas of two ranks, whose rollouts gain what the test says."""

    name = "policy"
    replicas = ((0, 1), (2, 3))

    def __init__(self) -> None:
        self.gain, self.drafts, self.calls = None, True, []

    def call(self, method, *args):
        if method == "set_speculation":
            [self.drafts] = args
            self.calls.append(self.drafts)
            return [None] * 4
        assert method == "take_speculation_stats"
        stats = SpeculationStats()
        if self.drafts:
            stats += SpeculationStats(100, 300, 150)
        if self.gain is not None:
            stats += SpeculationStats(0, 0, 0, int(1000 * self.gain), 1.0, 1000, 1.0)
        return [stats] * 4


def run(policy, switch, gains) -> list[float]:
    """Rollouts with these gains; whether each was begun with drafts."""
    enabled = []
    for version, policy.gain in enumerate(gains, start=1):
        enabled.append(switch.after_rollout(version)["rollout/spec_enabled"])
    return enabled


def test_the_metrics_count_each_replica_once() -> None:
    policy = Policy()
    policy.gain = 1.25
    assert SpeculationSwitch(policy, 1.0).after_rollout(3) == {
        "rollout/spec_enabled": 1.0,
        "rollout/spec_drafts": 200.0,
        "rollout/spec_acceptance_rate": 0.5,
        "rollout/spec_accepted_length": 2.5,
        "rollout/spec_gain": 1.25,
    }
    policy.gain, policy.drafts = None, False
    assert SpeculationSwitch(policy, 1.0).after_rollout(3) == {
        "rollout/spec_enabled": 1.0, "rollout/spec_drafts": 0.0,
    }  # fmt: skip


def test_an_evaluation_has_metrics_of_its_own() -> None:
    assert SpeculationSwitch(Policy(), 1.0).after_evaluation() == {
        "eval/spec_drafts": 200.0,
        "eval/spec_acceptance_rate": 0.5,
        "eval/spec_accepted_length": 2.5,
    }


def test_two_slow_rollouts_in_a_row_end_drafting_and_two_fast_ones_bring_it_back() -> None:
    policy = Policy()
    gains = [0.9, 1.1, 0.9, 0.8, 1.2, 1.02, 1.06, 1.2, 1.2]
    enabled = run(policy, SpeculationSwitch(policy, 1.0), gains)
    assert enabled == [1, 1, 1, 1, 0, 0, 0, 0, 1]
    assert policy.calls == [False, True]


def test_drafts_that_gain_just_enough_stay_and_come_back() -> None:
    policy = Policy()
    assert run(policy, SpeculationSwitch(policy, 1.0), [1.0, 1.0, 1.0]) == [1, 1, 1]
    gains = [0.5, 0.5, 1.05, 1.05, 1.0]  # 1.05 is the margin
    assert run(policy, SpeculationSwitch(policy, 1.0), gains) == [1, 1, 0, 0, 1]


def test_rollouts_that_measured_nothing_say_nothing() -> None:
    policy = Policy()
    enabled = run(policy, SpeculationSwitch(policy, 1.0), [0.9, None, None, 0.8, 0.8])
    assert enabled == [1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("min_gain", "enabled"), [(0.0, [1, 1, 1]), (0.5, [1, 1, 1]), (2, [1, 1, 0])]
)
def test_the_yaml_says_how_much_drafts_must_gain(min_gain, enabled) -> None:
    policy = Policy()
    assert run(policy, SpeculationSwitch(policy, min_gain), [0.7, 0.7, 0.7]) == enabled


def test_the_log_says_why(caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("chatlearn_vllm"), "propagate", True)
    policy = Policy()
    with caplog.at_level(logging.INFO):
        run(policy, SpeculationSwitch(policy, 1.0), [0.71, 0.8])
    [message] = caplog.messages
    assert message == (
        "policy: no drafts from now on: generating with drafts was 0.71 and 0.80 times as fast as "
        "without in the last rollouts (speculative_min_gain: 1); 50% of the drafted tokens "
        "accepted with weight version 2"
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quantization": "gptq", "load_format": "auto"}, r"models.policy: .* \(gptq\).*fp8"),
        ({"cpu_offload_gb": 4}, "models.policy: cpu_offload_gb=4 keeps weights in host memory"),
        ({"offload_group_size": 8}, "offload_group_size=8 keeps .*; leave it out"),
    ],
)
def test_a_policy_that_gets_weights_can_compute_with_them(tmp_path, keys, message) -> None:
    models = {
        "policy": {"num_gpu": 1, "model_args": keys},
        "reward": {"num_cpu": 1},
        "policy_trainer": {"num_gpu": 1, "trainable": True},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"models": models}))
    job = load_config(tmp_path / "job.yaml")
    with pytest.raises(ValueError, match=message):
        GRPOEngine(
            ToyModule("policy", job), None, ToyModule("reward", job),
            ToyTrainer("policy_trainer", job),
        )  # fmt: skip
