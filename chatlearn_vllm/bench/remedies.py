"""What can a user do about a case that failed?"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from chatlearn_vllm.bench.cases import Case
from chatlearn_vllm.bench.memory import GIB, OVERHEAD_BYTES, Needs, gib, num_parameters
from chatlearn_vllm.bench.options import BenchOptions
from chatlearn_vllm.layouts import ModelShape

_NO_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|is less than desired GPU memory utilization|Unable to allocate",
    re.IGNORECASE,
)
_NO_KV_CACHE = re.compile(
    r"No available memory for the cache blocks|KV cache is needed|larger than the maximum number "
    r"of tokens that can be stored in KV cache|larger than the available KV cache memory",
    re.IGNORECASE,
)
_NOT_INSTALLED = re.compile(r"vLLM is not installed|No module named '?vllm", re.IGNORECASE)
INSTALL_VLLM = "vLLM is not installed: pip install 'chatlearn_vllm[gpu]', or [cpu] without a GPU"
_MARGIN_BYTES = GIB // 2


@dataclass(frozen=True)
class Situation:
    """In which a case failed."""

    case: Case
    options: BenchOptions
    shape: ModelShape
    total_bytes: int
    """Of one GPU; of the host where there is none."""
    free_bytes: int
    """Likewise, before the case; of the fullest GPU that it uses."""
    on_gpu: bool


def remedy(error: str, situation: Situation) -> str | None:
    """What to change, with numbers where they can be computed; None where nothing is known.

    Args:
        error: the error's text, or the end of the case's log.
        situation: the case, and what was free.
    """
    if _NOT_INSTALLED.search(error):
        return INSTALL_VLLM
    if _NO_KV_CACHE.search(error):
        return _for_kv_cache(situation)
    if _NO_MEMORY.search(error):
        return _for_vllm(situation) if situation.case.is_vllm else _for_transformers(situation)
    return None


def killed(situation: Situation) -> str:
    """What to change after the system killed a process (SIGKILL), as a rule for host memory."""
    needs = _needs(situation)
    return (
        "a process was killed by the system, as a rule because the host's memory was full; a rank "
        f"needs {gib(needs.weight_bytes)} for weights. "
        "Lower --max-num-seqs (VLLM_MAX_NUM_SEQS), --max-model-len (VLLM_MAX_MODEL_LEN) or "
        "--hf-batch-size, or end other processes"
    )


def timed_out(options: BenchOptions) -> str:
    """What to change after a case took too long."""
    return (
        f"took longer than --case-timeout={options.case_timeout:g} s: raise it, or lower --prompts "
        f"({options.prompts}), --completions ({options.completions}), --max-tokens "
        f"({options.max_tokens}) or --repeat ({options.repeat})"
    )


def _needs(situation: Situation) -> Needs:
    case, options = situation.case, situation.options
    dtype = options.torch_dtype_name(on_gpu=situation.on_gpu)
    return Needs.of(situation.shape, dtype, case.tensor_parallel_size, case.pipeline_parallel_size)


def _for_vllm(situation: Situation) -> str:
    options, needs = situation.options, _needs(situation)
    free, total = situation.free_bytes, situation.total_bytes
    if needs.weight_bytes + OVERHEAD_BYTES > free:
        return _weights_too_large(situation, needs)
    wanted = options.gpu_memory_utilization * total
    facts = _facts(situation, needs)
    if wanted > free:
        fits = math.floor((free - _MARGIN_BYTES) / total * 100) / 100
        return (
            f"{facts}; {options.gpu_memory_utilization:g} of {gib(total)} were asked for. Lower "
            f"VLLM_GPU_MEMORY_UTILIZATION (--gpu-memory-utilization) to {fits:.2f}, or end the "
            "processes that hold the rest"
        )
    lower = max(
        math.floor((options.gpu_memory_utilization - 0.1) * 100) / 100,
        math.ceil((needs.weight_bytes + OVERHEAD_BYTES) / total * 100) / 100,
    )
    num_seqs = max(1, options.num_seqs // 2)
    room = max(0, lower * total - needs.weight_bytes - OVERHEAD_BYTES)
    fitting = int(room // (needs.kv_bytes_per_token * options.seq_length))
    return (
        f"{facts}. Lower VLLM_GPU_MEMORY_UTILIZATION (--gpu-memory-utilization) from "
        f"{options.gpu_memory_utilization:g} to {lower:.2f} (the KV cache then holds some "
        f"{fitting} sequences of {options.seq_length} tokens), VLLM_MAX_NUM_SEQS (--max-num-seqs) "
        f"from {options.num_seqs} to {num_seqs}, or VLLM_MAX_MODEL_LEN (--max-model-len) from "
        f"{options.seq_length} to the {options.prompt_tokens + options.max_tokens} that prompt and "
        "completion take"
    )


def _for_kv_cache(situation: Situation) -> str:
    options, needs = situation.options, _needs(situation)
    free, total = situation.free_bytes, situation.total_bytes
    if needs.weight_bytes + OVERHEAD_BYTES > free:
        return _weights_too_large(situation, needs)
    longest = needs.longest_sequence(options.gpu_memory_utilization * total)
    one = needs.kv_bytes_per_token * options.seq_length
    share = math.ceil((needs.weight_bytes + OVERHEAD_BYTES + one) / total * 100) / 100
    raised = (
        f"Raise VLLM_GPU_MEMORY_UTILIZATION (--gpu-memory-utilization) from "
        f"{options.gpu_memory_utilization:g} to at least {share:.2f}, or lower"
        if share <= free / total
        else "Lower"
    )
    return (
        f"{_facts(situation, needs)}; one sequence of {options.seq_length} tokens takes "
        f"{gib(one)}. {raised} VLLM_MAX_MODEL_LEN (--max-model-len) from {options.seq_length} to "
        f"at most {longest}"
    )


def _weights_too_large(situation: Situation, needs: Needs) -> str:
    shape, options = situation.shape, situation.options
    usable = situation.free_bytes - OVERHEAD_BYTES
    case = situation.case
    whole = needs.weight_bytes * case.num_gpus
    fitting = [
        n
        for n in range(case.tensor_parallel_size + 1, shape.num_attention_heads + 1)
        if shape.num_attention_heads % n == 0
        and whole / (n * case.pipeline_parallel_size) <= usable
    ]
    advice = []
    if fitting and case.is_vllm and situation.on_gpu:
        advice.append(f"raise VLLM_TENSOR_PARALLEL_SIZE (tp=) to {fitting[0]}")
    if options.torch_dtype_name(on_gpu=situation.on_gpu) == "float32" and situation.on_gpu:
        advice.append("set VLLM_DTYPE (--dtype) to half")
    advice.append("end the processes that hold the rest, or take a smaller model")
    return f"{_facts(situation, needs)}: the weights alone do not fit; {', '.join(advice)}"


def _for_transformers(situation: Situation) -> str:
    options, needs = situation.options, _needs(situation)
    if needs.weight_bytes > situation.free_bytes:
        return _weights_too_large(situation, needs)
    one = needs.kv_bytes_per_token * (options.prompt_tokens + options.max_tokens)
    # The cache of a layer is copied as it grows, so a part of it is there twice.
    size = int((situation.free_bytes - needs.weight_bytes) // (1.5 * one))
    return (
        f"{_facts(situation, needs)}; one sequence of "
        f"{options.prompt_tokens + options.max_tokens} tokens takes {gib(one)}. Set "
        f"--hf-batch-size to at most {max(1, size)}, or to auto"
    )


def _facts(situation: Situation, needs: Needs) -> str:
    place = "each GPU" if situation.on_gpu else "the host"
    return (
        f"out of memory: {gib(situation.free_bytes)} of {gib(situation.total_bytes)} of {place} "
        f"were free; a rank's weights ({num_parameters(situation.shape) / 1e9:.2f} billion "
        f"parameters in all) take {gib(needs.weight_bytes)}, a token in the KV cache "
        f"{needs.kv_bytes_per_token / 1024:.0f} KiB"
    )
