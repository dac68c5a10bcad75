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

GRACE_S = 10.0
"""From SIGTERM to SIGKILL."""
_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Run the command; its exit code, or 1 where it was ended from here."""
    asked_to_end: list[int] = []
    # Noted only: an exception might come while the child is being started, and leave it behind.
    signal.signal(signal.SIGTERM, lambda number, _: asked_to_end.append(number))
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent
    )
    try:
        while child.poll() is None and not asked_to_end:
            readable, _, _ = select.select([sys.stdin], [], [], _POLL_S)
            if readable and not os.read(sys.stdin.fileno(), 1):
                break
        return 1 if child.returncode is None else child.returncode
    finally:
        _end_session(child)


def _die_with_parent() -> None:
    """In the child: SIGTERM when this process is killed, which can then end nothing itself."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_session(child: subprocess.Popen[bytes]) -> None:
    """End the child and what it has started."""
    _signal(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_S / 4)
    _signal(child.pid, signal.SIGKILL)
    child.wait()


def _signal(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
