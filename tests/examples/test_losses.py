"""Does each key of the algorithms change the shipped losses as it says?"""

import pytest
import torch
import yaml

from chatlearn_vllm.algorithms.importance import truncated_weights
from chatlearn_vllm.algorithms.kl import kl_penalty
from chatlearn_vllm.algorithms.policy import policy_loss
from chatlearn_vllm.algorithms.value import value_loss
from chatlearn_vllm.config import load_config
from examples.megatron.models.policy_trainer import PolicyTrainer
from examples.megatron.models.value_model import ValueTrainer

ROWS, TOKENS = 4, 12


@pytest.fixture
def trainer(tmp_path):
    """Make a trainer whose file has these keys."""

    def make(kind, **keys):
        model = {"num_gpu": 1, "trainable": True, "model_args": keys}
        job = {"models": {"trainer": model}, "runtime": {"sample_per_episode": ROWS}}
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
        return kind("trainer", load_config(tmp_path / "job.yaml"))

    return make


def policy_batch():
    """Ratios far from 1 on both sides, for advantages of both signs."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(ROWS, TOKENS + 1)
    mask[:, :3] = 0
    mask[0, 9:] = 0

    def draw(scale):
        return scale * torch.randn(ROWS, TOKENS, generator=generator)

    logprobs = draw(1.0) - 5
    batch = {
        "loss_mask": mask,
        "old_logprobs": logprobs + draw(1.0),
        "logprobs": logprobs + draw(1.0),
        "ref_logprobs": logprobs + draw(1.0),
        "advantages": torch.tensor([1.0, -1.0, -0.5, 2.0]),
    }
    return batch, logprobs, draw(1.0).abs()


def clipped(batch, logprobs, **keys):
    mask = batch["loss_mask"][:, 1:]
    return policy_loss(logprobs, batch["old_logprobs"], batch["advantages"], mask, **keys)[0]


def importance(batch, cap):
    mask = batch["loss_mask"][:, 1:]
    return truncated_weights(batch["old_logprobs"], batch["logprobs"], mask, cap=cap)[0]


def kl(batch, logprobs, kind):
    return kl_penalty(logprobs, batch["ref_logprobs"], kind, mask=batch["loss_mask"][:, 1:])


EXPECTED = {
    "cliprange": ({"cliprange": 0.4}, lambda b, p, e: clipped(b, p, cliprange=0.4)),
    "cliprange_high": (
        {"cliprange_high": 0.6},
        lambda b, p, e: clipped(b, p, cliprange=0.2, cliprange_high=0.6),
    ),
    "dual_clip": ({"dual_clip": 1.5}, lambda b, p, e: clipped(b, p, dual_clip=1.5)),
    "ratio_level": (
        {"ratio_level": "sequence"},
        lambda b, p, e: clipped(b, p, ratio_level="sequence"),
    ),
    "tis_imp_ratio_cap": (
        {"tis_imp_ratio_cap": 1.5},
        lambda b, p, e: clipped(b, p) * importance(b, 1.5),
    ),
    "init_kl_coef": (
        {"init_kl_coef": 0.3},
        lambda b, p, e: clipped(b, p) + 0.3 * kl(b, p, "k3"),
    ),
    "kl_estimator": (
        {"init_kl_coef": 0.3, "kl_estimator": "k2"},
        lambda b, p, e: clipped(b, p) + 0.3 * kl(b, p, "k2"),
    ),
    "entropy_coef": ({"entropy_coef": 0.2}, lambda b, p, e: clipped(b, p) - 0.2 * e),
}


@pytest.mark.parametrize("key", EXPECTED)
def test_the_policy_loss_follows_each_key(trainer, key):
    keys, expected = EXPECTED[key]
    found = trainer(PolicyTrainer, **keys).loss(*policy_batch())[0]
    assert torch.allclose(found, expected(*policy_batch()))
    others = {name: value for name, value in keys.items() if name != key}
    without = trainer(PolicyTrainer, **others).loss(*policy_batch())[0]
    assert not torch.allclose(found, without, atol=1e-2)


def test_weights_are_of_the_clipped_loss_only(trainer):
    """The KL and the entropy are of the policy itself, whoever sampled."""
    keys = {"tis_imp_ratio_cap": 1.5, "init_kl_coef": 0.3, "entropy_coef": 0.2}
    batch, logprobs, entropy = policy_batch()
    found, sums = trainer(PolicyTrainer, **keys).loss(batch, logprobs, entropy)
    expected_kl = kl(batch, logprobs, "k3")
    weighted = clipped(batch, logprobs) * importance(batch, 1.5)
    assert torch.allclose(found, weighted + 0.3 * expected_kl - 0.2 * entropy)
    assert sums["kl"] == pytest.approx(expected_kl.sum().item())
    assert sums["rollout_weight"] == pytest.approx(importance(batch, 1.5).sum().item())


def test_a_kl_that_is_part_of_the_rewards_is_not_in_the_loss(trainer):
    batch, logprobs, entropy = policy_batch()
    del batch["ref_logprobs"]
    found, sums = trainer(PolicyTrainer, init_kl_coef=0.3).loss(batch, logprobs, entropy)
    assert torch.allclose(found, clipped(batch, logprobs))
    assert "kl" not in sums


@pytest.mark.parametrize("cliprange_value", [0.3, None])
def test_the_value_loss_follows_its_clip_range(trainer, cliprange_value):
    batch, values, _ = policy_batch()
    batch |= {"values": batch["old_logprobs"], "returns": batch["ref_logprobs"]}

    def expected(cliprange):
        mask = batch["loss_mask"][:, 1:]
        loss, _ = value_loss(values, batch["values"], batch["returns"], mask, cliprange=cliprange)
        return loss

    found, _ = trainer(ValueTrainer, cliprange_value=cliprange_value).loss(batch, values)
    assert torch.allclose(found, expected(cliprange_value))
    assert not torch.allclose(found, expected(0.1), atol=1e-2)
