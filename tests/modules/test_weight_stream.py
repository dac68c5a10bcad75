"""Do tensors arrive over a stream as they were sent, or not at all?"""

import json
import socket
import struct
import threading
import zlib

import pytest
import torch

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


def frame(header: dict, payload: bytes = b"") -> bytes:
    data = json.dumps(header).encode()
    return struct.pack("!I", len(data)) + data + payload


def received_from(*messages: bytes) -> list[str]:
    """Names of the tensors that come from a sender that says just this."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(64, socket.MSG_WAITALL) == b"t" * 64
                connection.sendall(b"".join(messages))

        thread = threading.Thread(target=speak)
        thread.start()
        try:
            address = list(listener.getsockname())
            return [name for name, _ in receive_tensors(address, "t" * 64, timeout_s=2)]
        finally:
            thread.join()


def tensor_frame(name: str, payload: bytes, checksum_of: bytes | None = None) -> bytes:
    checksum = zlib.crc32(payload if checksum_of is None else checksum_of)
    shape = [len(payload)]
    header = {"name": name, "dtype": "uint8", "shape": shape, "checksum": checksum}
    return frame(header, payload)


def test_an_end_after_fewer_or_more_tensors_than_were_sent_is_noticed() -> None:
    two = tensor_frame("a", b"12"), tensor_frame("b", b"34")
    assert received_from(*two, frame({"name": "the end", "end": 2})) == ["a", "b"]
    for number in (0, 1, 3):
        with pytest.raises(StreamError, match=f"^2 of {number} tensors came$"):
            received_from(*two, frame({"name": "the end", "end": number}))


def test_a_stream_that_ends_anywhere_before_its_end_is_noticed() -> None:
    sent = tensor_frame("a", b"12") + frame({"name": "the end", "end": 1})
    assert received_from(sent) == ["a"]
    for length in range(0, len(sent), 7):
        with pytest.raises(StreamError, match="closed the connection before the end"):
            received_from(sent[:length])


def test_one_changed_bit_is_noticed() -> None:
    frames = tensor_frame("a", b"12"), tensor_frame("b", b"34", checksum_of=b"35")
    with pytest.raises(StreamError, match="^b is not what was sent"):
        received_from(*frames)


def test_what_is_no_header_is_not_waited_for() -> None:
    with pytest.raises(StreamError, match="after the first tensor: no header"):
        received_from(struct.pack("!I", 1 << 30))
