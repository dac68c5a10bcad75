"""Which prompts does each pass get, and which of them has no pass had before?"""

import json

import pytest

from chatlearn_vllm.bench.options import BenchOptions
from chatlearn_vllm.bench.workload import (
    check_prompt_file,
    latency_prompts,
    made_config,
    num_prompts_needed,
    prompts_of_pass,
)


@pytest.fixture
def model(tmp_path):
    """A directory with the config.json of a model of 512 tokens."""
    (tmp_path / "config.json").write_text(json.dumps(made_config("tiny", 64)))
    return tmp_path


def prompt_file(directory, texts):
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


def test_more_requests_for_latencies_than_prompts_per_pass_have_prompts_of_their_own(model):
    options = BenchOptions.of({"prompts": 3, "latency_requests": 8, "repeat": 2, "warmup": 1})
    alone, together = latency_prompts(options, model)
    assert (len(alone), len(together)) == (8, 3)
    earlier = [one for number in range(3) for one in prompts_of_pass(options, model, number)]
    all_of_them = [tuple(one.token_ids) for one in (*earlier, *together, *alone)]
    assert len(set(all_of_them)) == len(all_of_them) == num_prompts_needed(options)


@pytest.mark.parametrize(
    ("num_texts", "cases", "is_told"),
    [(20, ["vllm"], False), (19, ["vllm"], True), (19, ["transformers"], False)],
)
def test_a_file_with_fewer_prompts_than_all_passes_take_is_told(model, num_texts, cases, is_told):
    path = prompt_file(model, [f"prompt {number}" for number in range(num_texts)])
    options = BenchOptions.of(
        {
            "cases": tuple(cases),
            "model": str(model),
            "prompt_file": path,
            "prompts": 4,
            "repeat": 2,
            "warmup": 1,
            "latency_requests": 4,
        }  # fmt: skip
    )
    notices = check_prompt_file(options)
    assert len(notices) == is_told
    if is_told:
        assert "holds 19 different prompts, all passes take 20" in notices[0]
