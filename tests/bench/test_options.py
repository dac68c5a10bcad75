"""What do options and the variables of run_benchmark.sh ask for, and what is refused?"""

import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from chatlearn_vllm.bench.environment import options_from_environment, without_variables
from chatlearn_vllm.bench.options import BenchOptions, OptionError
from chatlearn_vllm.cli.main import main

ROOT = Path(__file__).parents[2]
SPECULATIVE = {
    "INFERENCE_ENGINE": "vllm", "INFERENCE_METHOD": "speculative",
    "VLLM_ENABLE_SPECULATIVE": "true",
}  # fmt: skip


def of(environ: dict[str, str]) -> BenchOptions:
    return BenchOptions.of(options_from_environment(environ))


def test_every_variable_has_its_effect():
    options = of(
        SPECULATIVE
        | {
            "VLLM_TENSOR_PARALLEL_SIZE": "8",
            "VLLM_GPU_MEMORY_UTILIZATION": "0.8",
            "VLLM_MAX_MODEL_LEN": "2048",
            "VLLM_MAX_NUM_SEQS": "64",
            "VLLM_MAX_NUM_BATCHED_TOKENS": "8192",
            "VLLM_DISABLE_LOG_STATS": "false",
            "VLLM_DTYPE": "half",
            "VLLM_NUM_SPECULATIVE_TOKENS": "4",
            "GAMMA_VALUE": "6",
            "VLLM_USE_V2_BLOCK_MANAGER": "true",
        }
    )
    (case,) = options.parsed_cases()
    assert str(case) == "vllm:tp=8:speculative"
    assert options.gpu_memory_utilization == 0.8
    assert options.seq_length == 2048
    assert options.num_seqs == 64
    assert options.max_num_batched_tokens == 8192
    assert options.log_stats
    assert options.torch_dtype_name(on_gpu=True) == "float16"
    assert options.torch_dtype_name(on_gpu=False) == "float32"
    assert options.num_speculative_tokens == 4
    assert options.notices == (
        "VLLM_USE_V2_BLOCK_MANAGER has no effect: vLLM's V1 engine has one block manager",
    )


def test_without_variables_transformers_is_measured():
    options = of({})
    assert options.cases == ("transformers",)
    assert not options.log_stats
    assert options.seq_length == 128 + 512


def test_gamma_counts_where_vllm_has_no_number_of_its_own():
    assert of({"GAMMA_VALUE": "3"}).num_speculative_tokens == 3
    none = SPECULATIVE | {"VLLM_NUM_SPECULATIVE_TOKENS": "", "GAMMA_VALUE": "3"}
    assert of(none).num_speculative_tokens == 3


def test_method_and_switch_decide_together_about_drafts_of_vllm():
    assert of(SPECULATIVE).cases == ("vllm:speculative",)
    off = of(SPECULATIVE | {"VLLM_ENABLE_SPECULATIVE": "false"})
    assert off.cases == ("vllm",)
    assert "has no effect on vLLM with VLLM_ENABLE_SPECULATIVE=false" in off.notices[0]
    unused = of(SPECULATIVE | {"INFERENCE_METHOD": "target_ar"})
    assert unused.cases == ("vllm",)
    assert "has no effect without INFERENCE_METHOD=speculative" in unused.notices[0]
    assert of({"INFERENCE_METHOD": "speculative"}).cases == ("transformers:speculative",)
    left_open = of(SPECULATIVE | {"VLLM_ENABLE_SPECULATIVE": ""})
    assert (left_open.cases, left_open.notices) == (("vllm:speculative",), ())


def test_several_engines_and_batching():
    options = of({"INFERENCE_ENGINE": "transformers vllm,vllm-module", "ENABLE_BATCH": "false"})
    assert options.cases == ("transformers", "vllm", "vllm-module")
    assert options.hf_batch_size == "1"
    assert options.notices == ("ENABLE_BATCH has no effect on vLLM: it batches continuously",)


def test_variables_say_how_cases_of_the_command_line_run():
    method = {"INFERENCE_ENGINE": "transformers", "INFERENCE_METHOD": "speculative"}
    given = ["vllm:tp=2", "vllm:spec", "transformers"]
    assert options_from_environment(method, given)["cases"] == (
        "vllm:tp=2:speculative", "vllm:spec", "transformers:speculative",
    )  # fmt: skip
    batch = options_from_environment({"ENABLE_BATCH": "false"}, ["transformers-sdpa", "vllm"])
    assert batch["hf_batch_size"] == "1"
    assert batch["notices"] == ("ENABLE_BATCH has no effect on vLLM: it batches continuously",)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("VLLM_MAX_NUM_SEQ", "VLLM_MAX_NUM_SEQS"),
        ("VLLM_MAX_SEQ_LEN", "VLLM_MAX_MODEL_LEN"),
        ("VLLM_GPU_MEM_UTILIZATION", "VLLM_GPU_MEMORY_UTILIZATION"),
        ("GAMMA", "GAMMA_VALUE"),
    ],
)
def test_a_variable_that_is_nearly_one_of_them_is_told(name, nearest):
    assert of({name: "5"}).notices == (f"{name}=5 is not read here; did you mean {nearest}?",)


def test_no_variable_of_vllm_is_taken_for_a_misspelt_one():
    source = find_spec("vllm").submodule_search_locations[0]
    names = re.findall(r'"(VLLM_[A-Z0-9_]+)"', Path(source, "envs.py").read_text())
    assert len(names) > 50
    assert of(dict.fromkeys(names, "1")).notices == ()


def test_every_value_that_cannot_be_is_named_at_once():
    with pytest.raises(OptionError) as refusal:
        options_from_environment(
            {
                "INFERENCE_ENGINE": "tensorrt",
                "INFERENCE_METHOD": "beam",
                "VLLM_TENSOR_PARALLEL_SIZE": "eight",
                "VLLM_DISABLE_LOG_STATS": "maybe",
            }
        )
    assert str(refusal.value).splitlines() == [
        "VLLM_TENSOR_PARALLEL_SIZE='eight' must be a whole number",
        "VLLM_DISABLE_LOG_STATS='maybe' must be true or false",
        "INFERENCE_METHOD='beam' must be target_ar or speculative",
        "INFERENCE_ENGINE='tensorrt' must be of transformers, transformers-sdpa, "
        "transformers-flash, vllm, vllm-module",
    ]


def test_a_value_out_of_range_names_option_and_variable():
    with pytest.raises(OptionError) as refusal:
        of({"VLLM_GPU_MEMORY_UTILIZATION": "1.5", "VLLM_MAX_NUM_SEQS": "0", "VLLM_DTYPE": "int8"})
    text = str(refusal.value)
    assert "--max-num-seqs (VLLM_MAX_NUM_SEQS)=0 must be at least 1" in text
    assert "--gpu-memory-utilization (VLLM_GPU_MEMORY_UTILIZATION)=1.5 must be in (0, 1]" in text
    assert "--dtype (VLLM_DTYPE)='int8' must be one of auto, half" in text


def test_a_step_must_have_room_for_a_token_of_each_sequence():
    few = {"INFERENCE_ENGINE": "vllm", "VLLM_MAX_NUM_SEQS": "64"}
    assert of(few | {"VLLM_MAX_NUM_BATCHED_TOKENS": "64"}).max_num_batched_tokens == 64
    for none in ("", "None"):
        assert of(few | {"VLLM_MAX_NUM_BATCHED_TOKENS": none}).max_num_batched_tokens is None
    with pytest.raises(OptionError) as refusal:
        of(few | {"VLLM_MAX_NUM_BATCHED_TOKENS": "63"})
    assert str(refusal.value) == (
        "--max-num-batched-tokens (VLLM_MAX_NUM_BATCHED_TOKENS)=63 must be at least "
        "--max-num-seqs (VLLM_MAX_NUM_SEQS)=64, one token per running sequence; raise it or lower "
        "that"
    )


def test_a_variable_with_a_value_that_cannot_be_is_refused_by_its_name():
    with pytest.raises(OptionError, match="GAMMA_VALUE=0 must be at least 1"):
        options_from_environment({"GAMMA_VALUE": "0"})
    with pytest.raises(OptionError, match="INFERENCE_ENGINE=' , ' must name an engine, of transf"):
        options_from_environment({"INFERENCE_ENGINE": " , "})


def test_processes_that_run_vllm_do_not_get_the_variables():
    environ = SPECULATIVE | {"VLLM_ATTENTION_BACKEND": "FLASH_ATTN", "PATH": "/bin"}
    assert without_variables(environ) == {"VLLM_ATTENTION_BACKEND": "FLASH_ATTN", "PATH": "/bin"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "--model=nowhere: no config.json there"),
        (["--shape", "9b"], "--shape='9b' must be one of tiny, 1b, 8b"),
        (["--max-model-len", "100"], "has no room for --prompt-tokens=128 and --max-tokens=512"),
        (["--temperature", "0"], "greedy completions of a prompt are all equal"),
        (["--temperature", "nan"], "--temperature=nan must be a finite number"),
        (["--case-timeout", "0"], "--case-timeout=0.0 must be more than 0"),
        (["--hf-search-seconds", "-1"], "--hf-search-seconds=-1.0 must be at least 0"),
        (["--seed", str(2**31)], "--seed=2147483648 must be less than 2147483648"),
        (["--hf-batch-size", "many"], "must be auto or a whole number >= 1"),
        (["--prompt-file", "nowhere"], "--prompt-file=nowhere: no such file"),
        (["--prompt-file", "/"], "--prompt-file=/: is a directory; name a file in it"),
        (["vllm:tp=3"], "must divide the model's 4 attention heads; set it to 1, 2 or 4"),
        (["--report", "nowhere.json"], "--report nowhere.json: cannot be read"),
    ],
)
def test_the_command_refuses_before_anything_starts(arguments, message, capsys, tmp_path):
    assert main(["bench", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_directory_of_results_that_cannot_be_made_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["bench", "--out", str(tmp_path / "file/results")]) == 2
    message = f"--out={tmp_path}/file/results: cannot be made (Not a directory); name another"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("out", ["/proc/1", "/sys/kernel"])
def test_a_directory_that_takes_no_files_is_named_before_anything_is_measured(out, capsys):
    assert main(["bench", "transformers", "--out", out]) == 2
    assert f"--out={out}: cannot be written (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("copy", "message"),
    [("", "is a directory; name a file in it"), ("file/x.json", "its directory cannot be made")],
)
def test_a_copy_of_the_results_that_cannot_be_written_is_named(copy, message, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / copy
    out = str(tmp_path / "out")
    assert main(["bench", "transformers", "--out", out, "--json", str(path)]) == 2
    assert f"--json={path}: {message}" in capsys.readouterr().err
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("environ", "notices"),
    [
        ({}, []),
        ({"INFERENCE_ENGINE": "vllm"}, []),
        (
            {"INFERENCE_ENGINE": "vllm", "VLLM_ENABLE_SPECULATIVE": "true"},
            ["VLLM_ENABLE_SPECULATIVE=true has no effect without INFERENCE_METHOD=speculative"],
        ),
    ],
)
def test_the_script_has_no_effectless_values_of_its_own(tmp_path, environ, notices):
    python = tmp_path / "python"  # notes what the script runs it with
    python.write_text('#!/bin/sh\nenv > "$0.environ"\n')
    python.chmod(0o755)
    subprocess.run(
        ["bash", ROOT / "run_benchmark.sh"], check=True,
        env={"PATH": os.environ["PATH"], "PYTHON": str(python)} | environ,
    )  # fmt: skip
    lines = (tmp_path / "python.environ").read_text().splitlines()
    set_by_script = dict(line.split("=", 1) for line in lines)
    found = options_from_environment(set_by_script)
    assert list(found["notices"]) == notices
    of_the_guide = {
        "gpu_memory_utilization": 0.9, "max_model_len": 4096, "max_num_seqs": 128, "dtype": "half",
        "num_speculative_tokens": 5, "cases": (environ.get("INFERENCE_ENGINE", "transformers"),),
    }  # fmt: skip
    assert {name: found[name] for name in of_the_guide} == of_the_guide
    assert "max_num_batched_tokens" not in found


def test_paths_of_the_script_are_relative_to_the_caller(tmp_path):
    (tmp_path / "m1").mkdir()
    (tmp_path / "m1/config.json").write_text("[]")
    run = subprocess.run(
        ["bash", ROOT / "run_benchmark.sh", "--model", "m1"],
        cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 2
    assert "m1/config.json: must hold a JSON object" in run.stderr


def test_the_script_passes_variables_and_arguments_on():
    environ = {"PATH": os.environ["PATH"], "VLLM_TENSOR_PARALLEL_SIZE": "3"}
    run = subprocess.run(
        ["bash", ROOT / "run_benchmark.sh", "vllm", "--shape", "tiny"],
        env=environ | {"INFERENCE_ENGINE": "transformers"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 2
    assert "vllm:tp=3: tensor parallel size 3 must divide the model's 4 attention" in run.stderr


def test_all_cases_that_cannot_be_read_are_told_at_once():
    options = BenchOptions.of({"cases": ["vllm:tp=0", "transformers:tp=2", "vllm:block_size="]})
    with pytest.raises(OptionError) as refusal:
        options.parsed_cases()
    assert str(refusal.value).splitlines() == [
        "case 'vllm:tp=0': tp='0' must be a whole number >= 1",
        "case 'transformers:tp=2': transformers runs on one GPU here; take tp and pp off, or "
        "measure vllm",
        "case 'vllm:block_size=': block_size has no value; give one or take it off",
    ]


def test_a_variable_is_read_whomever_it_concerns():
    with pytest.raises(OptionError, match="ENABLE_BATCH='2' must be true or false"):
        options_from_environment({"INFERENCE_ENGINE": "vllm", "ENABLE_BATCH": "2"})
