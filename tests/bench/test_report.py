"""What does a report say beside the numbers?"""

from typing import Any

from chatlearn_vllm.bench.cases import parse_case, ratios
from chatlearn_vllm.bench.measure import Pass, throughput
from chatlearn_vllm.bench.report import lines_by_gpus, remarks


def measured(name: str, tokens: int = 80, **more: Any) -> dict[str, Any]:
    """A case with one pass of eight completions."""
    passes = throughput([Pass(1.0, 8, tokens)], 8)
    return {**parse_case(name).to_dict(), "status": "ok", "throughput": passes, **more}


def results_of(*cases: dict[str, Any]) -> dict[str, Any]:
    return {"cases": list(cases), "ratios": ratios(cases), "notices": []}


def test_cases_whose_completions_differ_in_length_are_named():
    results = results_of(
        measured("transformers", 78), measured("vllm", 80), measured("vllm-module", 88)
    )
    assert remarks(results) == [
        "vllm-module made 11.0 tokens per completion, vllm 10.0: not the same work; --ignore-eos "
        "gives all the same length",
        "vllm-module made 11.0 tokens per completion, transformers 9.8: not the same work; "
        "--ignore-eos gives all the same length",
    ]


def test_what_engines_made_of_options_is_said_once_with_all_their_cases():
    becomes, eager = "dtype: float16 becomes float32 (CPU)", "enforce_eager: true (...)"
    results = results_of(
        measured("transformers", notices=[becomes]),
        measured("vllm", notices=[eager, becomes]),
        measured("vllm-module"),  # of an earlier version
    )
    assert remarks(results) == [f"note: transformers, vllm: {becomes}", f"note: vllm: {eager}"]


def test_other_engine_arguments_are_a_line_of_their_own_over_the_gpus():
    uncached = "enable_prefix_caching=false"
    cases = [
        measured("vllm", 80),
        measured("vllm:tp=2", 120),
        measured(f"vllm:{uncached}", 60),
        measured(f"vllm:tp=2:{uncached}", 100),
    ]
    assert lines_by_gpus(cases) == [
        ("vllm, tensor parallel", [(1, 80), (2, 120)]),
        (f"vllm:{uncached}, tensor parallel", [(1, 60), (2, 100)]),
    ]
