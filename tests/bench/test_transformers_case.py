"""What is counted and timed of `generate`, and when does it end?"""

import json

import pytest
import torch

from chatlearn_vllm.bench.cases import parse_case
from chatlearn_vllm.bench.child import Task
from chatlearn_vllm.bench.options import BenchOptions
from chatlearn_vllm.bench.transformers_case import _Streamer, end_token_ids, measure
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


def measured(model, case: str, **options):
    """Results of a case, measured in this process."""
    given = {"prompts": 2, "completions": 4, "prompt_tokens": 6, "max_tokens": 6, "repeat": 2}
    checked = BenchOptions.of({**given, "latency_requests": 0, **options})
    events = model.parent / "events.jsonl"
    return measure(Task(parse_case(case), checked, model, model.parent, events))


def test_drafts_of_the_warm_up_do_not_count(model, tmp_path):
    options = {"ignore_eos": True, "temperature": 0.0, "completions": 1, "max_tokens": 20}
    alone, *warm = (
        measured(model, "transformers:speculative", warmup=warmup, **options)["speculation"]
        for warmup in (0, 3)
    )
    assert alone["draft_tokens"] > 0
    assert warm == [alone]


def test_no_more_tokens_are_drafted_at_a_time_than_asked_for(model, tmp_path):
    options = {"ignore_eos": True, "temperature": 0.0, "completions": 1, "max_tokens": 20}
    one, four = (
        measured(model, "transformers:speculative", num_speculative_tokens=number, **options)
        for number in (1, 4)
    )
    assert one["speculation"]["draft_tokens"] == one["speculation"]["drafts"] > 0
    many = four["speculation"]
    assert many["drafts"] < many["draft_tokens"] <= 4 * many["drafts"]


def test_a_batch_size_that_was_given_is_measured_as_often_as_asked_for(model):
    options = {"repeat": 4, "hf_search_seconds": 0.0, "warmup": 0}
    assert (
        len(measured(model, "transformers", hf_batch_size="4", **options)["throughput"]["passes"])
        == 4
    )
    assert len(measured(model, "transformers", **options)["throughput"]["passes"]) == 1


def test_padding_behind_the_end_of_a_row_has_no_time(monkeypatch):
    now = iter(float(second) for second in range(1, 20))
    monkeypatch.setattr("chatlearn_vllm.bench.measure.time.perf_counter", lambda: next(now))
    streamer = _Streamer(2, [2])
    streamer.watch.start = 0.0
    streamer.put(torch.zeros(2, 5))  # the prompts
    for tokens in ([7, 7], [2, 7], [0, 7], [0, 2]):
        streamer.put(torch.tensor(tokens))
    watch = streamer.watch
    assert watch.first == {0: 1.0, 1: 2.0}
    assert watch.last == {0: 3.0, 1: 6.0}
    assert len(watch.between) == 1 + 3

    speculative = _Streamer(1, [2])
    speculative.put(torch.zeros(1, 5))
    speculative.put(torch.tensor([[7]]))
    speculative.put(torch.tensor([[7, 7, 2, 7, 7]]))
    assert len(speculative.watch.between) == 3


def test_another_dtype_than_asked_for_is_said(model):
    options = {"repeat": 1, "warmup": 0, "max_tokens": 2}
    assert measured(model, "transformers", **options)["notices"] == []
    half = measured(model, "transformers", dtype="half", **options)
    assert half["notices"] == ["dtype: float16 becomes float32 (CPU)"]
