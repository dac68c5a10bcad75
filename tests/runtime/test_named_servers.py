"""Is a job told at once that a server of its yaml is not there, or is something else?"""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from chatlearn_vllm import BaseModule
from chatlearn_vllm.config import UserError
from chatlearn_vllm.runtime.named_servers import check_named_servers
from tests.helpers.documented_policy import VLLMPolicyInference
from tests.helpers.engines import policy_job


class Page(BaseHTTPRequestHandler):
    """A web server that is no vLLM server: a page at /health, nothing elsewhere."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
        self.wfile.write(b"<html><body>a page</body></html>")

    def log_message(self, *args) -> None:
        """Be quiet."""


@pytest.fixture
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")


def module(tmp_path, *urls: str, **more):
    keys = {"inference_engine": "server", "vllm_server": list(urls)} if urls else {}
    more = {"vllm_server_max_retries": 0} | more if urls else more
    job = policy_job(tmp_path, tmp_path, num_gpu=max(1, len(urls)), **keys, **more)
    return VLLMPolicyInference("policy", job)


def test_a_server_that_is_not_there_is_told_with_its_address(tmp_path, address) -> None:
    nobody = "http://127.0.0.1:9"
    with pytest.raises(UserError, match=f"models.policy: vllm_server: {nobody}: no vLLM server"):
        check_named_servers([module(tmp_path, nobody)])


def test_something_else_that_listens_there_is_no_server(tmp_path, address) -> None:
    with pytest.raises(UserError, match=f"{address} is no vLLM server: it has no /version"):
        check_named_servers([module(tmp_path, address)])


def test_servers_that_the_job_starts_and_engines_in_its_ranks_are_not_asked_for(tmp_path) -> None:
    check_named_servers([module(tmp_path), module(tmp_path, "start")])


def test_who_calls_no_server_needs_none(tmp_path, monkeypatch) -> None:
    generates = module(tmp_path, "http://127.0.0.1:9")
    check_named_servers([BaseModule("policy", generates.job)])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # ranks may be where a server answers
    check_named_servers([generates])
