"""Does an evaluation of a strategy file have its prompts, its sampling and its beams?"""

from pathlib import Path

import pytest

from chatlearn_vllm.config import load_config
from tests.config.strategy_job import INFER, JOB, args_of, problems_of

EVAL = "validation.generating_args."
DATA = "validation.data_args."


@pytest.fixture
def job(write) -> Path:
    """A small strategy file with an evaluation."""
    return write("job.yaml", JOB + "validation: {data_args: {file_name: e.jsonl}}\n")


def notice_of(job, *overrides) -> str:
    (line,) = load_config(job, overrides).notices
    return line


def test_an_evaluation_has_its_own_sampling(job):
    overrides = ["validation.generating_args.temperature=0.6",
                 "validation.generating_args.top_p=0.5"]  # fmt: skip
    args = args_of(job, overrides)
    assert (args.eval_temperature, args.eval_top_p, args.eval_top_k) == (0.6, 0.5, 50)
    assert args_of(job, [*overrides, "val_greedy=True"]).eval_temperature == 0


def test_null_is_the_default_in_an_evaluation_as_in_training(job):
    overrides = [f"{EVAL}{name}=None" for name in ("top_p", "top_k", "temperature", "min_p")]
    args = args_of(job, overrides)
    assert (args.eval_top_p, args.eval_top_k, args.eval_temperature) == (0.7, 50, 0.95)


@pytest.mark.parametrize(
    ("overrides", "penalty"),
    [
        ([f"{EVAL}num_beams=3", f"{INFER}length_penalty=0.5"], 0.5),
        ([f"{EVAL}num_beams=3", f"{EVAL}length_penalty=2.0"], 2.0),
        ([f"{EVAL}num_beams=3", f"{EVAL}length_penalty=2.0", f"{INFER}length_penalty=2.0"], 2.0),
    ],
)
def test_a_search_of_the_evaluation_has_the_length_penalty_of_the_file(job, overrides, penalty):
    loaded = load_config(job, overrides)
    args = loaded.models["policy"].model_args
    assert (args.eval_num_beams, args.length_penalty) == (3, penalty)
    assert loaded.notices == ()


def test_a_length_penalty_that_no_search_reads_is_told(job):
    for key in (INFER, EVAL):
        told = f"no effect of {key}length_penalty=0.5 (only with num_beams above 1, which searches)"
        assert told in notice_of(job, f"{key}length_penalty=0.5")
    both = [f"{EVAL}num_beams=3", f"{EVAL}length_penalty=2.0", f"{INFER}length_penalty=0.5"]
    told = f"{INFER}length_penalty=0.5 (that of validation.generating_args counts)"
    assert told in notice_of(job, *both)
    assert args_of(job, both).length_penalty == 2.0
    judge = "rewards.judge={worker_cls: my.Judge, strategy_args: {strategy_name: vllm}, "
    judge += "device_mapping: [4], generating_args: {top_p: 1, length_penalty: 0.5}}"
    assert "rewards.judge.generating_args.length_penalty=0.5 (only with" in notice_of(job, judge)


def test_an_evaluation_takes_as_many_records_as_its_data_args_say(job):
    assert load_config(job).runtime.eval_data_num_limit == -1
    assert load_config(job, [f"{DATA}max_samples=5"]).runtime.eval_data_num_limit == 5
    (line,) = problems_of(job, [f"{DATA}max_samples=x"])
    assert line == f"command line: {DATA}max_samples='x': must be a valid integer"


@pytest.mark.parametrize("name", ["prompt", "tag"])
def test_a_field_of_records_that_only_the_evaluation_names_is_told(job, name):
    told = f"no effect of {DATA}{name}=q (data_args.{name} of actor_train counts in an evaluation"
    assert told in notice_of(job, f"{DATA}{name}=q")
    same = load_config(job, [f"{DATA}{name}=q", f"actor_train.data_args.{name}=q"])
    assert same.notices == ()


def test_an_evaluation_without_a_file_is_told(job):
    told = "no effect of validation (nothing is evaluated without data_args.file_name)"
    assert told in notice_of(job, f"{DATA}file_name=None")
    loaded = load_config(job, [f"{DATA}file_name=None"])
    assert loaded.runtime.eval_data_path is None
