"""When something goes wrong, who says what, how soon, and what is left behind?"""

import os
import signal
import subprocess
import sys
import time

import pytest

from chatlearn_vllm.runtime.errors import RankDiedError, RankError, RankId
from tests.helpers.toy_modules import (
    BrokenReward,
    DyingTrainer,
    RaisingTrainer,
    TooLargeTrainer,
    write_job,
)
from tests.runtime.conftest import left_after, processes_with, rank_processes
from tests.runtime.test_learn import make_engine

SECONDS = 90
"""Bound for a job that fails, on a busy machine; a hang in a collective would last ten minutes."""

SCRIPT = """
import signal
# Where the tests run in the background of a shell, SIGINT is ignored from the start.
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.helpers.toy_modules import SlowReward
from tests.runtime.test_learn import make_engine
import sys
few = ("models.policy.num_gpu=1", "models.policy_trainer.num_gpu=1")
make_engine(sys.argv[1], *few, reward=SlowReward).learn()
"""


def test_an_exception_on_one_rank_ends_the_job_while_its_peer_waits(existing_cluster, tmp_path):
    engine = make_engine(write_job(tmp_path), trainer=RaisingTrainer)
    start = time.monotonic()

    with pytest.raises(RankError) as caught:
        engine.learn()

    assert time.monotonic() - start < SECONDS
    assert caught.value.rank == RankId("policy_trainer", replica=0, rank=1, world_size=2)
    message = str(caught.value)
    assert message.startswith("[policy_trainer, replica 0, rank 1] train() raised:")
    assert 'raise ValueError("a bad batch")' in message
    assert "toy_modules.py" in message
    assert left_after(30, rank_processes, existing_cluster) == {}


def test_a_rank_without_memory_says_which_keys_help(existing_cluster, tmp_path):
    engine = make_engine(
        write_job(tmp_path), "models.policy.free_memory=False", trainer=TooLargeTrainer
    )

    with pytest.raises(RankError) as caught:
        engine.learn()

    message = str(caught.value)
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 1022.00 MiB." in message
    _, _, advice = message.partition("out of device memory. What helps, most first:\n")
    assert advice.splitlines() == [
        "  models.policy_trainer.model_args.seq_length: 8 -> 4",
        "  models.policy.free_memory: True  (it is on the same device, and stays there while "
        "others work)",
    ]


def test_the_death_of_a_process_is_reported_and_not_its_peers_broken_connection(
    existing_cluster, tmp_path
):
    engine = make_engine(write_job(tmp_path), trainer=DyingTrainer)
    start = time.monotonic()

    with pytest.raises(RankDiedError) as caught:
        engine.learn()

    assert time.monotonic() - start < SECONDS
    message = str(caught.value)
    assert message.startswith("[policy_trainer, replica 0, rank 1] process ")
    assert "died during train()" in message
    assert "Worker exit type: SYSTEM_ERROR" in message
    assert left_after(30, rank_processes, existing_cluster) == {}


def test_a_failure_during_set_up_names_the_rank(existing_cluster, tmp_path):
    engine = make_engine(write_job(tmp_path), reward=BrokenReward)

    with pytest.raises(RankError, match="(?s)reward, replica 0, rank 0.*model_setup.*rules.txt"):
        engine.learn()

    assert left_after(30, rank_processes, existing_cluster) == {}


def test_a_cluster_that_is_too_small_is_an_error_and_no_hang(existing_cluster, tmp_path):
    engine = make_engine(write_job(tmp_path), "models.reward.num_cpu=100")
    start = time.monotonic()

    with pytest.raises(RuntimeError, match="102 CPUs needed, the cluster has 8"):
        engine.learn()

    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_leaves_no_process_and_no_ray_behind(tmp_path, number):
    mark = f"TOY_JOB={tmp_path}"
    environment = {**os.environ, "TOY_JOB": str(tmp_path), "PYTHONPATH": os.getcwd()}
    environment.pop("RAY_ADDRESS", None)
    job = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(write_job(tmp_path))],
        env=environment,
        start_new_session=True,
    )
    calls = tmp_path / "toy" / "calls.txt"
    deadline = time.monotonic() + 120
    while not (calls.exists() and "child" in calls.read_text()):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    assert len(processes_with(mark)) > 5

    # As a terminal does it: the whole foreground process group gets the signal.
    os.killpg(job.pid, number)
    job.wait(timeout=SECONDS)

    assert job.returncode != 0
    assert left_after(30, processes_with, mark) == {}
