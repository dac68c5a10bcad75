"""A Ray cluster that is there before the jobs of these tests, as on a shared machine."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest


@pytest.fixture(scope="package")
def ray_address():
    """Start Ray on this host, apart from every other Ray there, and return its address."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    directory = tempfile.mkdtemp(prefix="ray")  # short: socket paths have a limit
    ray = Path(sys.executable).parent / "ray"
    process = subprocess.Popen(
        [ray, "start", "--head", "--block", "--num-cpus=8", "--include-dashboard=false"]
        + [f"--port={port}", f"--temp-dir={directory}", "--disable-usage-stats"],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "TEST_RAY_PORT": str(port)},
    )
    address_file = Path(directory) / "ray_current_cluster"
    deadline = time.monotonic() + 120
    try:
        while not address_file.exists():
            assert process.poll() is None and time.monotonic() < deadline, "Ray did not start"
            time.sleep(0.2)
        yield address_file.read_text()
    finally:
        process.terminate()
        process.wait()
        for leftover in processes_with(f"TEST_RAY_PORT={port}"):
            os.kill(leftover, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def existing_cluster(ray_address, monkeypatch):
    """Let the jobs of a test join that cluster."""
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    return ray_address


@pytest.fixture(scope="module")
def shared_cluster(ray_address):
    """The same for jobs that run once for several tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray_address)
        yield ray_address


def rank_processes(address):
    """The running ranks of any job in the cluster of `existing_cluster`, with their children."""
    port = address.split(":")[1]
    return processes_with(f"TEST_RAY_PORT={port}", "CHATLEARN_VLLM_JOB_ID=")


def left_after(seconds, find, *arguments):
    """What `find` still finds when all is gone or `seconds` are over.

    A killed process stays visible until the busy machine has cleaned up after it.
    """
    deadline = time.monotonic() + seconds
    while (found := find(*arguments)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def processes_with(*texts):
    """Ids and commands of the running processes whose environment contains all of `texts`."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes()
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # ended in the meantime
        if all(text.encode() in environment for text in texts):
            found[int(directory.name)] = command
    return found
