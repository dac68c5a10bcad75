"""How does a rank talk to a vLLM server over HTTP: which calls are tried again, which end how?

Calls run on an event loop in a thread of its own, so requests are answered while the rank does
something else. A request that is dropped closes its connection, at which vLLM aborts it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import random
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import aiohttp

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 30.0
_KEEP_ALIVE_S = 2.0
"""Less than vLLM's own 5 s: no call meets a connection that the server is closing."""
_CONNECT_TIMEOUT_S = 20.0
_GET_TIMEOUT_S = 60.0
"""Longest wait for what a server only has to look up."""
_SHOWN_CHARACTERS = 500

T = TypeVar("T")


class ServerError(RuntimeError):
    """A server cannot be reached, refuses this job, or failed; the message says the remedy."""


class NotFoundError(ServerError):
    """The server has no such endpoint, or no such model."""


class ServerClient:
    """Calls to one server.

    Example:
        client = ServerClient("http://localhost:8000", api_key=None, timeout_s=600, max_retries=5)
        client.get("/version")
        future = client.start_completion({"prompt": [1, 2], "max_tokens": 8})
        future.result()
        client.close()
    """

    def __init__(
        self, url: str, *, api_key: str | None, timeout_s: float, max_retries: int,
        max_responses: int = 1,
    ) -> None:  # fmt: skip
        """Start the event loop; nothing is sent yet.

        Args:
            url: `http://host:port`, without a path.
            api_key: sent as a bearer token; never shown.
            timeout_s: longest wait for the answer to one try; of a GET at most 60 s.
            max_retries: further tries after one that failed in a way that can pass.
            max_responses: that are asked for at the same time; further requests wait here.
        """
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._session = self._wait(self._open())
        self._max_responses = max_responses
        self._places = asyncio.Semaphore(max_responses)
        self._turn = asyncio.Lock()
        """Of the request that takes places next."""

    def get(self, path: str) -> Any:
        """GET; the answer's JSON, None for one without."""
        return self._wait(self._call("GET", path, None, is_repeatable=True))

    def get_text(self, path: str) -> str:
        """GET; the answer as text."""
        return self._wait(self._call("GET", path, None, is_repeatable=True, is_text=True))

    def post(self, path: str, body: Any = None, *, is_repeatable: bool = False) -> Any:
        """POST; the answer's JSON, None for one without.

        Args:
            path: with query parameters.
            body: sent as JSON.
            is_repeatable: whether it may be done twice; else it is tried again only where it
                cannot have been done.
        """
        return self._wait(self._call("POST", path, body, is_repeatable=is_repeatable))

    def start_post(self, path: str, body: Any = None) -> concurrent.futures.Future[Any]:
        """Like `post`, without waiting."""
        return self._start(self._call("POST", path, body, is_repeatable=False))

    def start_completion(self, body: dict[str, Any]) -> concurrent.futures.Future[Any]:
        """Send a request to `/v1/completions` when there is a place for it.

        It may be sent twice: with a seed of its own the answers are drawn alike.
        """
        return self._start(self._complete(body))

    def close(self) -> None:
        """Drop what is under way and end the loop; safe to call again."""
        if self._loop.is_closed():
            return
        self._wait(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self._start(work).result()

    async def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        return aiohttp.ClientSession(connector=connector, headers=self._headers)

    async def _shut(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    async def _complete(self, body: dict[str, Any]) -> Any:
        wanted, taken = min(body.get("n", 1), self._max_responses), 0
        try:
            async with self._turn:
                while taken < wanted:
                    await self._places.acquire()
                    taken += 1
            return await self._call("POST", "/v1/completions", body, is_repeatable=True)
        finally:
            for _ in range(taken):
                self._places.release()

    async def _call(
        self, method: str, path: str, body: Any, *, is_repeatable: bool, is_text: bool = False
    ) -> Any:
        """One call with its retries."""
        pause_s = _FIRST_PAUSE_S
        for left in range(self._max_retries, -1, -1):
            try:
                return await self._try(method, path, body, is_repeatable, is_text)
            except _PassingError as passing:
                if not left:
                    raise passing.error from passing.__cause__
                wait_s = passing.after_s or pause_s * random.uniform(0.5, 1.0)
            await asyncio.sleep(min(wait_s, _LONGEST_PAUSE_S))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        raise AssertionError("unreachable")

    async def _try(
        self, method: str, path: str, body: Any, is_repeatable: bool, is_text: bool
    ) -> Any:
        """One try.

        Raises:
            _PassingError: it failed, and may be tried again.
            ServerError: it failed for good.
        """
        place = f"{self.url}{path.partition('?')[0]}"
        is_get = method == "GET"
        longest_s = min(self._timeout_s, _GET_TIMEOUT_S) if is_get else self._timeout_s
        timeout = aiohttp.ClientTimeout(total=longest_s, sock_connect=_CONNECT_TIMEOUT_S)
        try:
            async with self._session.request(
                method, self.url + path, json=body, timeout=timeout
            ) as answer:
                if answer.status < 400 and is_text:
                    return await answer.text()
                if answer.status < 400:
                    is_json = answer.content_type == "application/json"
                    return await _json(answer, place) if is_json else None
                text = _shown(await answer.text())
                raise _refusal(place, answer.status, text, answer.headers, is_repeatable)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            reason = getattr(error, "strerror", None) or f"nothing in {_CONNECT_TIMEOUT_S:g} s"
            gone = ServerError(f"{self.url}: no vLLM server answers there ({reason})")
            raise _PassingError(gone) from error
        except TimeoutError as error:
            remedy = (
                "something listens there that is no vLLM server, or the server is stuck"
                if is_get
                else "raise vllm_server_timeout, or lower max_num_seqs if the server has more "
                "requests than it can work on"
            )
            raise ServerError(f"{place}: no answer within {longest_s:g} s; {remedy}") from error
        except aiohttp.ClientError as error:
            broken = ServerError(f"{place}: the server broke the connection off: {error!r}")
            if is_repeatable:
                raise _PassingError(broken) from error
            raise broken from error


async def _json(answer: aiohttp.ClientResponse, place: str) -> Any:
    try:
        return await answer.json()
    except ValueError as error:
        raise ServerError(f"{place}: the answer is no JSON: {error}") from error


def _shown(text: str) -> str:
    """The beginning of an answer; of a web page only that it is one."""
    return "a web page" if text.lstrip().startswith("<") else text[:_SHOWN_CHARACTERS]


class _PassingError(Exception):
    """A failure that may be gone the next time."""

    def __init__(self, error: ServerError, after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.after_s = after_s
        """When the server wants to be asked again."""


def _refusal(place: str, status: int, text: str, headers: Any, is_repeatable: bool) -> Exception:
    """What an answer with an error status means."""
    if status in (401, 403):
        return ServerError(
            f"{place}: the server asks for another key (status {status}); set "
            "vllm_server_api_key to the key that it was started with"
        )
    if status in (404, 405):
        return NotFoundError(f"{place}: status {status}: {text}")
    if status in (400, 422):
        return ValueError(f"{place}: the server refuses the request: {text}")
    error = ServerError(f"{place}: status {status}: {text}")
    # 429 and 503 are given before any work is begun.
    if status in (429, 503) or (status >= 500 and is_repeatable):
        after = headers.get("Retry-After", "")
        return _PassingError(error, float(after) if after.isdigit() else None)
    return error
