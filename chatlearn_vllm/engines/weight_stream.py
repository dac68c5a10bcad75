"""How do whole tensors travel from a rank of a job to the workers of a vLLM server?

Over one TCP connection that the server opens and the rank accepts, tensor after tensor: the length
of a JSON header, the header (name, dtype, shape, checksum), the bytes. So nothing is written to
files, a slow reader slows the sender down, and the end of either process ends the other's transfer.
The server proves by a token, told to it over its API, that the connection is the one meant.
"""

from __future__ import annotations

import json
import secrets
import socket
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

_LENGTH = struct.Struct("!I")
_MAX_HEADER_BYTES = 1 << 20
_POLL_S = 0.2
_TOKEN_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 60.0


class StreamError(RuntimeError):
    """A transfer failed; the message says at which tensor."""


class StreamSender:
    """The rank's end of one transfer.

    Example:
        with StreamSender("server-host", 8000) as sender:
            # tell the server sender.address and sender.token, then
            num_bytes = sender.send(tensors, check=raise_if_the_server_failed)
    """

    def __init__(self, host: str, port: int) -> None:
        """Listen where the server can reach this host.

        Args:
            host: of the server; the connection comes back on the route that leads there.
            port: any of its ports.
        """
        self.token = secrets.token_hex(32)
        """What the server has to say first."""
        own = _own_address_towards(host, port)
        family = socket.AF_INET6 if ":" in own else socket.AF_INET
        self._listener = socket.create_server((own, 0), family=family)
        self._listener.settimeout(_POLL_S)

    @property
    def address(self) -> list[Any]:
        """Host and port that the server connects to."""
        return list(self._listener.getsockname()[:2])

    def __enter__(self) -> StreamSender:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def send(
        self,
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        check: Callable[[], None],
        timeout_s: float,
    ) -> int:
        """Wait for the server and send all tensors.

        Args:
            tensors: by name; on any device.
            check: called while waiting; raises if the server will not come.
            timeout_s: longest wait for the connection, and for the server to take some bytes.

        Returns:
            Bytes of the tensors sent.

        Raises:
            StreamError: the server did not connect, or went away.
        """
        num_bytes = num_tensors = 0
        with self._accept(check, timeout_s) as connection:
            for name, tensor in tensors:
                payload = _bytes_of(tensor)
                header = {
                    "name": name,
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                    "checksum": zlib.crc32(payload),
                }
                _send(connection, header, payload)
                num_bytes, num_tensors = num_bytes + len(payload), num_tensors + 1
            _send(connection, {"name": "the end", "end": num_tensors})
        return num_bytes

    def _accept(self, check: Callable[[], None], timeout_s: float) -> socket.socket:
        """The connection that says the token; others are closed."""
        for _ in range(max(1, int(timeout_s / _POLL_S))):
            check()
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(_TOKEN_TIMEOUT_S)
            try:
                said = _receive(connection, len(self.token))
            except (OSError, StreamError):
                said = b""
            if secrets.compare_digest(bytes(said), self.token.encode()):
                connection.settimeout(timeout_s)
                return connection
            connection.close()
        host, port = self.address
        raise StreamError(
            f"the server did not connect to {host}:{port} within {timeout_s:g} s; a firewall, or a "
            "container without the job's network, may be in between"
        )


def receive_tensors(
    address: list[Any], token: str, *, timeout_s: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """The server's end: connect and yield the tensors as they come, in main memory.

    Args:
        address: host and port of the sender.
        token: its token.
        timeout_s: longest wait for bytes.

    Raises:
        StreamError: the sender went away before the end, or bytes are not those that were sent.
    """
    name, count = "the first tensor", 0
    try:
        with socket.create_connection(tuple(address), timeout=_CONNECT_TIMEOUT_S) as connection:
            connection.settimeout(timeout_s)
            connection.sendall(token.encode())
            while True:
                (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
                if length > _MAX_HEADER_BYTES:
                    raise StreamError(f"after {name}: no header")
                header = json.loads(bytes(_receive(connection, length)))
                if "end" in header:
                    break
                name = header["name"]
                tensor = torch.empty(header["shape"], dtype=getattr(torch, header["dtype"]))
                payload = _bytes_of(tensor)
                _receive_into(connection, payload)
                if zlib.crc32(payload) != header["checksum"]:
                    raise StreamError(f"{name} is not what was sent: its checksum differs")
                count += 1
                yield name, tensor
    except OSError as error:
        raise StreamError(f"the connection failed at {name}: {error}") from error
    if count != header["end"]:
        raise StreamError(f"{count} of {header['end']} tensors came")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's memory; of one on a GPU, or with gaps, a copy's."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _send(
    connection: socket.socket, header: dict[str, Any], payload: bytes | memoryview = b""
) -> None:
    data = json.dumps(header).encode()
    try:
        connection.sendall(_LENGTH.pack(len(data)) + data)
        connection.sendall(payload)
    except OSError as error:
        raise StreamError(f"the server broke off at {header['name']}: {error}") from error


def _receive(connection: socket.socket, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    _receive_into(connection, memoryview(data))
    return data


def _receive_into(connection: socket.socket, target: memoryview) -> None:
    while len(target):
        count = connection.recv_into(target)
        if not count:
            raise StreamError("the other end closed the connection before the end")
        target = target[count:]


def _own_address_towards(host: str, port: int) -> str:
    """This host's address on the route to another; sends nothing."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]
