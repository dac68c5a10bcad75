"""What do the variables of run_benchmark.sh change about vLLM's engine?"""

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


def arguments_of(environ: dict[str, str], directory) -> dict:
    """Of bare vLLM on a GPU."""
    options = BenchOptions.of(options_from_environment(environ))
    (case,) = options.parsed_cases()
    make_model(config_of(options), directory / "model")
    task = Task(case, options, directory / "model", directory, directory / "events.jsonl")
    return bare_engine_arguments(task, make_job(task), on_gpu=True)


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


def test_statistics_are_off_unless_asked_for(tmp_path):
    plain = ENVIRON | {"INFERENCE_METHOD": "target_ar"}
    assert arguments_of(plain, tmp_path)["disable_log_stats"]
    kept = arguments_of(plain | {"VLLM_DISABLE_LOG_STATS": "false"}, tmp_path)
    assert not kept["disable_log_stats"]
    assert "speculative_config" not in kept
