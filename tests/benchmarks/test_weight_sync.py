"""Does the weight sync benchmark run, and do sync and vLLM's loader leave the same bits?

Real jobs on CPU with tiny models; `run_case` itself raises where a parameter differs.
"""

import math
from pathlib import Path

import pytest

from benchmarks.weight_sync import run_case, table
from benchmarks.weight_sync_cases import CASES, SIZES
from chatlearn_vllm.layouts import ModelShape

IN_EVERY_RUN = "moe-2gpu"


def check(name: str) -> None:
    """Run a case; it must account for every weight of every replica, and for its time."""
    case = CASES[name]
    result = run_case(name, "tiny", repeat=2)
    config = {"model_type": case.model_type, **SIZES["tiny"][case.model_type]}
    model = ModelShape.from_hf_config(config)
    num_weights = sum(math.prod(model.tensor_shape(tensor)) for tensor in model.tensor_names())
    read = sum(sum(own.values()) for own in result["bytes_by_rank"])
    assert read >= 4 * num_weights * case.rollout_gpus // case.rollout_tp
    assert min(result["compared_parameters"]) > 4 * model.num_layers
    assert 0 < result["sync"]["slowest_rank_s"]["copy"] < result["sync"]["median_s"]
    offloaded = result["offloaded"]
    assert 0 < offloaded["plain_copy_s"] < offloaded["sync"]["median_s"]
    assert {len(offloaded[what]["all_s"]) for what in ("offload", "onload", "sync")} == {2}
    assert result["per_tensor"]["calls"] > result["gathered_buckets"]["calls"] > 0
    assert f"| {name} | {case.describe()} |" in table([result])


def test_a_model_with_experts_is_synced_as_the_loader_would() -> None:
    before = set(Path("/dev/shm").glob("psm_*"))
    check(IN_EVERY_RUN)
    assert set(Path("/dev/shm").glob("psm_*")) <= before  # vLLM's queues between ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != IN_EVERY_RUN])
def test_every_case_is_synced_as_the_loader_would(name) -> None:
    check(name)
