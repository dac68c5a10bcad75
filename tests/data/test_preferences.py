"""Are records of all documented forms made into pairs, and bad ones explained?"""

import pytest

from chatlearn_vllm.data.preferences import preference_pairs
from chatlearn_vllm.data.prompts import load_prompts
from tests.data.test_prompts import write_jsonl

PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


def test_chosen_and_chatlearns_response_are_the_same(tmp_path):
    """Of a file in both spellings, where a key that a record lacks is None."""
    path = write_jsonl(
        tmp_path / "p.jsonl",
        PAIR,
        {"prompt": "1+1=", "response": "2", "rejected": "3"},
        {"text": "\n\nHuman: 1+1?\n\nAssistant: ", "response": "2", "rejected": "3"},
    )
    first, second, third = preference_pairs(load_prompts(path))
    assert first == second == PAIR
    assert third == {**PAIR, "prompt": "\n\nHuman: 1+1?\n\nAssistant: "}


def test_of_scored_responses_each_is_paired_with_each_that_is_worse(tmp_path):
    path = write_jsonl(
        tmp_path / "p.jsonl",
        {"query": "?", "response": ["a", "b", "c", "d"], "score": [0.5, -1, 2.0, -1]},
    )
    pairs = preference_pairs(load_prompts(path))
    assert {pair["prompt"] for pair in pairs} == {"\n\nHuman: ?\n\nAssistant: "}
    found = [pair["chosen"] + pair["rejected"] for pair in pairs]
    assert found == ["ab", "ad", "ca", "cb", "cd"]


def test_pairs_stay_as_they_are():
    assert preference_pairs([PAIR]) == [PAIR]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", r"records\[1\]: is a str, must be a dict"),
        (
            {"chosen": "2", "rejected": "3"},
            r"records\[1\]: key 'prompt' is None, must be a non-emp",
        ),
        ({"prompt": "?", "rejected": "3"}, r"key 'response' is None.*prompt, chosen \(or response"),
        ({"prompt": "?", "chosen": "2", "rejected": ""}, r"key 'rejected' is '', must be a non-em"),
        ({"prompt": "?", "chosen": "2", "rejected": 3}, r"key 'rejected' is 3, must be a non-emp"),
        ({"prompt": "?", "response": "2", "score": [1]}, "must both be lists"),
        ({"prompt": "?", "response": ["2"], "score": 1}, "must both be lists"),
        ({"prompt": "?", "response": ["2"], "score": [1, 0]}, "1 entries and 'score' 2; each resp"),
        ({"prompt": "?", "response": ["2", ""], "score": [1, 0]}, "non-empty strings only"),
        ({"prompt": "?", "response": ["2", 3], "score": [1, 0]}, "non-empty strings only"),
        (
            {"prompt": "?", "response": ["2", "3"], "score": [1, None]},
            r"\[1, None\], must hold num",
        ),
    ],
)
def test_a_bad_record_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        preference_pairs([PAIR, record])


def test_all_bad_records_are_named_up_to_ten():
    with pytest.raises(ValueError) as error:
        preference_pairs([{"prompt": ""}] * 12)
    assert len(str(error.value).splitlines()) == 11
    assert str(error.value).endswith("... and 2 more")
    with pytest.raises(ValueError) as error:
        preference_pairs([{"prompt": ""}] * 10)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"records[{number}]" for number in range(10)]
