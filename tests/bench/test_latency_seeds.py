"""Do requests that are measured one by one draw different responses, as those of a job do?"""

import json
from types import SimpleNamespace

import pytest

from chatlearn_vllm.bench.cases import parse_case
from chatlearn_vllm.bench.child import Task
from chatlearn_vllm.bench.measure import latencies
from chatlearn_vllm.bench.options import BenchOptions
from chatlearn_vllm.bench.vllm_arguments import make_job
from chatlearn_vllm.bench.vllm_case import _BareVLLM
from chatlearn_vllm.bench.vllm_module_case import _MeasuredPolicy
from chatlearn_vllm.bench.workload import made_config


class Engine:
    """Takes the requests of both kinds of vLLM cases and answers none."""

    requests = ()

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def add_request(self, name, prompt, sampling):
        self.seeds.append(sampling.seed)

    def add_partial_request(self, request):
        self.seeds += [keys["seed"] for _, _, keys in request.requests()]

    def has_unfinished_requests(self):
        return False


def bare(task, engine):
    return _BareVLLM(task, SimpleNamespace(llm_engine=engine), {"temperature": 1.0})


def module(task, engine):
    args = make_job(task).models["policy"].model_args
    return _MeasuredPolicy(task, SimpleNamespace(model_args=args, engine=engine))


@pytest.mark.parametrize(("case", "measured"), [("vllm:seeds", bare), ("vllm-module", module)])
def test_each_request_has_a_seed_of_its_own(case, measured, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(made_config("tiny", 640)))
    options = BenchOptions.of({"prompts": 2, "completions": 2, "latency_requests": 3})
    task = Task(parse_case(case), options, tmp_path, tmp_path, tmp_path / "events.jsonl")
    engine = Engine()
    latencies(measured(task, engine).stream, *task.latency_prompts(), options.completions)
    alone = engine.seeds[:3]
    assert len(set(alone)) == 3
