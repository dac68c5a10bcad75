"""Does a user hear what to change when device memory runs out?"""

from pathlib import Path

import pytest
import torch

from chatlearn_vllm.config import load_config
from chatlearn_vllm.runtime.out_of_memory import is_out_of_memory, remedies
from examples.megatron.models.policy_reference import PolicyReference
from examples.megatron.models.policy_trainer import PolicyTrainer
from examples.megatron.models.vllm_policy_inference import VLLMPolicyInference

CONFIG = Path(__file__).resolve().parents[2] / "configs/llama2/rlhf.yaml"


def job(*overrides):
    return load_config(CONFIG, overrides)


def test_memory_that_ran_out_is_seen_behind_other_errors() -> None:
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        except RuntimeError as cause:
            raise ValueError("cannot train") from cause
    except ValueError as error:
        assert is_out_of_memory(error)
    assert is_out_of_memory(RuntimeError("No available memory for the cache blocks. Try"))
    assert not is_out_of_memory(ValueError("a bad batch"))


def test_a_trainer_is_told_of_smaller_micro_batches_and_of_who_stays_on_its_device() -> None:
    tokens = "models.ppo_policy.model_args.max_tokens_per_micro_batch"
    config = job(f"{tokens}=32768", "models.reference.free_memory=False")
    advice = remedies(PolicyTrainer("ppo_policy", config), ["policy", "reference", "value"])
    lines = advice.splitlines()
    assert lines[1] == f"  {tokens}: 32768 -> 16384"
    assert "models.ppo_policy.model_args.recompute_granularity: full" in lines[2]
    assert [line.split(":")[0].strip() for line in lines[4:]] == ["models.reference.free_memory"]


def test_what_it_says_is_a_yaml_that_loads() -> None:
    config = job()
    advice = remedies(PolicyTrainer("ppo_policy", config), [])
    key, value = advice.splitlines()[1].split("  (")[0].strip().split(": ")
    assert key.endswith("max_tokens_per_micro_batch")
    changed = job(f"{key}={value}").models["ppo_policy"].model_args
    assert changed.max_tokens_per_micro_batch == int(value)


@pytest.mark.parametrize(
    ("module", "name", "key"),
    [
        (PolicyReference, "reference", "max_tokens_per_micro_batch"),
        (VLLMPolicyInference, "policy", "gpu_memory_utilization"),
    ],
)
def test_models_that_are_not_trained_hear_of_their_own_keys(module, name, key) -> None:
    advice = remedies(module(name, job()), [])
    assert f"models.{name}.model_args.{key}" in advice
    assert "recompute" not in advice
