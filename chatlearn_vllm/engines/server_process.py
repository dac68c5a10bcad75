"""How is a vLLM server started as part of a job, and how does it end with the job?"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatlearn_vllm.engines.server_watch import GRACE_S

WORKER_EXTENSION = "chatlearn_vllm.engines.vllm_server_worker.WeightUpdates"
CONTROL_GUARD = "chatlearn_vllm.engines.server_guard.ControlGuard"
_POLL_S = 0.25
_LAST_LINES = 20
_ERROR = re.compile(r"\b[A-Z]\w*(Error|Exception): .+")
_MOST_ERRORS = 5
"""Those that come first: vLLM's last lines say only that something went wrong."""
_PORT_ATTEMPTS = 3
_OF_A_RANK = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
)  # fmt: skip
"""Variables of a rank's process that mean something else in a server."""


class ServerStartError(RuntimeError):
    """A server did not come up; the message has the end of its log."""


class ServerProcess:
    """A running `vllm serve` on this host that takes weights, and ends with this process."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, api_key: str, log: Path) -> None:
        """See `start_server`."""
        self.url = url
        self.api_key = api_key
        self.log = log
        self._process = process

    @property
    def is_running(self) -> bool:
        """Whether the server has not ended."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the process that watches over the server."""
        return self._process.pid

    def last_lines(self) -> str:
        """The errors that the log names, and its end, without the key."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = dict.fromkeys(found[0] for line in lines if (found := _ERROR.search(line)))
        shown = [*list(errors)[:_MOST_ERRORS], "...", *lines[-_LAST_LINES:]]
        return "\n".join(shown).replace(self.api_key, "***")

    def stop(self) -> None:
        """End the server and all its processes; safe to call again."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(2 * GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve_command(model: str, arguments: Mapping[str, Any], flags: Sequence[str] = ()) -> list[str]:
    """The command line of vLLM's own server.

    Args:
        model: Hugging Face directory.
        arguments: fields of vLLM's engine and front-end arguments, by their Python names.
        flags: further command line arguments, as they are.
    """
    command = [sys.executable, "-m", "chatlearn_vllm.engines.vllm_serve", model]
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Mapping):
            command += [f"--{flag}", json.dumps(value)]
        elif isinstance(value, list | tuple):
            command += [f"--{flag}", *map(str, value)]
        else:
            command += [f"--{flag}", str(value)]
    return [*command, *flags]


def weight_update_arguments() -> dict[str, Any]:
    """Arguments of a server that takes weights; `weight_update_environment` belongs to them."""
    return {"worker_extension_cls": WORKER_EXTENSION, "middleware": CONTROL_GUARD}


def weight_update_environment(api_key: str) -> dict[str, str]:
    """Variables of a server that takes weights: vLLM has the endpoints in its development mode."""
    return {"VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": api_key}


def start_server(
    model: str, arguments: Mapping[str, Any], log: Path, *, timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> ServerProcess:  # fmt: skip
    """Start a server that takes weights and wait until it answers.

    It listens on this host only, on a free port, and asks for a key that is made here.

    Args:
        model: Hugging Face directory.
        arguments: for `serve_command`.
        log: file for the server's output; its directory is made.
        timeout_s: longest wait.
        environment: variables to add, such as CUDA_VISIBLE_DEVICES.

    Raises:
        ServerStartError: it ended or did not answer in time.
    """
    for attempt in range(1, _PORT_ATTEMPTS + 1):
        server = _launch(model, arguments, log, environment or {})
        try:
            _wait_until_healthy(server, timeout_s)
        except ServerStartError as error:
            server.stop()
            # Another process took the port between the search for it and the server's start.
            if attempt == _PORT_ATTEMPTS or "Address already in use" not in str(error):
                raise
        except BaseException:
            server.stop()
            raise
        else:
            return server
    raise AssertionError("unreachable")


def _launch(
    model: str, arguments: Mapping[str, Any], log: Path, environment: Mapping[str, str]
) -> ServerProcess:
    port, api_key = _free_port(), secrets.token_urlsafe(32)
    listening = {"host": "127.0.0.1", "port": port, **weight_update_arguments()}
    command = serve_command(model, {**arguments, **listening})
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "chatlearn_vllm.engines.server_watch", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited, **weight_update_environment(api_key), **environment},
            # Its group is not the rank's: who ends that at once leaves the watch its time.
            start_new_session=True,
        )
    return ServerProcess(process, f"http://127.0.0.1:{port}", api_key, log)


def _wait_until_healthy(server: ServerProcess, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while server.is_running:
        try:
            with opener.open(f"{server.url}/health", timeout=5.0):
                return
        except (urllib.error.URLError, OSError):
            pass
        if time.monotonic() > deadline:
            raise ServerStartError(
                f"the vLLM server does not answer after {timeout_s:g} s (vllm_server_timeout); "
                f"the end of {server.log}:\n{server.last_lines()}"
            )
        time.sleep(_POLL_S)
    raise ServerStartError(
        f"the vLLM server ended while starting; from {server.log}:\n{server.last_lines()}"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
