"""Does a process that is watched over end with the one that started it, however that ends?"""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

STARTER = """
import subprocess, sys
watch = subprocess.Popen(
    [sys.executable, "-m", "chatlearn_vllm.engines.server_watch", "bash", "-c",
     "sleep 600 & echo $$ $!; wait"],
    stdin=subprocess.PIPE, start_new_session=True)
print(watch.pid, flush=True)
watch.wait()
"""


@pytest.fixture
def started():
    """The starter, the watch, the command and a process that the command has started."""
    starter = subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True)
    numbers = [int(number) for _ in range(2) for number in starter.stdout.readline().split()]
    assert len(numbers) == 3
    yield starter, *map(psutil.Process, numbers)
    starter.kill()
    starter.wait()
    for number in numbers:
        if psutil.pid_exists(number):
            os.kill(number, signal.SIGKILL)


def wait_for_the_end(processes) -> None:
    deadline = time.monotonic() + 8
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_all_ends_when_the_starter_is_ended(started, number) -> None:
    starter, *processes = started
    starter.send_signal(number)
    wait_for_the_end(processes)


def test_all_ends_when_the_watch_is_asked_to(started) -> None:
    _, *processes = started
    # of the three numbers, the watch's is that whose command line names it
    watch = next(p for p in processes if "chatlearn_vllm.engines.server_watch" in p.cmdline())
    watch.terminate()
    wait_for_the_end(processes)
