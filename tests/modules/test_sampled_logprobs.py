"""Are log-probabilities that are taken out of vLLM's steps put to the right tokens?"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from vllm.logprobs import FlatLogprobs, Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

from chatlearn_vllm.data.rollouts import rollouts_to_batch
from chatlearn_vllm.engines.sampled_logprobs import SampledLogprobs, TokenLogprobs
from chatlearn_vllm.engines.vllm_compat import split_request_id


def step(sampled: dict[str, list[int]], logprobs: list[float]) -> ModelRunnerOutput:
    """What the executor hands over, one log-probability per request."""
    ids = np.array([[tokens[0] if tokens else 0] for tokens in sampled.values()])
    values = np.array(logprobs, dtype=np.float32)[:, None]
    return ModelRunnerOutput(
        req_ids=list(sampled),
        req_id_to_index={name: row for row, name in enumerate(sampled)},
        sampled_token_ids=list(sampled.values()),
        logprobs=LogprobsLists(ids, values, np.ones(len(sampled), dtype=np.int64)),
    )


def drafted_step(sampled: dict[str, list[int]], logprobs: list[list[float]]) -> ModelRunnerOutput:
    """The same of a step that verified drafts: a log-probability for each token that came."""
    ids = np.array([token for tokens in sampled.values() for token in tokens], dtype=np.int64)
    values = np.array([value for one in logprobs for value in one], dtype=np.float32)
    begins = [0, *np.cumsum([len(tokens) for tokens in sampled.values()]).tolist()]
    return ModelRunnerOutput(
        req_ids=list(sampled),
        req_id_to_index={name: row for row, name in enumerate(sampled)},
        sampled_token_ids=list(sampled.values()),
        logprobs=LogprobsLists(ids[:, None], values[:, None], np.ones(len(ids)), begins),
    )


def answer(request_id: str, *token_ids: list[int]) -> RequestOutput:
    completions = [CompletionOutput(i, "", ids, None, None) for i, ids in enumerate(token_ids)]
    return RequestOutput(request_id, None, [1], None, completions, finished=True)


def test_each_response_gets_the_logprobs_of_its_own_tokens() -> None:
    sampled = SampledLogprobs()
    sampled.expect("7", 2)
    sampled.expect("9", 1)
    passed_on = sampled.take_from(
        step({"0_7-0123abcd": [5], "1_7-0123abcd": [6], "9-89efabcd": []}, [-0.5, -1.5, -9.0])
    )
    assert passed_on.logprobs is None
    # In another order; 1_7 had ended, vLLM drops what came in flight.
    sampled.take_from(
        step({"9-89efabcd": [4], "1_7-0123abcd": [3], "0_7-0123abcd": [2]}, [-2.5, -7.0, -0.25])
    )
    seven, nine = answer("7", [5, 2], [6]), answer("9", [4])
    sampled.fill(seven)
    sampled.fill(nine)
    first, second = seven.outputs
    assert [entry[token].logprob for entry, token in zip(first.logprobs, [5, 2], strict=True)] == [
        -0.5,
        -0.25,
    ]
    assert first.cumulative_logprob == -0.75
    assert second.logprobs.logprobs == [-1.5]
    assert nine.outputs[0].logprobs.logprobs == [-2.5]


@pytest.mark.parametrize("drafts", [False, True])
def test_responses_that_come_and_go_keep_their_own_tokens(drafts) -> None:
    """More responses than rows at first, longer than the table; rows are given away meanwhile."""
    pick = random.Random(0)
    sampled = SampledLogprobs()
    running: dict[str, tuple[str, list[int], list[float]]] = {}
    order: list[str] = []  # of vLLM's batch
    ended: list[str] = []
    number = checked = 0
    for _ in range(600):
        while len(running) < 40 and number < 200:
            sampled.expect(str(number), 1)
            order.append(f"{number}-{pick.getrandbits(32):08x}")
            running[order[-1]] = (str(number), [], [])
            number += 1
        if pick.random() < 0.1:
            pick.shuffle(order)
        # Those that ended in the last step have a token in flight.
        tokens = {
            one: [pick.randrange(4) for _ in range(pick.randrange(5 if drafts else 2))]
            for one in order
        }
        logprobs = [[pick.randrange(-64, 0) / 4 for _ in came] for came in tokens.values()]
        if drafts:
            sampled.take_from(drafted_step(tokens, logprobs))
        else:
            sampled.take_from(step(tokens, [came[0] if came else 0.0 for came in logprobs]))
        for (vllm_id, came), their in zip(tokens.items(), logprobs, strict=True):
            if vllm_id in running and came:
                running[vllm_id][1].extend(came)
                running[vllm_id][2].extend(their)
        order = [one for one in order if one not in ended]
        ended = [one for one in running if pick.random() < 0.01]
        for vllm_id in ended:
            name, ids, expected = running.pop(vllm_id)
            output = answer(name, ids)
            sampled.fill(output)
            assert output.outputs[0].logprobs.logprobs == expected
            assert output.outputs[0].cumulative_logprob == sum(expected)
            checked += 1
    assert checked > 150


def test_a_request_added_again_gets_nothing_of_the_one_that_was_dropped() -> None:
    sampled = SampledLogprobs()
    sampled.expect("a", 1)
    sampled.take_from(step({"a-0123abcd": [5]}, [-5.0]))
    sampled.expect("a", 1)  # the first one was dropped; a token of it is in flight
    sampled.take_from(step({"a-0123abcd": [9], "a-89efabcd": []}, [-7.0, -8.0]))
    sampled.take_from(step({"a-89efabcd": [9]}, [-1.0]))
    output = answer("a", [9])
    sampled.fill(output)
    assert output.outputs[0].logprobs.logprobs == [-1.0]


def test_logprobs_read_as_those_of_vllm() -> None:
    sampled = SampledLogprobs()
    sampled.expect("a", 1)
    for token, logprob in ((5, -1.0), (8, -2.0), (6, -3.0)):
        sampled.take_from(step({"a": [token]}, [logprob]))
    output = answer("a", [5, 8, 6])
    sampled.fill(output)
    logprobs = output.outputs[0].logprobs
    assert [*logprobs] == [{5: Logprob(-1.0, 1)}, {8: Logprob(-2.0, 1)}, {6: Logprob(-3.0, 1)}]
    assert logprobs[-1] == {6: Logprob(-3.0, 1)} and logprobs[1:].logprobs == [-2.0, -3.0]
    assert logprobs.ranks == [1, 1, 1]
    with pytest.raises(IndexError):
        logprobs[3]
    assert TokenLogprobs.of([5], [-1.0])[0] == {5: Logprob(-1.0, None)}


def test_a_token_that_vllm_dropped_in_the_middle_is_left_out() -> None:
    sampled = SampledLogprobs()
    sampled.expect("a", 1)
    for token, logprob in ((5, -1.0), (8, -2.0), (6, -3.0)):
        sampled.take_from(step({"a": [token]}, [logprob]))
    output = answer("a", [5, 6])
    sampled.fill(output)
    assert output.outputs[0].logprobs.logprobs == [-1.0, -3.0]


def test_a_token_whose_logprob_never_came_is_an_error() -> None:
    sampled = SampledLogprobs()
    sampled.expect("a", 1)
    sampled.take_from(step({"a": [5]}, [-1.0]))
    with pytest.raises(RuntimeError, match="request a: .* 2 tokens, of which .* 1"):
        sampled.fill(answer("a", [5, 6]))


def test_outputs_without_logprobs_are_passed_on() -> None:
    output = SimpleNamespace(logprobs=None)
    assert SampledLogprobs().take_from(output) is output
    assert SampledLogprobs().take_from(None) is None


@pytest.mark.parametrize(
    ("vllm_id", "expected"),
    [
        ("12-0a1b2c3d", ("12", 0)),
        ("12", ("12", 0)),
        ("3_40-0a1b2c3d", ("40", 3)),
        ("3_40", ("40", 3)),
        ("my_own-id-0a1b2c3d", ("my_own-id", 0)),
        ("my_own-id", ("my_own-id", 0)),
        ("99-0a1b2c3d", None),
    ],
)
def test_ids_of_vllm_lead_back_to_those_of_requests(vllm_id, expected) -> None:
    assert split_request_id(vllm_id, {"12": 1, "40": 4, "my_own-id": 1}) == expected


def test_a_request_that_was_cut_off_gets_the_logprobs_of_the_tokens_that_it_has() -> None:
    sampled = SampledLogprobs()
    sampled.expect("3#1", 1)
    sampled.expect("3#0", 1)
    sampled.take_from(step({"3#1-0123abcd": [5], "3#0-89efabcd": [6]}, [-0.5, -1.5]))
    sampled.take_from(step({"3#0-89efabcd": [7], "3#1-0123abcd": [8]}, [-2.5, -0.25]))
    assert sampled.take("3#1", [5]) == [-0.5]  # its second token was in flight
    assert sampled.take("3#0", [6, 7]) == [-1.5, -2.5]
    with pytest.raises(RuntimeError, match="request 3#0: .* 1 tokens, of which .* over 0"):
        sampled.take("3#0", [6])


def test_a_batch_has_the_logprobs_of_sampled_tokens_in_whatever_form_they_come() -> None:
    forms = [], FlatLogprobs(), FlatLogprobs(), TokenLogprobs.of([8, 9], [-0.5, -1.0])
    forms[0].extend([{8: Logprob(-0.5)}, {4: Logprob(-0.25), 9: Logprob(-1.0)}])
    forms[1].extend([{8: Logprob(-0.5)}, {9: Logprob(-1.0)}])
    forms[2].extend([{8: Logprob(-0.5)}, {4: Logprob(-0.25), 9: Logprob(-1.0)}])
    output = answer("0", *[[8, 9]] * 4)
    for completion, logprobs in zip(output.outputs, forms, strict=True):
        completion.logprobs = logprobs
    batch = rollouts_to_batch([output], seq_length=4, pad_token_id=0)
    assert batch["logprobs"].tolist() == [[-0.5, -1.0, 0]] * 4
