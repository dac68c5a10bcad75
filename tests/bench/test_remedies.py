"""What is a user told to do about a failure?"""

from chatlearn_vllm.bench.cases import parse_case
from chatlearn_vllm.bench.memory import GIB, Needs, num_parameters
from chatlearn_vllm.bench.options import BenchOptions
from chatlearn_vllm.bench.remedies import Situation, killed, remedy, timed_out
from chatlearn_vllm.bench.workload import made_config
from chatlearn_vllm.layouts import ModelShape

LLAMA_8B = ModelShape.from_hf_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }  # fmt: skip
)
OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has"
NO_KV_CACHE = "ValueError: No available memory for the cache blocks. Try increasing"


def situation(case: str = "vllm", *, total: float, free: float, **options) -> Situation:
    return Situation(
        parse_case(case), BenchOptions.of(options), LLAMA_8B,
        total_bytes=int(total * GIB), free_bytes=int(free * GIB), on_gpu=True,
    )  # fmt: skip


def test_needs_of_llama_8b_and_of_the_shapes_made_here():
    assert num_parameters(LLAMA_8B) == 8_030_261_248
    whole = Needs.of(LLAMA_8B, "bfloat16", tp=1, pp=1)
    assert whole.weight_bytes == 2 * 8_030_261_248
    assert whole.kv_bytes_per_token == 128 * 1024
    part = Needs.of(LLAMA_8B, "bfloat16", tp=4, pp=2)
    assert part.weight_bytes == whole.weight_bytes // 8
    assert part.kv_bytes_per_token == whole.kv_bytes_per_token // 8
    counts = {
        shape: num_parameters(ModelShape.from_hf_config(made_config(shape, 640)))
        for shape in ("1b", "8b")
    }
    assert counts == {"1b": 1_235_814_400, "8b": 8_030_261_248}


def test_weights_that_do_not_fit_ask_for_more_gpus():
    text = remedy(OUT_OF_MEMORY, situation(total=16, free=15.5))
    assert "15.5 GiB of 16.0 GiB of each GPU were free" in text
    assert "a rank's weights (8.03 billion parameters in all) take 15.0 GiB" in text
    assert "raise VLLM_TENSOR_PARALLEL_SIZE (tp=) to 2" in text
    at_float32 = remedy(OUT_OF_MEMORY, situation(total=24, free=24, dtype="float32"))
    assert "set VLLM_DTYPE (--dtype) to half" in at_float32


def test_memory_that_others_hold_asks_for_a_lower_share():
    text = remedy(
        "ValueError: Free memory on device (40/80 GiB) is less than desired GPU memory utilization",
        situation(total=80, free=40),
    )
    assert "Lower VLLM_GPU_MEMORY_UTILIZATION (--gpu-memory-utilization) to 0.49" in text


def test_memory_that_runs_out_beside_the_cache_asks_for_less_with_numbers():
    text = remedy(OUT_OF_MEMORY, situation(total=80, free=79, max_model_len=4096))
    assert "(--gpu-memory-utilization) from 0.9 to 0.80" in text
    assert "holds some 92 sequences of 4096 tokens" in text  # (64 - 14.96 - 3) GiB / 0.5 GiB
    assert "VLLM_MAX_NUM_SEQS (--max-num-seqs) from 1024 to 512" in text
    assert "VLLM_MAX_MODEL_LEN (--max-model-len) from 4096 to the 640 that" in text


def test_a_cache_too_small_for_one_sequence_asks_for_a_shorter_one():
    text = remedy(NO_KV_CACHE, situation(total=24, free=23, max_model_len=65536))
    # 0.9 x 24 - 14.96 - 3 GiB at 128 KiB per token
    assert "one sequence of 65536 tokens takes 8.0 GiB" in text
    assert "Lower VLLM_MAX_MODEL_LEN (--max-model-len) from 65536 to at most 29" in text
    raised = remedy(
        NO_KV_CACHE, situation(total=80, free=79, max_model_len=65536, gpu_memory_utilization=0.3)
    )
    assert "Raise VLLM_GPU_MEMORY_UTILIZATION (--gpu-memory-utilization) from 0.3 to at" in raised
    assert "least 0.33" in raised


def test_transformers_gets_a_batch_size():
    text = remedy(OUT_OF_MEMORY, situation("transformers", total=80, free=79))
    assert "one sequence of 640 tokens takes 80 MiB" in text
    assert "Set --hf-batch-size to at most 546, or to auto" in text  # 64.04 GiB / (1.5 x 80 MiB)


def test_vllm_missing_says_how_to_install_it():
    text = remedy("ModuleNotFoundError: No module named 'vllm'", situation(total=80, free=79))
    assert "pip install 'chatlearn_vllm[gpu]'" in text


def test_the_cause_may_stand_in_the_log_only_and_other_errors_have_no_remedy():
    log = "INFO loading\nERROR CUDA error: out of memory\nRuntimeError: Engine core init failed"
    assert "VLLM_MAX_NUM_SEQS" in remedy(log, situation(total=80, free=79))
    assert remedy("KeyError: 'x'", situation(total=80, free=79)) is None


def test_killed_and_late_cases():
    assert "VLLM_MAX_NUM_SEQS" in killed(situation(total=80, free=79))
    late = timed_out(BenchOptions.of({"case_timeout": 60.0}))
    assert late.startswith(
        "took longer than --case-timeout=60 s: raise it, or lower --prompts (64)"
    )
