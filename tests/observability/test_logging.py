"""Who wrote a log line, and which lines are left out?"""

import subprocess
import sys

import pytest

from chatlearn_vllm.observability.timers import PhaseTimers

RANK_PROCESS = """
import logging, sys, warnings
from chatlearn_vllm.observability.logging import configure_rank_logging, get_logger
configure_rank_logging("policy", replica=1, rank=int(sys.argv[1]))
get_logger("chatlearn_vllm.example").info("built")
get_logger("users.module").warning("odd prompt")
logging.getLogger("vllm.engine").info("not shown")
logging.getLogger("megatron.core").warning("not shown")
warnings.warn("Transformer Engine is not installed. not shown")
"""


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, ["[policy 1 0] INFO built", "[policy 1 0] WARNING odd prompt"]),
        (1, ["[policy 1 1] WARNING odd prompt"]),
    ],
)
def test_lines_carry_the_rank_and_only_rank_0_shows_infos(rank, expected):
    run = subprocess.run(
        [sys.executable, "-c", RANK_PROCESS, str(rank)], capture_output=True, text=True, check=True
    )

    assert run.stderr.splitlines() == expected


def test_a_phase_that_runs_twice_adds_up_and_take_starts_again():
    timers = PhaseTimers()
    with timers.phase("sync"):
        first = timers.seconds("sync")
    after_one = timers.seconds("sync")
    with timers.phase("sync"):
        pass

    assert first == 0.0
    assert timers.seconds("sync") > after_one > 0.0
    assert list(timers.take()) == ["sync"]
    assert timers.take() == {}
