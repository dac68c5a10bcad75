"""What is a step of vLLM made of that verifies drafts, beside one that does not draft?

    python benchmarks/verifying_step.py --shape 8b --out steps.json
    python benchmarks/verifying_step.py --shape tiny --out steps.json      # on CPU

Bare vLLM in this process, random weights, prompts that repeat themselves so that n-grams are found
in each of them. A step is timed as it runs and again under torch's profiler: what remains of it
when the GPU's work is taken off is time in which the GPU waits for the host.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `chatlearn_vllm`

PROMPT_TOKENS = 120
NUM_WARMUP, NUM_TIMED, NUM_PROFILED = 60, 30, 10
MAX_MODEL_LEN = 1024
NGRAM = {
    "method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1,
}  # fmt: skip
LARGEST_KERNELS = 12


def measure(shape: str, sequences: int, drafts: bool, out: Path) -> None:
    """Write what steps of one engine took, in milliseconds per step.

    Args:
        shape: one of the benchmark's Llamas.
        sequences: that decode at once.
        drafts: whether each step verifies five drafted tokens of each.
        out: file to be written.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm import LLM, SamplingParams

    from chatlearn_vllm.bench.workload import made_config

    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(made_config(shape, MAX_MODEL_LEN)))
        engine = LLM(
            directory, load_format="dummy", skip_tokenizer_init=True, max_model_len=MAX_MODEL_LEN,
            max_num_seqs=sequences, enable_prefix_caching=False, disable_log_stats=True,
            speculative_config=NGRAM if drafts else None,
            **({"gpu_memory_utilization": 0.6} if on_gpu else {"kv_cache_memory_bytes": 2**30}),
        ).llm_engine  # fmt: skip
    greedy = SamplingParams(
        temperature=0, max_tokens=MAX_MODEL_LEN - PROMPT_TOKENS, ignore_eos=True, detokenize=False
    )
    for row in range(sequences):
        ids = [10 + row, 11 + row, 12 + row] * (PROMPT_TOKENS // 3)
        engine.add_request(str(row), {"prompt_token_ids": ids}, greedy)

    def run(num_steps: int) -> float:
        start = time.perf_counter()
        for _ in range(num_steps):
            engine.step()
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / num_steps * 1e3

    run(NUM_WARMUP)
    result: dict[str, Any] = {"drafts": drafts, "sequences": sequences, "step_ms": run(NUM_TIMED)}
    if on_gpu:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            result["step_profiled_ms"] = run(NUM_PROFILED)
        result |= gpu_time(profiled.events())
        result["device"] = torch.cuda.get_device_name()
    out.write_text(json.dumps(result))


def gpu_time(events: Any) -> dict[str, Any]:
    """How long the GPU works per step, and the kernels that take longest."""
    from torch.autograd import DeviceType

    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type == DeviceType.CUDA
    )
    busy, end = 0.0, spans[0][0]
    for start, stop, _ in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    kernels: Counter[str] = Counter()
    for start, stop, name in spans:
        kernels[name[:100]] += (stop - start) / NUM_PROFILED / 1e3
    return {
        "gpu_busy_ms": busy / NUM_PROFILED / 1e3,
        "kernels_ms": dict(kernels.most_common(LARGEST_KERNELS)),
    }


def main() -> None:
    """Measure both kinds of step, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    results = []
    for drafts in (False, True):
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "result.json"
            process = multiprocessing.get_context("spawn").Process(
                target=measure, args=(options.shape, options.sequences, drafts, out)
            )
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(f"the engine {'with' if drafts else 'without'} drafts ended early")
            results.append(json.loads(out.read_text()))
        print(json.dumps(results[-1]), flush=True)
    options.out.write_text(json.dumps({"shape": options.shape, "steps": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
