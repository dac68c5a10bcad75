"""Does a benchmark measure every engine, here on CPU, and survive a case that fails?"""

import base64
import copy
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from chatlearn_vllm.bench.report import lines_by_gpus
from chatlearn_vllm.cli.main import main

OPTIONS = [
    "--shape", "tiny", "--prompts", "3", "--completions", "2", "--prompt-tokens", "12",
    "--max-tokens", "10", "--ignore-eos", "--repeat", "2", "--latency-requests", "2",
]  # fmt: skip
CASES = ["transformers", "transformers:speculative", "transformers-flash", "vllm", "vllm-module"]
MEASURED = ["transformers", "vllm", "vllm-module"]


@dataclass
class Ran:
    """One run of the command."""

    out: Path
    code: int
    results: dict[str, Any]

    def case(self, name: str) -> dict[str, Any]:
        return next(case for case in self.results["cases"] if case["case"] == name)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """All cases; one of them has a draft model that cannot be loaded."""
    out = tmp_path_factory.mktemp("bench")
    draft = out / "draft"
    draft.mkdir()
    (out / "model-tiny").mkdir()
    (out / "model-tiny/config.json").write_text("the user's")
    (draft / "config.json").write_text('{"model_type": "nothing"}')
    (draft / "model.safetensors").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process less to start
        paths = ["--out", str(out), "--json", str(out / "copy/numbers.json"), "--draft", str(draft)]
        code = main(["bench", *CASES, *OPTIONS, *paths])
    return Ran(out, code, json.loads((out / "results.json").read_text()))


@pytest.mark.parametrize("name", MEASURED)
def test_every_engine_has_all_its_numbers(ran, name):
    case = ran.case(name)
    assert case["status"] == "ok", case["reason"]
    passes = case["throughput"]["passes"]
    assert len(passes) == 2
    for one in passes:
        assert one["output_tokens"] == one["completions"] * 10
        assert one["completions"] == case["throughput"]["measured_completions"]
        assert one["output_tokens_per_s"] == one["output_tokens"] / one["seconds"]
    for latency, num_requests in (("alone", 2), ("loaded", passes[0]["completions"])):
        found = case["latency"][latency]
        assert found["num_requests"] == num_requests
        assert found["inter_token_s"]["num"] == num_requests * 9
        for key in ("ttft_s", "inter_token_s", "request_s"):
            assert 0 < found[key]["p50"] <= found[key]["p90"] <= found[key]["p99"]
        for statistic in ("mean", "p50", "p90", "p99"):
            assert found["ttft_s"][statistic] < found["request_s"][statistic]
    assert case["memory"]["host_rss_bytes"] > 50 * 2**20
    assert case["memory"]["device_bytes"] is None


def test_both_vllm_cases_have_the_same_engine_arguments_but_for_what_a_job_adds(ran):
    bare, module = (dict(ran.case(name)["engine_arguments"]) for name in ("vllm", "vllm-module"))
    assert {name for name in bare.keys() | module.keys() if bare.get(name) != module.get(name)} <= {
        "distributed_executor_backend", "disable_log_stats", "logprobs_mode",
    }  # fmt: skip
    assert bare["disable_log_stats"]
    assert bare["max_model_len"] == 22
    assert bare["max_num_seqs"] == 6


def test_a_failure_is_recorded_and_the_other_cases_go_on(ran):
    assert ran.code == 1
    failed = ran.case("transformers:speculative")
    assert failed["status"] == "failed"
    assert failed["reason"].startswith("ValueError: ")
    assert "nothing" in failed["reason"]
    assert failed["remedy"] == f"see {failed['log']}"
    assert "Traceback" in Path(failed["log"]).read_text()
    skipped = ran.case("transformers-flash")
    assert (skipped["status"], skipped["reason"]) == ("skipped", "FlashAttention-2 needs a GPU")


def test_ratios_are_of_what_was_measured(ran):
    speeds = {name: ran.case(name)["throughput"]["output_tokens_per_s"] for name in MEASURED}
    assert {(one["case"], one["to"]): one["ratio"] for one in ran.results["ratios"]} == {
        ("vllm-module", "vllm"): speeds["vllm-module"] / speeds["vllm"],
        ("vllm", "transformers"): speeds["vllm"] / speeds["transformers"],
        ("vllm-module", "transformers"): speeds["vllm-module"] / speeds["transformers"],
    }


def test_results_say_where_they_come_from(ran):
    assert ran.results["versions"].keys() >= {"python", "torch", "transformers", "chatlearn_vllm"}
    assert ran.results["machine"]["gpus"] == []
    assert ran.results["machine"]["num_cpus"] >= 1
    assert ran.results["model"]["num_parameters"] > 100_000
    assert ran.results["options"]["max_tokens"] == 10
    assert json.loads((ran.out / "copy/numbers.json").read_text()) == ran.results


def test_a_made_model_takes_no_directory_of_the_user(ran):
    assert (ran.out / "model-tiny/config.json").read_text() == "the user's"
    assert [path.name for path in ran.out.glob("model-*")] == ["model-tiny"]


def test_the_page_holds_tables_remarks_and_both_plots(ran):
    page = (ran.out / "index.html").read_text()
    for name in ("throughput_by_engine.png", "throughput_by_gpus.png"):
        plot = (ran.out / name).read_bytes()
        assert plot.startswith(b"\x89PNG")
        assert base64.b64encode(plot).decode() in page
    assert "<td>vllm-module</td>" in page
    assert "transformers:speculative failed: ValueError" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_reports_of_several_runs_become_one(ran, tmp_path, capsys):
    larger = copy.deepcopy(ran.results)
    larger["cases"] = [ran.case("vllm") | {"case": "vllm:tp=2", "tensor_parallel_size": 2}]
    larger["cases"][0]["num_gpus"] = 2
    (tmp_path / "two.json").write_text(json.dumps(larger))
    reports = [str(ran.out / "results.json"), str(tmp_path / "two.json")]
    assert main(["bench", "--report", *reports, "--out", str(tmp_path / "all")]) == 0
    both = json.loads((tmp_path / "all/results.json").read_text())
    assert [case["case"] for case in both["cases"]] == [*CASES, "vllm:tp=2"]
    lines = dict(lines_by_gpus(both["cases"]))
    assert [number for number, _ in lines["vllm, tensor parallel"]] == [1, 2]
    assert "vllm:tp=2" in capsys.readouterr().out

    larger["options"]["max_tokens"] = 11
    (tmp_path / "two.json").write_text(json.dumps(larger))
    assert main(["bench", "--report", *reports, "--out", str(tmp_path / "all")]) == 2
    assert "another max_tokens (11, not 10) than in" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 130), (signal.SIGKILL, -9)])
def test_no_process_is_left_when_the_terminal_or_the_benchmark_is_gone(tmp_path, number, code):
    command = [sys.executable, "-m", "chatlearn_vllm.cli.main", "bench", "transformers", *OPTIONS]
    long = ["--repeat", "100000", "--out", tmp_path]
    run = subprocess.Popen(
        [*command, *long], stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup's is inherited
    )  # fmt: skip
    while not (children := psutil.Process(run.pid).children()):
        time.sleep(0.01)
    run.send_signal(number)
    assert run.wait() == code
    assert psutil.wait_procs(children, timeout=20)[1] == []


@pytest.mark.slow
def test_what_was_measured_before_ctrl_c_is_reported_and_no_process_is_left(tmp_path):
    cases = ["transformers", "transformers-sdpa", "vllm"]
    command = [sys.executable, "-m", "chatlearn_vllm.cli.main", "bench", *cases, *OPTIONS]
    run = subprocess.Popen([*command, "--out", tmp_path], stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("[2/3] transformers-sdpa ..."):
            while not (children := psutil.Process(run.pid).children()):
                time.sleep(0.01)
            run.send_signal(signal.SIGINT)
    assert run.wait() == 130
    assert not any(child.is_running() for child in children)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [case["status"] for case in results["cases"]] == ["ok", "interrupted", "not run"]
    assert (
        "transformers-sdpa interrupted: ended by the user" in (tmp_path / "index.html").read_text()
    )


@pytest.mark.slow
def test_a_case_that_takes_too_long_is_ended_and_rounds_add_up(tmp_path):
    out = ["--out", str(tmp_path)]
    assert main(["bench", "transformers", *OPTIONS, *out, "--case-timeout", "0.5"]) == 1
    (case,) = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert (case["status"], case["reason"]) == ("failed", "timed out")
    assert "--case-timeout=0.5" in case["remedy"]

    assert main(["bench", "transformers", *OPTIONS, *out, "--rounds", "2"]) == 0
    (case,) = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert len(case["throughput"]["passes"]) == 4
