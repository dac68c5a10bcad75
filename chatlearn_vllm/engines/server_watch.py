"""Who ends a vLLM server when the process that started it is gone, whatever ended that one?

    python -m chatlearn_vllm.engines.server_watch COMMAND...    with a pipe as standard input

runs the command in a session of its own until it ends or the pipe is closed, which the kernel does
for a killed process, too. Then all processes of the session end.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

GRACE_S = 10.0
"""From SIGTERM to SIGKILL."""
HELPERS_S = 3.0
"""From the end of the command to SIGKILL for what it has started."""
_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Run the command while the pipe is open; its exit code."""
    return run(command, lambda: _is_closed(sys.stdin.fileno()))


def run(
    command: list[str],
    should_end: Callable[[], bool],
    *,
    environment: Mapping[str, str] | None = None,
    signals: tuple[signal.Signals, ...] = (signal.SIGTERM,),
) -> int:
    """Run a command in a session of its own, and leave nothing of the session behind.

    Args:
        command: program and arguments.
        should_end: asked several times a second.
        environment: of the command; None for this process's.
        signals: which, when this process gets them, end the command.

    Returns:
        The command's exit code, as a shell would say it; 0 where it was ended from here.
    """
    asked: list[int] = []
    for number in signals:
        # Noted only: an exception might come while the child is being started, and leave it behind.
        signal.signal(number, lambda number, _: asked.append(number))
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_die_with_parent,
        env=environment,
    )
    try:
        while child.poll() is None and not asked and not should_end():
            time.sleep(_POLL_S)
        code = child.returncode
    finally:
        _end_session(child)
    if code is None:
        return 0
    return 128 - code if code < 0 else code


def _is_closed(pipe: int) -> bool:
    readable, _, _ = select.select([pipe], [], [], 0)
    return bool(readable) and not os.read(pipe, 1)


def _die_with_parent() -> None:
    """In the child: SIGTERM when this process is killed, which can then end nothing itself."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_session(child: subprocess.Popen[bytes]) -> None:
    """End the child and what it has started."""
    _signal(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_S / 4)
    # python's own helper process then removes what the others left in shared memory.
    deadline = time.monotonic() + HELPERS_S
    while _signal(child.pid, 0) and time.monotonic() < deadline:
        time.sleep(_POLL_S / 4)
    _signal(child.pid, signal.SIGKILL)
    child.wait()


def _signal(group: int, number: int) -> bool:
    """Send a signal to a process group; whether there is still a process in it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
