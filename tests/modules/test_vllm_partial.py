"""What does vLLM get to see of responses that were begun earlier?"""

import pytest

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


@pytest.mark.parametrize(
    ("begun", "sampling", "text"),
    [
        (Begun([8], [-0.5], [1], "stop", "~"), {}, "yes"),
        (Begun([8], [-0.5], [1], "stop", "~"), {"include_stop_str_in_output": True}, "yes~"),
        (Begun([9], [-0.5], [1], "length"), {}, "no~"),
        (Begun([7, 4, 6], [-0.5] * 3, [1] * 3, "stop", "aa"), {}, "x"),
        # Tokens that were accepted together with what made the stop string whole.
        (Begun([7, 6, 9], [-0.5] * 3, [1] * 3, "stop", "aa"), {}, "x"),
        (
            Begun([7, 6, 9], [-0.5] * 3, [1] * 3, "stop", "aa"),
            {"include_stop_str_in_output": True},
            "xaa",
        ),
        (Begun([9, 8], [-0.5] * 2, [1] * 2, "stop", 8), {}, "no~"),
        (
            Begun([9, 8], [-0.5] * 2, [1] * 2, "stop"),
            {"include_stop_str_in_output": True},
            "no~yes~",
        ),
        (Begun([9, 5], [-0.5] * 2, [1] * 2, "length"), {}, "no~"),  # half a character
    ],
)  # fmt: skip
def test_the_text_is_cut_where_vllm_does(begun, sampling, text):
    request = PartialRequest("7", "ab", [1, 2], {**SAMPLING, "n": 1, **sampling}, [begun])
    output = request.output(_decode)

    assert output.outputs[0].text == text
    assert output.outputs[0].cumulative_logprob == -0.5 * len(begun.token_ids)
    assert output.finished and output.request_id == "7"


def _decode(lists):
    words = {
        1: "P",
        2: "Q",
        4: "a",
        5: "\N{REPLACEMENT CHARACTER}",
        6: "aa",
        7: "x",
        8: "yes~",
        9: "no~",
    }
    return ["".join(words[token] for token in token_ids) for token_ids in lists]
