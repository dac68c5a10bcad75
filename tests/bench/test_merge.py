"""Which runs become one report, and what of them counts?"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from chatlearn_vllm.bench.cases import OptionError, parse_case
from chatlearn_vllm.bench.measure import Pass, throughput
from chatlearn_vllm.bench.merge import merged
from chatlearn_vllm.bench.options import BenchOptions
from chatlearn_vllm.bench.workload import made_config
from chatlearn_vllm.cli.main import main

MEMORY = {"device_bytes": None, "host_rss_bytes": 2**30}
H200, H100 = {"name": "NVIDIA H200"}, {"name": "NVIDIA H100"}


def case(name: str, seconds: float = 1.0, status: str = "ok") -> dict[str, Any]:
    entry = {**parse_case(name).to_dict(), "status": status, "reason": None}
    if status != "ok":
        return entry
    return entry | {
        "throughput": throughput([Pass(seconds, 8, 80)], 8), "memory": MEMORY, "load_s": 1.0,
        "latency": None, "speculation": None,
    }  # fmt: skip


def run(*cases: dict[str, Any], gpus: list[dict[str, Any]] | None = None, **options) -> dict:
    """Results as the benchmark writes them."""
    return {
        "format": 1, "started": "", "command": [], "versions": {}, "notices": [],
        "options": BenchOptions.of(options).to_dict(),
        "machine": {"gpus": gpus or [], "cpu": "EPYC", "num_cpus": 2},
        "model": {
            "name": "m", "num_parameters": 1, "config": made_config("tiny", 64),
            "has_weights": False,
        },
        "cases": list(cases), "ratios": [],
    }  # fmt: skip


@pytest.fixture
def merge(tmp_path):
    """Merge results as if read from files a.json, b.json, ..."""

    def merge_all(*runs: Any) -> dict[str, Any]:
        paths = [tmp_path / f"{name}.json" for name in "abc"[: len(runs)]]
        for path, results in zip(paths, runs, strict=True):
            path.write_text(json.dumps(results))
        return merged(paths)

    return merge_all


def test_of_a_case_in_several_runs_the_last_one_that_went_well_counts(merge):
    for status in ("failed", "not run", "interrupted", "skipped"):
        together = merge(run(case("vllm")), run(case("vllm", status=status), case("vllm-module")))
        assert [one["status"] for one in together["cases"]] == ["ok", "ok"]
    later = merge(run(case("vllm", 1.0)), run(case("vllm", 2.0)), run(case("vllm", 9, "failed")))
    assert later["cases"][0]["throughput"]["passes"][0]["seconds"] == 2.0
    repaired = merge(run(case("vllm", status="failed")), run(case("vllm")))
    assert repaired["cases"][0]["status"] == "ok"


def test_machines_may_have_more_of_the_same_gpus(merge):
    together = merge(run(case("vllm"), gpus=[H200]), run(case("vllm:tp=2"), gpus=[H200, H200]))
    assert len(together["machine"]["gpus"]) == 2


def test_runs_on_different_devices_are_no_comparison(merge):
    with pytest.raises(OptionError, match=r"b.json: another device \(NVIDIA H100, not NVIDIA H200"):
        merge(run(case("vllm"), gpus=[H200]), run(case("vllm-module"), gpus=[H100]))
    with pytest.raises(OptionError, match=r"another device \(EPYC, not NVIDIA H200\)"):
        merge(run(case("vllm"), gpus=[H200]), run(case("vllm-module")))
    other = run(case("vllm-module"))
    other["machine"]["cpu"] = "Xeon"
    with pytest.raises(OptionError, match=r"another device \(Xeon, not EPYC\)"):
        merge(run(case("vllm")), other)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_seqs", 7),
        ("max_num_batched_tokens", 2048),
        ("max_model_len", 900),
        ("enforce_eager", True),
    ],
)
def test_engines_of_vllm_with_other_limits_are_no_comparison(merge, name, value):
    with pytest.raises(OptionError, match=f"another {name} "):
        merge(run(case("vllm")), run(case("vllm-module"), **{name: value}))
    merge(run(case("vllm")), run(case("transformers"), **{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_speculative_tokens", 2), ("draft_sample_method", "probabilistic"), ("draft", "other")],
)
def test_drafts_must_be_equal_where_they_were_used(merge, name, value):
    drafting = run(case("vllm:speculative"))
    other = copy.deepcopy(drafting)
    other["options"][name] = value
    with pytest.raises(OptionError, match=f"another {name} "):
        merge(drafting, other)
    other["cases"] = [case("vllm")]
    merge(drafting, other)


def test_names_of_the_same_type_are_equal(merge):
    merge(
        run(case("vllm"), gpus=[H200], dtype="half"),
        run(case("vllm-module"), gpus=[H200], dtype="float16"),
    )
    with pytest.raises(OptionError, match=r"another dtype \(bfloat16, not float16\)"):
        merge(run(case("vllm"), gpus=[H200], dtype="half"), run(case("vllm-module"), gpus=[H200]))


def test_random_weights_are_not_compared_with_those_of_a_checkpoint(merge):
    trained = run(case("vllm-module"))
    trained["model"]["has_weights"] = True
    with pytest.raises(OptionError, match="another weights of the model"):
        merge(run(case("vllm")), trained)
    del trained["model"]["has_weights"]  # of an earlier version
    merge(run(case("vllm")), trained)


def test_what_is_no_whole_results_file_is_refused_by_name(merge):
    broken = run(case("vllm"))
    del broken["cases"][0]["throughput"]
    headless = {name: value for name, value in run().items() if name != "versions"}
    broken_off = ({"format": 1}, {"format": 1, "options": 3}, broken, headless)
    for results in ({}, [], {"format": 2}, *broken_off):
        with pytest.raises(OptionError, match=r"a.json: no results of this version; measure again"):
            merge(results)


def test_published_results_become_one_report(tmp_path):
    published = Path(__file__).parents[2] / "docs/benchmarks"
    names = ("8b", "8b_transformers", "8b_tp2", "8b_pp2", "8b_tp4")
    together = merged([published / f"h200_bench_{name}.json" for name in names])
    done = [one["case"] for one in together["cases"] if one["status"] == "ok"]
    assert done == [
        "vllm-module", "vllm", "transformers-sdpa",
        "vllm:tp=2", "vllm:tp=2:logprobs", "vllm-module:tp=2",
        "vllm-module:pp=2", "vllm:pp=2", "vllm:tp=4", "vllm-module:tp=4",
    ]  # fmt: skip


def test_a_report_is_written_to_json_too_and_takes_nothing_to_measure(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(run(case("vllm"))))
    report = ["--report", str(tmp_path / "a.json"), "--out", str(tmp_path / "out")]
    assert main(["bench", *report, "--json", str(tmp_path / "all.json")]) == 0
    written = json.loads((tmp_path / "all.json").read_text())
    assert written == json.loads((tmp_path / "out/results.json").read_text())
    capsys.readouterr()
    assert main(["bench", "vllm", *report]) == 2
    assert "vllm: --report measures nothing; leave the cases out" in capsys.readouterr().err
    assert main(["bench", *report, "--max-num-seqs", "4"]) == 2
    assert "--max-num-seqs: no effect with --report" in capsys.readouterr().err
    assert main(["bench", *report, "--json", str(tmp_path)]) == 2
    assert "is a directory; name a file in it" in capsys.readouterr().err
