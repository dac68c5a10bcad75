"""Does a benchmark measure engines on a GPU, with the memory that they take there?"""

import json

import pytest

from chatlearn_vllm.cli.main import main

pytestmark = pytest.mark.gpu

CASES = ["transformers-sdpa", "vllm", "vllm:logprobs:seeds", "vllm-module"]


def test_every_engine_is_measured_on_the_gpu(tmp_path):
    options = [
        "--shape", "tiny", "--prompts", "8", "--completions", "4", "--max-tokens", "32",
        "--ignore-eos", "--repeat", "2", "--latency-requests", "2", "--enforce-eager",
        "--gpu-memory-utilization", "0.2",
    ]  # fmt: skip
    assert main(["bench", *CASES, *options, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    gpu = results["machine"]["gpus"][0]
    for case in results["cases"]:
        assert all(
            one["output_tokens"] == one["completions"] * 32 for one in case["throughput"]["passes"]
        )
        (device_bytes,) = case["memory"]["device_bytes"]
        assert device_bytes > 2**28  # a CUDA context alone is more
        if case["engine"] != "transformers-sdpa":
            assert device_bytes < 0.25 * gpu["total_bytes"]
            assert device_bytes > 0.15 * gpu["total_bytes"]
