"""State that goes to host memory comes back unchanged, whichever part went."""

import pytest
import torch

from chatlearn_vllm.engines.megatron.offload import StorageOffloader
from tests.megatron import tiny_models

CASES = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "plain optimizer": {"use_distributed_optimizer": False},
    "bfloat16, plain optimizer": {"use_distributed_optimizer": False, "dtype": "bfloat16"},
    "overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "two stages": {"pp": 2, "vpp": 2},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.save_model(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_same_with_and_without_offloading(ranks, llama, case):
    plain = ranks[2].run(curve, llama, **CASES[case])
    assert ranks[2].run(offloading_curve, llama, **CASES[case]) == plain


def test_each_part_frees_its_own_memory(ranks, llama):
    sizes = ranks[2].run(freed_bytes, llama, dtype="bfloat16")[0]
    num_parameters = sizes["num_parameters"]
    # per parameter: 2 bytes of weight, 4 of gradient, 12 of main parameter and two moments,
    # the latter shared by two data parallel ranks; buckets are padded a little
    assert sizes["weights"] == pytest.approx(2 * num_parameters, rel=0.02)
    assert sizes["grads"] == pytest.approx(4 * num_parameters, rel=0.02)
    assert sizes["optimizer"] == pytest.approx(6 * num_parameters, rel=0.02)


def test_float32_main_parameters_stay_with_the_weights(ranks, llama):
    sizes = ranks[2].run(freed_bytes, llama)[0]
    # both moments of half of the parameters; the main parameters are views of the weights
    assert sizes["optimizer"] == pytest.approx(4 * sizes["num_parameters"], rel=0.02)


def test_a_frozen_model_is_offloaded_too(ranks, llama):
    before, after = ranks[1].run(scores_around_offloading, llama)[0]
    assert torch.equal(before, after)


def test_using_an_offloaded_model_is_an_error(ranks, llama):
    (message,) = ranks[1].run(error_of_training_offloaded, llama)
    assert "call onload() before" in message


def test_views_survive_and_dropped_content_is_zero():
    base = torch.arange(8.0)
    view = base[2:4]
    keeping = StorageOffloader(lambda: [view, base], keeps_content=True)
    assert keeping.offload() == 32 and keeping.is_offloaded
    assert keeping.offload() == 0
    assert base.untyped_storage().nbytes() == 0
    assert keeping.onload() == 32 and keeping.onload() == 0
    assert view.tolist() == [2.0, 3.0] and base.tolist() == list(range(8))
    dropping = StorageOffloader(lambda: [view], keeps_content=False)
    dropping.offload()
    dropping.onload()
    assert not base.any()


def test_memory_that_numpy_has_seen_is_left_alone():
    shown = torch.ones(4)
    array = shown.numpy()
    offloader = StorageOffloader(lambda: [shown], keeps_content=True)
    assert offloader.offload() == 0
    assert array.tolist() == [1.0] * 4


def curve(path, **settings):
    """Losses of five steps."""
    with tiny_models.engine(path, **settings) as engine:
        return tiny_models.train(engine, 5)


def offloading_curve(path, **settings):
    """The same with offloading in between, in several ways."""
    parts = [
        {},
        {"weights": False},
        {"optimizer": False, "grads": False},
        {"weights": False, "grads": False},
    ]
    with tiny_models.engine(path, **settings) as engine:
        losses = []
        for part in parts:
            engine.offload(**part)
            engine.onload(**part)
            losses += tiny_models.train(engine, 1)
        # in pieces and in another order
        engine.offload(weights=True, optimizer=False, grads=False)
        engine.offload(weights=False, optimizer=True, grads=True)
        engine.onload(weights=False, optimizer=True, grads=False)
        engine.onload()
        return losses + tiny_models.train(engine, 1)


def freed_bytes(path, **settings):
    with tiny_models.engine(path, **settings) as engine:
        tiny_models.train(engine, 1)
        nothing = {"weights": False, "optimizer": False, "grads": False}
        freed = {part: engine.offload(**{**nothing, part: True}) for part in nothing}
        engine.onload()
        return {**freed, "num_parameters": sum(p.numel() for _, p in engine.parameters.named())}


def scores_around_offloading(path):
    with tiny_models.engine(path, trainable=False) as engine:

        def score():
            (scores,) = engine.forward_only([tiny_models.batch()], lambda b, logprobs, e: logprobs)
            return scores

        before = score()
        engine.offload()
        engine.onload()
        return before, score()


def error_of_training_offloaded(path):
    with tiny_models.engine(path) as engine:
        engine.offload(optimizer=False, grads=False)
        try:
            tiny_models.train(engine, 1)
        except RuntimeError as error:
            return str(error)
