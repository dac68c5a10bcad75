"""What does a model say it holds while new weights come, in whichever order things happen?"""

import pytest
import torch

from chatlearn_vllm.engines.live_model import EngineState, EngineStateError, LiveModel, Weights


class Model(LiveModel):
    """One parameter; tells what it was told."""

    def __init__(self, state: EngineState) -> None:
        super().__init__(state)
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.told: list[str] = []

    def _forget_prefixes(self) -> None:
        self.told.append("forget")

    def _note_version(self, version: int) -> None:
        self.told.append(f"version {version}")

    def load_weights(self, tensors) -> None:
        raise NotImplementedError

    def direct_copy_problem(self) -> None:
        return None

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"weight": self.weight}

    def shards(self, num_replicas):
        raise NotImplementedError

    def check_layouts(self, layouts) -> None:
        raise NotImplementedError

    dtype = torch.float32
    device = torch.device("cpu")


@pytest.fixture
def model() -> Model:
    return Model(EngineState(Weights.DUMMY, None))


def test_weights_are_stale_from_the_first_write_until_they_are_declared_ready(model) -> None:
    assert str(model.state) == "DUMMY"
    assert model.begin_weight_update()["weight"] is model.weight
    assert str(model.state) == "STALE"
    model.finish_weight_update(4)
    assert str(model.state) == "READY(4)"
    model.begin_weight_update()
    assert str(model.state) == "STALE(4)"
    model.finish_weight_update(5)
    assert model.state == EngineState(Weights.READY, 5)


def test_weights_that_sleep_are_not_written() -> None:
    model = Model(EngineState(Weights.ASLEEP, 3, kv_cache_awake=False))
    with pytest.raises(EngineStateError, match="the engine is ASLEEP"):
        model.begin_weight_update()
    assert str(model.state) == "ASLEEP without KV cache"


def test_what_was_cached_for_old_weights_is_forgotten_once_in_each_update(model) -> None:
    model.begin_weight_update()
    model.finish_weight_update(1)
    assert model.told == ["forget", "version 1"]
    model.begin_weight_update()
    model.forget_prefixes()  # while the weights are on their way
    model.finish_weight_update(2)
    assert model.told == ["forget", "version 1", "forget", "version 2"]
    model.begin_weight_update()
    model.finish_weight_update(3)
    assert model.told[4:] == ["forget", "version 3"]


def test_a_new_model_may_have_prefixes_of_the_weights_that_it_was_made_with(model) -> None:
    model.finish_weight_update(1)
    assert model.told == ["forget", "version 1"]


def test_a_revoked_version_leaves_the_one_before_it(model) -> None:
    for version in (1, 2):
        model.begin_weight_update()
        model.finish_weight_update(version)
    model.revoke_weight_update(1)  # not what it has
    assert str(model.state) == "READY(2)"
    model.revoke_weight_update(2)
    assert str(model.state) == "STALE(1)"
    model.revoke_weight_update(1)  # nothing is READY
    assert model.state == EngineState(Weights.STALE, 1)
    model.begin_weight_update()
    model.finish_weight_update(2)
    model.begin_weight_update()
    model.revoke_weight_update(2)  # it is being written already
    assert str(model.state) == "STALE(2)"
    model.finish_weight_update(3)
    model.revoke_weight_update(3)
    assert str(model.state) == "STALE(2)"


def test_only_weights_with_a_version_are_described_with_it() -> None:
    for weights in (Weights.DUMMY, Weights.ASLEEP, Weights.EMPTY):
        assert str(EngineState(weights, 7)) == weights.value
    assert str(EngineState(Weights.READY, None)) == "READY"
    assert str(EngineState(Weights.READY, 0)) == "READY(0)"
    assert str(EngineState(Weights.STALE, 7, kv_cache_awake=False)) == "STALE(7) without KV cache"
