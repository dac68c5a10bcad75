"""Does a policy on CUDA (bf16, graphs on) keep weights and tokens through sleep, wake and sync?"""

import copy

import pytest
import torch

from tests.gpu.conftest import LLAMA_100M
from tests.helpers.documented_policy import VLLMPolicyInference
from tests.helpers.engines import change_model_args, policy_job, put_weights, start_policy
from tests.helpers.tiny_llama import save_tiny_llama

pytestmark = pytest.mark.gpu

PROMPTS = ["12+34=", "The sum of 1 and 2 is", "x y z" * 8]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    model = save_tiny_llama(directory, **LLAMA_100M)
    model.directory = directory
    return model.to("cuda", torch.bfloat16)


@pytest.fixture(scope="module")
def policy(model, tmp_path_factory):
    job = policy_job(
        tmp_path_factory.mktemp("job"), model.directory,
        n=4, temperature=0.9, eval_temperature=0.0, gpu_memory_utilization=0.2, max_num_seqs=64,
    )  # fmt: skip
    module = start_policy(VLLMPolicyInference, job)
    module.build_prompts(PROMPTS)
    module.build_prompts(PROMPTS, is_eval=True)
    put_weights(module, model, version=1)
    return module


def test_weights_arrive_bitwise_and_survive_sleep_level_2(policy, model) -> None:
    greedy = policy.generate([0, 1, 2], first_sample=0, is_eval=True)
    sampled = policy.generate([0, 1, 2], first_sample=0)
    before = {name: p.detach().clone() for name, p in policy.engine.parameters().items()}
    free_awake, _ = torch.cuda.mem_get_info()
    policy.sleep()
    free_asleep, total = torch.cuda.mem_get_info()
    assert free_asleep - free_awake > 0.15 * total
    policy.wake_weights()
    assert policy.engine_state() == "EMPTY without KV cache"
    put_weights(policy, model, version=2)
    policy.wake_kv_cache()
    for name, parameter in policy.engine.parameters().items():
        assert torch.equal(parameter, before[name]), name
    stored = model.state_dict()
    same = [name for name in before if name in stored and ".layers." in name]  # and not fused
    assert len(same) == 4 * model.config.num_hidden_layers
    for name in same:
        assert torch.equal(before[name], stored[name]), name
    again = policy.generate([0, 1, 2], first_sample=0, is_eval=True)
    assert torch.equal(again["all_tokens"], greedy["all_tokens"])
    others = policy.generate([0, 1, 2], first_sample=12)
    assert not torch.equal(others["all_tokens"], sampled["all_tokens"])
    assert len({tuple(row) for row in sampled["all_tokens"][:4].tolist()}) > 1  # of one prompt
    resampled = policy.generate([0, 1, 2], first_sample=0)
    assert torch.equal(resampled["all_tokens"], sampled["all_tokens"])
    assert torch.equal(resampled["logprobs"], sampled["logprobs"])


def test_weights_survive_sleep_level_1_without_a_sync(policy, monkeypatch) -> None:
    change_model_args(monkeypatch, policy, sleep_level=1)
    greedy = policy.generate([0, 1, 2], first_sample=0, is_eval=True)
    before = {name: p.detach().clone() for name, p in policy.engine.parameters().items()}
    state = policy.engine_state()
    free_awake, _ = torch.cuda.mem_get_info()
    policy.sleep()
    free_asleep, total = torch.cuda.mem_get_info()
    assert free_asleep - free_awake > 0.15 * total
    policy.wake_weights()
    assert policy.engine_state() == f"{state} without KV cache"
    policy.wake_kv_cache()
    for name, parameter in policy.engine.parameters().items():
        assert torch.equal(parameter, before[name]), name
    again = policy.generate([0, 1, 2], first_sample=0, is_eval=True)
    assert torch.equal(again["all_tokens"], greedy["all_tokens"])


def logprob_error(policy, model):
    """Mean error of the log-probabilities of sampled responses."""
    batch = policy.generate([0, 1, 2] * 8, first_sample=0)
    differences = []
    for row in range(len(batch["all_tokens"])):
        mask = batch["loss_mask"][row, 1:] == 1
        tokens = batch["all_tokens"][row, : int(mask.nonzero().max()) + 2]
        with torch.no_grad():
            logits = model(tokens[None].cuda()).logits[0].float() / 0.9
        want = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None].cuda())[:, 0].cpu()
        mask = mask[: len(want)]
        differences.append((batch["logprobs"][row, : len(want)] - want).abs()[mask])
    return torch.cat(differences).mean().item()


def test_logprobs_are_those_of_the_model(policy, model) -> None:
    assert logprob_error(policy, model) < 0.0176


def test_new_weights_take_effect_under_captured_graphs(policy, model) -> None:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.5 * parameter.std() * torch.randn_like(parameter))
    put_weights(policy, changed, version=3)
    assert policy.engine_state() == "READY(3)"
    assert logprob_error(policy, changed) < 0.0176
    assert logprob_error(policy, model) > 0.1
