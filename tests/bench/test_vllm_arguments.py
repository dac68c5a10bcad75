"""What do the variables of run_benchmark.sh change about vLLM's engine?"""

import json
import shlex

import pytest

from chatlearn_vllm.bench.cases import parse_case
from chatlearn_vllm.bench.child import Task
from chatlearn_vllm.bench.environment import options_from_environment
from chatlearn_vllm.bench.options import BenchOptions
from chatlearn_vllm.bench.vllm_arguments import bare_engine_arguments, make_job
from chatlearn_vllm.bench.workload import config_of, make_model

ENVIRON = {
    "INFERENCE_ENGINE": "vllm", "INFERENCE_METHOD": "speculative",
    "VLLM_ENABLE_SPECULATIVE": "true", "VLLM_NUM_SPECULATIVE_TOKENS": "4",
    "VLLM_TENSOR_PARALLEL_SIZE": "2", "VLLM_GPU_MEMORY_UTILIZATION": "0.8",
    "VLLM_MAX_MODEL_LEN": "2048", "VLLM_MAX_NUM_SEQS": "64",
    "VLLM_MAX_NUM_BATCHED_TOKENS": "8192", "VLLM_DTYPE": "half",
}  # fmt: skip


# As printed in a guide to benchmarks with vLLM, for eight GPUs and for one.
ALL_VARIABLES = """
export INFERENCE_ENGINE="vllm"
export VLLM_TENSOR_PARALLEL_SIZE=8       # 1 to the number of GPUs
export VLLM_GPU_MEMORY_UTILIZATION=0.9
export VLLM_MAX_MODEL_LEN=4096
export VLLM_MAX_NUM_SEQS=128
export VLLM_MAX_NUM_BATCHED_TOKENS=8192
export VLLM_DISABLE_LOG_STATS=true
export VLLM_DTYPE="half"                 # or "float16", "bfloat16"
export VLLM_ENABLE_SPECULATIVE="true"
export VLLM_NUM_SPECULATIVE_TOKENS=5     # without: GAMMA_VALUE
export VLLM_USE_V2_BLOCK_MANAGER="true"
"""
DRAFTS = """
export INFERENCE_ENGINE="vllm"
export INFERENCE_METHOD="speculative"
export VLLM_ENABLE_SPECULATIVE="true"
export VLLM_NUM_SPECULATIVE_TOKENS=5
export VLLM_TENSOR_PARALLEL_SIZE=8
export VLLM_GPU_MEMORY_UTILIZATION=0.9
export VLLM_MAX_MODEL_LEN=4096
export VLLM_MAX_NUM_SEQS=128
export VLLM_DTYPE="half"
export VLLM_USE_V2_BLOCK_MANAGER="true"
"""
THROUGHPUT = """
export INFERENCE_ENGINE="vllm"
export INFERENCE_METHOD="target_ar"
export VLLM_ENABLE_SPECULATIVE="false"
export VLLM_TENSOR_PARALLEL_SIZE=8
export VLLM_GPU_MEMORY_UTILIZATION=0.9
export VLLM_MAX_MODEL_LEN=4096
export VLLM_MAX_NUM_SEQS=256
export VLLM_DTYPE="half"
"""
LATENCY = """
export INFERENCE_ENGINE="vllm"
export INFERENCE_METHOD="speculative"
export VLLM_ENABLE_SPECULATIVE="true"
export VLLM_NUM_SPECULATIVE_TOKENS=4
export VLLM_TENSOR_PARALLEL_SIZE=8
export VLLM_GPU_MEMORY_UTILIZATION=0.8
export VLLM_MAX_MODEL_LEN=2048
export VLLM_MAX_NUM_SEQS=32
export VLLM_DTYPE="half"
"""
ONE_GPU = """
export INFERENCE_ENGINE="vllm"
export INFERENCE_METHOD="speculative"
export VLLM_ENABLE_SPECULATIVE="true"
export VLLM_NUM_SPECULATIVE_TOKENS=5
export VLLM_TENSOR_PARALLEL_SIZE=1
export VLLM_GPU_MEMORY_UTILIZATION=0.9
export VLLM_MAX_MODEL_LEN=4096
export VLLM_MAX_NUM_SEQS=64
export VLLM_DTYPE="half"
"""
OUT_OF_MEMORY = """
export VLLM_GPU_MEMORY_UTILIZATION=0.8
export VLLM_MAX_MODEL_LEN=2048
export VLLM_MAX_NUM_SEQS=64
"""


def variables(*blocks: str) -> dict[str, str]:
    """What lines of a shell set; later ones win."""
    words = shlex.split("\n".join(blocks), comments=True)
    return dict(word.split("=", 1) for word in words if word != "export")


def arguments_of(environ: dict[str, str], directory) -> dict:
    """Of bare vLLM on a GPU, for a model whose heads eight GPUs can share."""
    return arguments_and_notices(environ, directory, on_gpu=True)[0]


def arguments_and_notices(environ: dict[str, str], directory, *, on_gpu: bool):
    options = BenchOptions.of(options_from_environment(environ))
    (case,) = options.parsed_cases()
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    make_model(config_of(options) | heads, directory / "model")
    task = Task(case, options, directory / "model", directory, directory / "events.jsonl")
    return bare_engine_arguments(task, make_job(task), on_gpu=on_gpu)


def test_every_variable_reaches_the_engine(tmp_path):
    arguments = arguments_of(ENVIRON, tmp_path)
    expected = {
        "tensor_parallel_size": 2, "distributed_executor_backend": "mp", "dtype": "float16",
        "gpu_memory_utilization": 0.8, "max_model_len": 2048, "max_num_seqs": 64,
        "max_num_batched_tokens": 8192, "load_format": "dummy", "disable_log_stats": False,
    }  # fmt: skip
    assert {name: arguments[name] for name in expected} == expected
    speculative = arguments["speculative_config"]
    assert (speculative["method"], speculative["num_speculative_tokens"]) == ("ngram", 4)


def test_settings_of_a_case_reach_both_engines(tmp_path):
    settings = "block_size=32:enable_sleep_mode=true:speculative_config.prompt_lookup_max=7"
    options = BenchOptions.of({"cases": [f"vllm:speculative:{settings}"]})
    (case,) = options.parsed_cases()
    make_model(config_of(options), tmp_path / "model")
    task = Task(case, options, tmp_path / "model", tmp_path, tmp_path / "events.jsonl")
    job = make_job(task)
    arguments, _ = bare_engine_arguments(task, job, on_gpu=True)
    of_module = job.models["policy"].model_args
    assert arguments["block_size"] == of_module.block_size == 32
    assert arguments["enable_sleep_mode"] is True  # which bare vLLM otherwise goes without
    for speculative in (arguments["speculative_config"], of_module.speculative_config):
        assert (speculative["prompt_lookup_max"], speculative["method"]) == (7, "ngram")


def test_one_completion_of_one_prompt_is_enough_for_a_job(tmp_path):
    options = BenchOptions.of({"prompts": 1, "completions": 1})
    (tmp_path / "config.json").write_text(json.dumps(config_of(options)))
    for case in ("vllm", "vllm-module:speculative"):
        task = Task(parse_case(case), options, tmp_path, tmp_path, tmp_path / "events.jsonl")
        assert make_job(task).runtime.sample_per_episode == 1


def test_bare_vllm_says_which_options_a_cpu_cannot_take(tmp_path):
    environ = ENVIRON | {"VLLM_MAX_NUM_BATCHED_TOKENS": "64"}
    assert arguments_and_notices(environ, tmp_path, on_gpu=True)[1] == []
    arguments, notices = arguments_and_notices(environ, tmp_path, on_gpu=False)
    assert (arguments["dtype"], arguments["max_num_batched_tokens"] > 64) == ("float32", True)
    assert "dtype: float16 becomes float32 (CPU)" in notices
    assert any(notice.startswith("max_num_batched_tokens: 64 becomes") for notice in notices)
    assert not any("sleep" in notice for notice in notices)


def test_statistics_are_off_unless_asked_for(tmp_path):
    plain = ENVIRON | {"INFERENCE_METHOD": "target_ar"}
    assert arguments_of(plain, tmp_path)["disable_log_stats"]
    kept = arguments_of(plain | {"VLLM_DISABLE_LOG_STATS": "false"}, tmp_path)
    assert not kept["disable_log_stats"]
    assert "speculative_config" not in kept


@pytest.mark.parametrize(
    ("blocks", "tensor_parallel_size", "gpu_share", "max_model_len", "max_num_seqs", "drafts"),
    [
        ([ALL_VARIABLES], 8, 0.9, 4096, 128, None),  # drafts need INFERENCE_METHOD, too
        ([ALL_VARIABLES, 'INFERENCE_METHOD="speculative"'], 8, 0.9, 4096, 128, 5),
        ([DRAFTS], 8, 0.9, 4096, 128, 5),
        ([THROUGHPUT], 8, 0.9, 4096, 256, None),
        ([LATENCY], 8, 0.8, 2048, 32, 4),
        ([ONE_GPU], 1, 0.9, 4096, 64, 5),
        ([DRAFTS, OUT_OF_MEMORY], 8, 0.8, 2048, 64, 5),
    ],
)
def test_lines_of_a_guide_reach_the_engine(
    tmp_path, blocks, tensor_parallel_size, gpu_share, max_model_len, max_num_seqs, drafts
):
    arguments = arguments_of(variables(*blocks), tmp_path)
    expected = {
        "tensor_parallel_size": tensor_parallel_size, "gpu_memory_utilization": gpu_share,
        "max_model_len": max_model_len, "max_num_seqs": max_num_seqs, "dtype": "float16",
        # The counters of accepted drafts are part of the statistics.
        "disable_log_stats": drafts is None,
    }  # fmt: skip
    assert {name: arguments[name] for name in expected} == expected
    assert arguments.get("speculative_config", {}).get("num_speculative_tokens") == drafts
    assert ("max_num_batched_tokens" in arguments) == (blocks[0] is ALL_VARIABLES)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("half", "float16"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float32")],
)
def test_each_name_of_a_type_reaches_the_engine(tmp_path, given, dtype):
    assert arguments_of(ENVIRON | {"VLLM_DTYPE": given}, tmp_path)["dtype"] == dtype


def test_bare_vllm_is_not_told_how_the_module_s_ranks_work(tmp_path):
    options = BenchOptions.of({"cases": ["vllm:pp=2"]})
    (case,) = options.parsed_cases()
    make_model(config_of(options), tmp_path / "model")
    task = Task(case, options, tmp_path / "model", tmp_path, tmp_path / "events.jsonl")
    assert bare_engine_arguments(task, make_job(task), on_gpu=True)[1] == []
