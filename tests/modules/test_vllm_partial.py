"""What does vLLM get to see of responses that were begun earlier?"""

from chatlearn_vllm.data.carried import Begun
from chatlearn_vllm.engines.vllm_partial import PartialRequest

SAMPLING = {"n": 3, "max_tokens": 4, "seed": 100, "temperature": 0.5}


def requests_of(*begun):
    request = PartialRequest("7", "ab", [1, 2], SAMPLING, list(begun))
    return request, list(request.requests())


def test_what_was_begun_goes_on_behind_its_tokens_with_what_is_left_of_its_length():
    _, requests = requests_of(Begun(), Begun([8]), Begun([8, 9, 5]))

    assert [(name, tokens, keys["max_tokens"]) for name, tokens, keys in requests] == [
        ("7#0", [1, 2], 4),
        ("7#1", [1, 2, 8], 3),
        ("7#2", [1, 2, 8, 9, 5], 1),
    ]
    assert {(keys["n"], keys["temperature"]) for _, _, keys in requests} == {(1, 0.5)}


def test_a_response_does_not_go_on_with_the_numbers_that_it_began_with():
    # vLLM adds a response's index among those of its prompt to the seed of a whole request.
    _, whole = requests_of(Begun(), Begun(), Begun())
    assert [keys["seed"] for _, _, keys in whole] == [100, 101, 102]

    seeds = {
        keys["seed"]
        for length in range(4)
        for _, _, keys in requests_of(*(Begun([8] * length) for _ in range(3)))[1]
    }
    assert len(seeds) == 12


def test_finished_responses_are_not_asked_for_again_and_full_ones_are_finished():
    request, requests = requests_of(
        Begun([8], finish_reason="stop"), Begun([8, 9, 5, 6]), Begun([8, 9])
    )

    assert [name for name, _, _ in requests] == request.open_ids == ["7#2"]
    assert request.begun[1].finish_reason == "length"
    assert not request.is_finished


def test_a_stop_string_is_cut_off_the_text_as_vllm_does():
    begun = [
        Begun([8], [-0.5], [1], "stop", "~"),
        Begun([9], [-0.25], [1], "length"),
    ]
    request = PartialRequest("7", "ab", [1, 2], {**SAMPLING, "n": 2}, begun)
    output = request.output(_decode)

    assert [one.text for one in output.outputs] == ["yes", "no~"]
    assert [one.cumulative_logprob for one in output.outputs] == [-0.5, -0.25]
    assert output.finished and output.request_id == "7"


def _decode(token_ids):
    return {8: "yes~", 9: "no~"}[token_ids[0]]
