"""Which calls to a server are tried again? A real HTTP server answers as the tests say."""

import asyncio
import socket
import threading
import time

import pytest
from aiohttp import web

from chatlearn_vllm.engines import server_client
from chatlearn_vllm.engines.server_client import NotFoundError, ServerClient, ServerError


class ScriptedServer:
    """Answers each call with the next of its statuses; waits, where it is a float, that long."""

    def __init__(self) -> None:
        self.script: list[int | float] = []
        self.calls: list[str] = []
        self.num_open = self.most_open = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        assert self._started.wait(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True)
        self._loop.run_until_complete(self._runner.setup())
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = "http://127.0.0.1:{1}".format(*self._runner.addresses[0])
        self._started.set()
        self._loop.run_forever()

    async def _answer(self, request: web.Request) -> web.Response:
        self.calls.append(request.path)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            status = self.script.pop(0) if self.script else 200
            if isinstance(status, float):
                await asyncio.sleep(status)
                status = 200
            if status == 0:  # breaks off
                request.transport.close()
            headers = {"Retry-After": "1"} if status == 429 else {}
            return web.json_response({"status": status}, status=status or 200, headers=headers)
        finally:
            self.num_open -= 1

    def close(self) -> None:
        """End the server."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)


@pytest.fixture(scope="module")
def shared_server():
    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture
def server(shared_server):
    shared_server.script, shared_server.calls, shared_server.most_open = [], [], 0
    return shared_server


@pytest.fixture
def client(server):
    client = ServerClient(server.url, api_key="k", timeout_s=0.5, max_retries=2, max_responses=6)
    yield client
    client.close()


@pytest.mark.parametrize("failure", [500, 503, 429, 0])
def test_a_completion_is_sent_again_after_a_failure_that_can_pass(server, client, failure) -> None:
    server.script = [failure]
    start = time.monotonic()
    assert client.start_completion({}).result() == {"status": 200}
    assert server.calls == ["/v1/completions"] * 2
    assert time.monotonic() - start >= (1.0 if failure == 429 else 0.1)  # as Retry-After says


def test_tries_end(server, client) -> None:
    server.script = [500] * 9
    with pytest.raises(ServerError, match="/v1/completions: status 500"):
        client.start_completion({}).result()
    assert len(server.calls) == 3


@pytest.mark.parametrize(
    "status, error", [(400, ValueError), (401, ServerError), (404, NotFoundError)]
)
def test_what_would_fail_again_is_not_sent_again(server, client, status, error) -> None:
    server.script = [status]
    with pytest.raises(error):
        client.start_completion({}).result()
    assert len(server.calls) == 1


@pytest.mark.parametrize("failure", [500, 0])
def test_a_call_that_may_have_been_carried_out_is_not_repeated(server, client, failure) -> None:
    server.script = [failure]
    with pytest.raises(ServerError):
        client.post("/collective_rpc", {})
    assert len(server.calls) == 1


def test_what_a_server_looks_up_is_not_waited_for_as_long(server, client, monkeypatch) -> None:
    monkeypatch.setattr(server_client, "_GET_TIMEOUT_S", 0.1)
    server.script = [5.0]
    with pytest.raises(ServerError, match="/health: no answer within 0.1 s; something listens"):
        client.get("/health")


def test_a_late_answer_is_not_asked_for_again(server, client) -> None:
    server.script = [5.0]
    with pytest.raises(ServerError, match="no answer within 0.5 s; raise vllm_server_timeout"):
        client.start_completion({}).result()
    assert len(server.calls) == 1


def test_an_address_that_does_not_react_is_given_up_early(monkeypatch) -> None:
    monkeypatch.setattr(server_client, "_CONNECT_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent:
        waiting = [socket.socket() for _ in range(3)]  # they fill its queue
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(silent.getsockname())
        port = silent.getsockname()[1]
        client = ServerClient(f"http://127.0.0.1:{port}", api_key=None, timeout_s=60, max_retries=0)
        with pytest.raises(ServerError, match="no vLLM server answers there .nothing in 0.3 s"):
            client.get("/health")
        client.close()
        for one in waiting:
            one.close()


def test_only_so_many_responses_are_under_way_at_once(server, client) -> None:
    server.script = [0.05] * 10
    futures = [client.start_completion({"n": 2}) for _ in range(9)]
    futures.append(client.start_completion({"n": 100}))  # more than there are places: all of them
    assert [future.result() for future in futures] == [{"status": 200}] * 10
    assert server.most_open == 3


def test_a_closed_client_waits_for_nothing(server, client) -> None:
    server.script = [30.0]
    future = client.start_completion({})
    start = time.monotonic()
    client.close()
    assert time.monotonic() - start < 5
    assert future.cancelled()
