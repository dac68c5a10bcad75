"""Does a model with experts compute and train on two GPUs as Hugging Face's does on the CPU?"""

import os

import numpy as np
import pytest

from tests.helpers.ranks import Ranks
from tests.megatron import test_moe, tiny_models

pytestmark = pytest.mark.gpu

LAYOUTS = {
    "ep2": {"ep": 2},
    "tp2": {"tp": 2},
    "tp2 etp1 ep2": {"tp": 2, "etp": 1, "ep": 2},
    "pp2": {"pp": 2},
}


@pytest.fixture(scope="module")
def ranks():
    two = Ranks(2)
    yield two
    two.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save_model(tmp_path_factory.mktemp("model"), "mixtral")


@pytest.fixture(scope="module")
def reference(model):
    return test_moe.hugging_face(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_and_first_step_equal_those_of_hugging_face(
    two_gpus, ranks, model, reference, layout
):
    settings = LAYOUTS[layout]
    for rank, size, found in ranks.run(logprobs_on_own_gpu, model, **settings):
        assert (found - reference["logprobs"][rank::size]).abs().max() < 1e-4
    for curve in ranks.run(curve_on_own_gpu, model, steps=1, **settings):
        assert curve[0] == pytest.approx([reference["loss"], reference["grad_norm"]], rel=1e-4)


def test_bf16_follows_the_float32_curve(two_gpus, ranks, model):
    exact = np.array(ranks.run(curve_on_own_gpu, model, steps=4, ep=2)[0])
    for curve in ranks.run(curve_on_own_gpu, model, steps=4, ep=2, dtype="bfloat16"):
        assert np.allclose(np.array(curve)[:, 0], exact[:, 0], rtol=0.03)


def test_offloading_experts_changes_nothing(two_gpus, ranks, model):
    plain = ranks.run(curve_on_own_gpu, model, steps=3, ep=2, dtype="bfloat16")
    for found, expected in zip(ranks.run(offloading_on_own_gpu, model), plain, strict=True):
        assert np.allclose(found, expected, rtol=1e-3)


def logprobs_on_own_gpu(path, **settings):
    _use_own_gpu()
    rank, size, found = test_moe.logprobs(path, **settings)
    return rank, size, found.cpu()


def curve_on_own_gpu(path, steps, **settings):
    _use_own_gpu()
    return test_moe.curve(path, steps, **settings)


def offloading_on_own_gpu(path):
    _use_own_gpu()
    return test_moe.offloading_curve(path, ep=2, dtype="bfloat16")


def _use_own_gpu():
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
