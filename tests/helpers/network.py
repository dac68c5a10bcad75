"""Two hosts on one machine: network namespaces that reach each other over a virtual cable only."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any


class NoNamespacesError(RuntimeError):
    """This machine does not let us make network namespaces; says why."""


@dataclass(frozen=True)
class Host:
    """A network namespace with one address, that the other host can reach, and a loopback."""

    name: str
    address: str

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a program in the namespace; `options` are those of `subprocess.Popen`."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], text=True, **options)

    def received_bytes(self) -> int:
        """What has come over the cable so far."""
        counters = json.loads(_ip("-n", self.name, "-s", "-j", "link", "show", "cable"))
        return counters[0]["stats64"]["rx"]["bytes"]

    def process_ids(self) -> list[int]:
        """All processes in the namespace."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def end_processes(self) -> None:
        """Kill what still runs in the namespace, daemons too, and wait until it is gone."""
        while pids := self.process_ids():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make two hosts; at the end kill their processes and remove them.

    Raises:
        NoNamespacesError: namespaces are not permitted here.
    """
    hosts = tuple(Host(f"test{os.getpid()}-{i}", f"10.77.0.{i + 1}") for i in range(2))
    with ExitStack() as stack:
        for host in hosts:
            _ip("netns", "add", host.name)
            stack.callback(_ip, "netns", "delete", host.name)
            stack.callback(host.end_processes)
        ends = [("name", "cable", "netns", host.name) for host in hosts]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", host.name, "link", "set", device, "up")
        yield hosts


def _ip(*arguments: str) -> str:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise NoNamespacesError("network namespaces need the program `ip` (iproute2)") from None
    except subprocess.CalledProcessError as error:
        raise NoNamespacesError(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from None
    return done.stdout
