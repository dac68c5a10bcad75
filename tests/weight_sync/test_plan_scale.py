"""Can one rank among a thousand plan the largest models alone, in ordinary memory?"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/plan_scale.py"


@pytest.fixture(scope="module")
def lines():
    """The lines of the largest size, by side and by the rollout's expert parallelism."""
    command = [sys.executable, str(SCRIPT), "--layers", "61", "--ranks", "1024"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = map(json.loads, done.stdout.splitlines())
    return {(line["side"], line["rollout_expert_parallel"]): line for line in results}


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_a_rank_among_a_thousand_plans_all_its_weights_in_less_than_a_gigabyte(
    lines, expert_parallel
):
    reader, sender = lines["reader", expert_parallel], lines["sender", expert_parallel]
    assert reader["copied_elements"] == reader["rank_elements"] > 20e9
    assert reader["peak_rss_mb"] < 1000
    # 32 replicas read what one training rank and its copies hold.
    assert sender["copied_elements"] > sender["rank_elements"] > 500e6
    assert sender["peak_rss_mb"] < 1000
