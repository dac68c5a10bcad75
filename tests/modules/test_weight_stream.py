"""Do tensors arrive over a stream as they were sent, or not at all?"""

import socket
import threading

import pytest
import torch

from chatlearn_vllm.engines import weight_stream
from chatlearn_vllm.engines.weight_stream import StreamError, StreamSender, receive_tensors

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
    "b": torch.tensor(7, dtype=torch.int64),
    "c": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "d": torch.empty(0, 4, dtype=torch.float16),
}


def transfer(tensors, token=None):
    """Send over one connection; what came, and what the sender returned or raised."""
    outcome = []
    with StreamSender("127.0.0.1", 1) as sender:

        def send() -> None:
            try:
                outcome.append(sender.send(tensors, check=lambda: None, timeout_s=2))
            except Exception as error:  # looked at by the test
                outcome.append(error)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            came = dict(receive_tensors(sender.address, token or sender.token, timeout_s=2))
        finally:
            thread.join()
        return came, outcome[0]


def test_tensors_of_all_shapes_and_types_arrive() -> None:
    came, num_bytes = transfer(TENSORS.items())
    assert list(came) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert came[name].dtype == tensor.dtype
        assert torch.equal(came[name], tensor)
    assert num_bytes == 6 * 4 + 8 + 15 * 2


def test_a_stranger_gets_nothing() -> None:
    with pytest.raises(StreamError):
        transfer(TENSORS.items(), token="0" * 64)


def test_a_sender_that_fails_is_noticed() -> None:
    def tensors():
        yield "a", TENSORS["a"]
        raise KeyError("gone")

    with pytest.raises(StreamError, match="closed the connection before the end"):
        transfer(tensors())


def test_changed_bytes_are_noticed(monkeypatch) -> None:
    checksums = iter([1, 2])
    monkeypatch.setattr(weight_stream.zlib, "crc32", lambda data: next(checksums))
    with pytest.raises(StreamError, match="a is not what was sent"):
        transfer([("a", TENSORS["a"])])


def test_a_receiver_that_goes_away_is_noticed() -> None:
    with StreamSender("127.0.0.1", 1) as sender:
        connection = socket.create_connection(sender.address)
        connection.sendall(sender.token.encode())
        connection.close()
        many = ((str(number), torch.zeros(1 << 20)) for number in range(64))
        with pytest.raises(StreamError, match="the server broke off at"):
            sender.send(many, check=lambda: None, timeout_s=5)


def test_a_receiver_that_does_not_come_is_waited_for_so_long() -> None:
    with StreamSender("127.0.0.1", 1) as sender:
        with pytest.raises(StreamError, match="did not connect to 127.0.0.1:.* within 0.5 s"):
            sender.send([], check=lambda: None, timeout_s=0.5)
