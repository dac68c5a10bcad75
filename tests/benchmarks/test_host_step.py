"""Does the benchmark of a step's host part run, and do its parts make up a step?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.host_step import summary

ROOT = Path(__file__).parents[2]


def test_the_parts_of_a_step_are_timed_on_a_real_engine(tmp_path) -> None:
    out = tmp_path / "host.json"
    options = ["--prompts=4", "--completions=4", "--max-tokens=32", "--repeat=1", f"--out={out}"]
    environment = os.environ | {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "benchmarks/host_step.py"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (rank,) = json.loads(out.read_text())["ranks"]
    assert 16 <= rank["num_steps"] <= 32
    ms = rank["ms"]
    parts = ms["schedule"] + ms["update"] + ms["outputs"] + ms["launch"]
    assert 0.5 * ms["step"] < parts < 1.1 * ms["step"]
    assert rank["loop"]["times_shortest"]["p10"] >= 1
    assert 0 < rank["fast_core"]["share_of_steps"] <= 1


def test_steps_are_told_apart_by_the_speed_of_their_core() -> None:
    fast = {"step": 0.020, "loop": 1e-4, "wait": 0.005, "schedule": 0.007}
    slow = {"step": 0.030, "loop": 2e-4, "schedule": 0.014}
    found = summary([fast, fast, fast, slow], shortest_loop=1e-4)
    assert found["fast_core"]["share_of_steps"] == 0.75
    assert found["fast_core"]["ms"]["host"] == pytest.approx(15)
    assert found["slow_core"]["ms"]["host"] == pytest.approx(30)
    assert found["ms"]["schedule"] == pytest.approx(7)
    all_fast = summary([fast], shortest_loop=1e-4)
    assert all_fast["slow_core"] == {"share_of_steps": 0.0}
