"""Does Transformers generate on CUDA as vLLM does there, and give its memory back?"""

import pytest
import torch

from tests.gpu.conftest import LLAMA_100M
from tests.helpers.engines import policy_job, put_weights, start_policy
from tests.helpers.tiny_llama import save_tiny_llama
from tests.modules.test_hf_engine import PROMPTS, Policy, VLLMPolicy

pytestmark = pytest.mark.gpu

SETTINGS = dict(
    n=4, temperature=0.9, eval_temperature=0.0, dtype="float32", gpu_memory_utilization=0.2,
    max_num_seqs=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    model = save_tiny_llama(directory, **LLAMA_100M)
    model.directory = directory
    return model.to("cuda")


def start(cls, model, directory, **more):
    module = start_policy(cls, policy_job(directory, model.directory, **SETTINGS, **more))
    module.build_prompts(PROMPTS)
    module.build_prompts(PROMPTS, is_eval=True)
    put_weights(module, model, version=1)
    return module


@pytest.fixture(scope="module")
def with_hf(model, tmp_path_factory):
    return start(Policy, model, tmp_path_factory.mktemp("hf"), inference_engine="transformers")


def test_greedy_responses_and_beams_are_those_of_vllm(with_hf, model, tmp_path_factory) -> None:
    with_vllm = start(VLLMPolicy, model, tmp_path_factory.mktemp("vllm"))
    keys = {"beam_width": 3, "max_tokens": 12, "length_penalty": 0.0, "ignore_eos": True}
    best = []
    for module in (with_hf, with_vllm):
        module.engine.add_request("0", None, [5, 6, 7, 8], keys)
        best.append(module.engine.run()[0].outputs[0].score)
    assert best[0] == pytest.approx(best[1], abs=1e-2)

    got = with_hf.generate([0, 1, 2], first_sample=0, is_eval=True)
    expected = with_vllm.generate([0, 1, 2], first_sample=0, is_eval=True)
    assert torch.equal(got["all_tokens"], expected["all_tokens"])
    assert (got["logprobs"] - expected["logprobs"]).abs().max() < 1e-3


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_the_gpu_and_responses_stay_as_they_were(with_hf, model, level) -> None:
    before = with_hf.generate([0, 1, 2], first_sample=0)
    weights = with_hf.engine.metrics()["weight_bytes"]
    awake = torch.cuda.memory_allocated()
    with_hf.engine.sleep(level)
    assert with_hf.engine.metrics()["weight_bytes"] == 0
    assert awake - torch.cuda.memory_allocated() >= 0.99 * weights
    with_hf.wake_weights()
    if level == 2:
        put_weights(with_hf, model, version=2)
    with_hf.wake_kv_cache()
    again = with_hf.generate([0, 1, 2], first_sample=0)
    assert torch.equal(again["all_tokens"], before["all_tokens"])
    assert torch.equal(again["logprobs"], before["logprobs"])
