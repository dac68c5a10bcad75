"""What is counted and timed of `generate`, and when does it end?"""

import json

import pytest

from chatlearn_vllm.bench.transformers_case import end_token_ids
from chatlearn_vllm.bench.workload import made_config, make_model


@pytest.fixture
def model(tmp_path):
    """A directory with config.json, which ends with 2, and a tokenizer that does, too."""
    make_model(made_config("tiny", 64), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [(None, [2]), ([7, 9], [2, 7, 9]), (7, [2, 7])],
)
def test_a_response_ends_with_each_token_that_ends_it_in_vllm(model, generation_config, expected):
    if generation_config is not None:
        content = json.dumps({"eos_token_id": generation_config})
        (model / "generation_config.json").write_text(content)
    assert end_token_ids(model) == expected


def test_without_a_tokenizer_the_end_is_that_of_the_config(model):
    (model / "tokenizer.json").unlink()
    assert end_token_ids(model) == [2]
