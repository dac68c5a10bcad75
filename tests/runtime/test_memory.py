"""Which parts of a model leave device memory, and when, by its keys?"""

import pytest

from chatlearn_vllm.config import load_config
from chatlearn_vllm.runtime.memory import PolicyMemory, ScorerMemory, TrainerMemory

ALL = ("weights", "grads", "optimizer")
PART_OF_KEY = {
    "offload_weights": "weights",
    "free_grad_buffers": "grads",
    "offload_optimizer_states": "optimizer",
}
KEPT = [[], ["force_free_memory"]]
"""Keys with which a model on devices of its own stays in memory."""


class Group:
    """Notes what its ranks are asked for."""

    def __init__(self):
        self.calls = []

    def call(self, method, **parts):
        self.calls.append((method, *(part for part in ALL if parts.get(part))))


@pytest.fixture
def config_of(tmp_path):
    """A model's entry with some keys on, as the yaml gives it."""

    def load(keys, trainable=False):
        model = ", ".join(["num_gpu: 1", f"trainable: {trainable}", *(f"{k}: True" for k in keys)])
        path = tmp_path / "job.yaml"
        path.write_text(f"models: {{model: {{{model}}}}}\n")
        return load_config(path).models["model"]

    return load


def turns_of_trainer(config, *, shares_devices):
    group = Group()
    memory = TrainerMemory(group, config, shares_devices)
    memory.offload()
    memory.onload("weights")
    memory.offload("grads", "optimizer")
    return memory, group.calls


@pytest.mark.parametrize("key", PART_OF_KEY)
def test_each_key_moves_its_part_of_a_trainer(config_of, key):
    part = PART_OF_KEY[key]
    memory, calls = turns_of_trainer(config_of([key], trainable=True), shares_devices=True)
    later = ("onload", part) if part == "weights" else ("offload", part)
    assert calls == [("offload", part), later]
    assert memory.moves_weights == (part == "weights")


def test_free_memory_moves_all_parts_of_a_trainer(config_of):
    config = config_of(["free_memory"], trainable=True)
    _, calls = turns_of_trainer(config, shares_devices=True)
    assert calls == [("offload", *ALL), ("onload", "weights"), ("offload", "grads", "optimizer")]


def test_a_trainer_with_devices_of_its_own_moves_where_it_is_forced_to(config_of):
    for keys in (*KEPT, ["free_memory"]):
        config = config_of(keys, trainable=True)
        memory, calls = turns_of_trainer(config, shares_devices=False)
        assert calls == [] and not memory.moves_weights
    forced = config_of(["free_memory", "force_free_memory"], trainable=True)
    memory, calls = turns_of_trainer(forced, shares_devices=False)
    assert calls[0] == ("offload", *ALL) and memory.moves_weights


def turns_of_others(config, *, shares_devices):
    group = Group()
    policy = PolicyMemory(group, config, shares_devices)
    policy.offload()
    policy.wake_weights()
    policy.wake_kv_cache()
    scorer = ScorerMemory(group, config, shares_devices)
    scorer.onload()
    scorer.offload()
    assert scorer.is_resident == (not group.calls)
    return [call[0] for call in group.calls]


TURNS = ["sleep", "wake_weights", "wake_kv_cache", "onload", "offload"]


@pytest.mark.parametrize("key", ["free_memory", "offload_weights"])
def test_models_that_are_not_trained_take_turns_where_they_share_or_are_forced_to(config_of, key):
    assert turns_of_others(config_of([key]), shares_devices=True) == TURNS
    assert turns_of_others(config_of([key]), shares_devices=False) == []
    forced = config_of([key, "force_free_memory"])
    assert turns_of_others(forced, shares_devices=False) == TURNS
    for keys in KEPT:
        assert turns_of_others(config_of(keys), shares_devices=True) == []
