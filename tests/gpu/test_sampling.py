"""Is what a policy draws on CUDA that of the keys it was asked with? One engine for all tests.

On GPUs vLLM runs another model runner than on CPU, with kernels of its own for penalties, cuts,
words, grammars and log-probabilities. The engine's cache is so small that eight long responses
do not fit together: vLLM then drops some and begins them again.
"""

import copy

import pytest
import torch

from chatlearn_vllm.data.carried import Carried
from tests.gpu.conftest import LLAMA_100M
from tests.helpers.documented_policy import VLLMPolicyInference
from tests.helpers.engines import change_model_args, policy_job, put_weights, start_policy
from tests.helpers.tiny_llama import save_tiny_llama

pytestmark = pytest.mark.gpu

DEVICE, ENGINE_DTYPE = "cuda", torch.bfloat16
EOS = 2
PROMPT = [5, 6, 7, 8, 20, 21]
PROMPTS = ["12+34=", "a", "The sum of 1 and 2 is"]
TEMPERATURE = 0.9
NUM_TOKENS = 24
NOISE = 0.06
"""Twice the mean error of log-probabilities that bfloat16 makes in this model."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    model = save_tiny_llama(directory, **LLAMA_100M | {"initializer_range": 0.04})
    model.directory = directory
    return model.to(DEVICE, ENGINE_DTYPE).float()  # computes exactly, with the engine's weights


@pytest.fixture(scope="module")
def policy(model, tmp_path_factory):
    job = policy_job(
        tmp_path_factory.mktemp("job"), model.directory,
        n=3, temperature=TEMPERATURE, block_size=16, gpu_memory_utilization=0.2, log_metrics=True,
        num_gpu_blocks_override=33,
    )  # fmt: skip
    module = start_policy(VLLMPolicyInference, job)
    module.build_prompts(PROMPTS)
    return module


@pytest.fixture
def ready(policy, model):
    put_weights(policy, copy.deepcopy(model).to(ENGINE_DTYPE), version=1)
    policy.steps.clear()
    return policy


def answers(policy, num_responses=8, **keys):
    """Responses to the prompt, with the log-probabilities of what was drawn."""
    sampling = {"temperature": TEMPERATURE, "max_tokens": NUM_TOKENS, "logprobs": 0, "seed": 1}
    policy.engine.add_request("0", None, PROMPT, sampling | {"n": num_responses} | keys)
    (output,) = policy.engine.run()
    assert len(output.outputs) == num_responses
    return output.outputs


def unchanged(logits, ids):
    """What the model says, without any key."""
    return logits


def expected(model, response, change=unchanged):
    """Log-probability of each token of a response, from logits that `change` makes others of.

    Args:
        change: logits [V] in float32 and the tokens of the response so far -> logits [V].
    """
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + response], device=DEVICE)).logits[0].float().cpu()
    found = []
    for place, token in enumerate(response):
        changed = change(logits[len(PROMPT) - 1 + place], response[:place])
        found.append((changed / TEMPERATURE).log_softmax(-1)[token].item())
    return torch.tensor(found)


def error(model, responses, change=unchanged):
    """Mean error of the log-probabilities of responses."""
    differences = []
    for one in responses:
        want = expected(model, list(one.token_ids), change)
        differences.append((torch.tensor(one.logprobs.logprobs) - want).abs())
    together = torch.cat(differences)
    together = together[together.isfinite()]  # a token at the edge of a cut falls either way
    assert len(together) > 0.95 * sum(len(one.token_ids) for one in responses)
    return together.mean().item()


def without(logits, dropped):
    return logits.masked_fill(dropped, float("-inf"))


def top_k(logits, ids):
    return without(logits, logits < logits.topk(6).values[-1])


def top_p(logits, ids):
    ordered, order = (logits / TEMPERATURE).softmax(-1).sort(descending=True)
    kept = order[ordered.cumsum(0) - ordered < 0.6]
    return without(logits, ~torch.zeros_like(logits, dtype=torch.bool).index_fill(0, kept, True))


def min_p(logits, ids):
    probabilities = (logits / TEMPERATURE).softmax(-1)
    return without(logits, probabilities < 0.2 * probabilities.max())


def repetition(logits, ids):
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[[*PROMPT, *ids]] = True
    return torch.where(seen, torch.where(logits > 0, logits / 3, logits * 3), logits)


def presence_and_frequency(logits, ids):
    counts = torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=len(logits))
    return logits - 1.5 * (counts > 0) - counts


def bias(logits, ids):
    changed = logits.clone()
    changed[30] += 4
    changed[31] -= 4
    return changed


@pytest.mark.parametrize(
    ("keys", "change"),
    [
        ({"top_k": 6}, top_k),
        ({"top_p": 0.6}, top_p),
        ({"min_p": 0.2}, min_p),
        ({"repetition_penalty": 3.0}, repetition),
        ({"presence_penalty": 1.5, "frequency_penalty": 1.0}, presence_and_frequency),
        ({"logit_bias": {30: 4.0, 31: -4.0}}, bias),
        ({}, unchanged),
    ],
    ids=lambda value: "+".join(value) or "plain" if isinstance(value, dict) else "",
)
def test_logprobs_are_of_what_the_keys_make_of_the_model(ready, model, keys, change) -> None:
    responses = answers(ready, **keys)
    assert len({tuple(one.token_ids) for one in responses}) > 4
    assert error(model, responses, change) < NOISE
    if change is not unchanged:
        assert error(model, responses) > 2 * NOISE


def test_words_tokens_and_lengths_that_are_ruled_out_do_not_come(ready) -> None:
    few = {"allowed_token_ids": [9, 10, 11], "ignore_eos": True}
    text = ready.tokenizer.tokenizer.decode

    def texts(**keys):
        return [text(one.token_ids) for one in answers(ready, **few, **keys)]

    word, letter = text([9, 10, 9]), text([11])
    assert any(word in one for one in texts())
    assert any(letter in one for one in texts())
    forbidden = texts(bad_words=[word, letter])
    assert not any(word in one or letter in one for one in forbidden)
    assert any(text([9, 10]) in one and text([10, 9]) in one for one in forbidden)
    stopping = {"allowed_token_ids": [9, 10], "stop_token_ids": [10]}
    assert min(len(one.token_ids) for one in answers(ready, **stopping)) < 7
    for one in answers(ready, **stopping, min_tokens=7):
        assert list(one.token_ids[:6]) == [9] * 6
        assert len(one.token_ids) > 6


def test_grammars_and_repetitions_end_responses(ready, model) -> None:
    for one in answers(ready, structured_outputs={"regex": "[0-9]{3}(ab|cd)"}):
        assert one.text[:3].isdecimal() and one.text[3:] in ("ab", "cd")
        assert one.token_ids[-1] == EOS
    detection = {"max_pattern_size": 1, "min_count": 4}
    for one in answers(ready, allowed_token_ids=[9], repetition_detection=detection):
        assert list(one.token_ids) == [9] * 4


def test_logprobs_of_the_likeliest_tokens_and_of_prompts_are_the_model_s(ready, model) -> None:
    for one in answers(ready, logprobs=3):
        with torch.no_grad():
            ids = torch.tensor([PROMPT + list(one.token_ids)], device=DEVICE)
            logits = model(ids).logits[0, len(PROMPT) - 1 : -1].float().cpu()
        best = (logits / TEMPERATURE).log_softmax(-1).topk(3).values
        got = [
            sorted((entry.logprob for entry in found.values() if entry.rank <= 3), reverse=True)
            for found in one.logprobs
        ]
        assert (torch.tensor(got) - best).abs().mean() < NOISE
    request = {"temperature": TEMPERATURE, "max_tokens": 1, "logprobs": 0, "prompt_logprobs": 0}
    ready.engine.add_request("0", None, PROMPT, request)
    (output,) = ready.engine.run()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT], device=DEVICE)).logits[0].float().cpu()
    want = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    found = zip(PROMPT[1:], output.prompt_logprobs[1:], strict=True)
    got = torch.tensor([entries[token].logprob for token, entries in found])
    assert (got - want).abs().mean() < NOISE


def test_responses_that_were_dropped_and_began_again_are_those_of_the_model(ready, model) -> None:
    before = ready.engine.metrics()["vllm:num_preemptions"]
    responses = answers(ready, ignore_eos=True, max_tokens=80)
    assert ready.engine.metrics()["vllm:num_preemptions"] > before
    assert [len(one.token_ids) for one in responses] == [80] * 8
    assert len({tuple(one.token_ids[:8]) for one in responses}) > 4
    assert error(model, responses) < NOISE
    # Each token but a response's last is computed at least once, and what was dropped twice.
    assert sum(tokens for _, tokens in ready.steps) > len(PROMPT) + 8 * 79
    again = answers(ready, ignore_eos=True, max_tokens=80)
    assert [one.token_ids for one in again] == [one.token_ids for one in responses]


def test_a_response_depends_on_its_seed_and_not_on_its_batch(ready, monkeypatch) -> None:
    monkeypatch.setattr(ready.engine, "seed_per_response", True)
    together = ready.generate([0, 1, 2], first_sample=0)
    alone = ready.generate([2], first_sample=6)
    other = ready.generate([2], first_sample=60)
    start = len(alone["no_padded_query_ids"][0])
    first = slice(start, start + 4)  # later ones may follow a near tie that fell the other way
    same = (together["all_tokens"][6:, first] == alone["all_tokens"][:, first]).float().mean()
    differing = (other["all_tokens"][:, first] == alone["all_tokens"][:, first]).float().mean()
    assert same > 0.7 > 0.5 > differing


def test_a_response_that_was_cut_goes_on_with_later_weights(ready, model, monkeypatch) -> None:
    runtime = ready.runtime_args.model_copy(update={"max_rollout_round": 2})
    monkeypatch.setattr(ready, "job", ready.job.model_copy(update={"runtime": runtime}))
    change_model_args(monkeypatch, ready, max_new_tokens=NUM_TOKENS, ignore_eos=True)
    assert ready.generate([0, 2], 30, min_finished=2, max_steps=8) is None
    cut = [Carried.from_state_dict(one.state_dict()) for one in ready.cut()]
    earlier = [list(begun.token_ids) for one in cut for begun in one.responses]
    assert [0 < len(ids) < NUM_TOKENS for ids in earlier] == [True] * 6
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5 * parameter.std() * torch.randn_like(parameter))
    other = other.to(ENGINE_DTYPE).float()
    put_weights(ready, copy.deepcopy(other).to(ENGINE_DTYPE), version=5)
    batch = ready.generate([], 60, carried=cut)
    errors = {"old": [], "new": [], "crossed": []}
    for row, old in enumerate(earlier):
        tokens = batch["all_tokens"][row]
        start = len(batch["no_padded_query_ids"][row])
        middle, end = start + len(old), start + NUM_TOKENS
        assert tokens[start:middle].tolist() == old
        versions = batch["token_versions"][row, start - 1 : end - 1].tolist()
        assert versions == [1] * len(old) + [5] * (NUM_TOKENS - len(old))
        with torch.no_grad():
            of_old, of_new = (
                one(tokens[None, :end].to(DEVICE)).logits[0].float().cpu() / TEMPERATURE
                for one in (model, other)
            )
        got = batch["logprobs"][row, start - 1 : end - 1]
        for name, logits, part in (
            ("old", of_old, slice(start, middle)), ("new", of_new, slice(middle, end)),
            ("crossed", of_old, slice(middle, end)),
        ):  # fmt: skip
            own = slice(part.start - 1, part.stop - 1)
            want = logits.log_softmax(-1)[own].gather(1, tokens[part, None])[:, 0]
            errors[name].append((got[part.start - start : part.stop - start] - want).abs())
    mean = {name: torch.cat(values).mean().item() for name, values in errors.items()}
    assert mean["old"] < NOISE
    assert mean["new"] < NOISE
    assert mean["crossed"] > 3 * NOISE


def test_beams_have_the_model_s_scores_and_beat_the_greedy_response(ready, model) -> None:
    beams = {"beam_width": 4, "n": 4, "max_tokens": 8, "ignore_eos": True, "length_penalty": 0.0}
    ready.engine.add_request("0", None, PROMPT, beams)
    (output,) = ready.engine.run()
    (greedy,) = answers(ready, 1, temperature=0.0, max_tokens=8, ignore_eos=True)

    def score(response):
        return expected(model, response, lambda logits, ids: logits * TEMPERATURE).sum().item()

    assert len({tuple(beam.token_ids) for beam in output.outputs}) == 4
    for beam in output.outputs:
        assert beam.cumulative_logprob == pytest.approx(score(list(beam.token_ids)), abs=0.2)
    scores = [beam.score for beam in output.outputs]
    assert scores == sorted(scores, reverse=True)
    assert output.outputs[0].cumulative_logprob > score(list(greedy.token_ids)) - 0.2
