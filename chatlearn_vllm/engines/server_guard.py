"""Who may call the control endpoints of a vLLM server?

vLLM's own check of the API key leaves all paths but `/v1` open. A server that takes weights has
endpoints that run methods in its workers; this ASGI middleware (`vllm serve --middleware`) asks
for the key there, too.
"""

import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]

OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics", "/load"})
"""Tell nothing that a stranger may not know, and change nothing."""


class ControlGuard:
    """Answers 401 where the key of `VLLM_API_KEY` is missing."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        """Take the application behind this one.

        Raises:
            RuntimeError: there is no key, so everything would be open.
        """
        key = os.environ.get("VLLM_API_KEY")
        if not key:
            raise RuntimeError("a server that takes weights needs a key: set VLLM_API_KEY")
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan" or self._is_allowed(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _is_allowed(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in OPEN_PATHS:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(given[0], self._expected)
