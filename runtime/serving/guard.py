"""What is refused before a route sees it: requests for other hosts, without the token, too large or too slow."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections import deque

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import CLIENT_LEFT, RequestError, failure_response, response_for

OPEN = ("/healthz", "/readyz")
"""Paths that need no token: for load balancers."""
PRIVATE = ("/api/", "/inpaint", "/metrics", "/openapi.json")
"""How paths that do need it begin; the rest is the page, which holds nothing that is secret."""
DRAIN_SECONDS = 2.0
BODIES = 8


class Guard:
    """An ASGI layer that lets only requests through that are allowed, with bodies that are whole.

    Args:
        app: what is guarded.
        hosts: names that a request may be for, without the port; none: any.
        token: what `Authorization: Bearer` must bring; "": nothing.
        max_bytes: of one body; those of all requests together may have 8 times as many.
        timeout: seconds for a body to arrive.

    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...], token: str, max_bytes: int, timeout: float) -> None:
        self._app, self._hosts, self._token = app, {host.lower() for host in hosts}, token.encode()
        self._max_bytes, self._timeout = max_bytes, timeout
        self._too_large = f"the request is too large: expected at most {max_bytes} bytes"
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an allowed request on with its whole body, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if refusal := self._refusal(scope["path"], headers):
            waits = headers.get("expect", "").lower() == "100-continue"  # for leave to send its body
            await self._close_with(refusal, scope, receive, send, more=not waits)
            return
        chunks: deque[bytes] = deque()
        state = scope["state"]
        state["received"] = 0
        try:
            await self._read(receive, chunks, state)
            await self._app(scope, _replayed(chunks, receive), send)
        except RequestError as failure:
            chunks.clear()
            await self._close_with(response_for(failure), scope, receive, send)
        finally:
            self._held -= state["received"]

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        host = re.sub(r":\d*$", "", headers.get("host", "")).strip("[]").lower()
        if self._hosts and host not in self._hosts and path not in OPEN:
            return failure_response(400, "this server is not known by that host name: see misf-serve --allowed-host")
        scheme, _, token = headers.get("authorization", "").partition(" ")
        allowed = scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1"), self._token)
        if self._token and not allowed and path.startswith(PRIVATE):
            return failure_response(401, "expected the header Authorization: Bearer TOKEN with the server's token")
        if int(headers.get("content-length", "0")) > self._max_bytes:  # h11 lets only numbers through
            return failure_response(413, self._too_large)
        return None

    async def _read(self, receive: Receive, chunks: deque[bytes], state: dict[str, int]) -> None:
        """Append the body's parts and count them. Raises RequestError for a body that is too large, slow or cut."""
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise RequestError(408, f"the body did not arrive within {self._timeout:g} s") from None
            if message["type"] == "http.disconnect":
                raise RequestError(CLIENT_LEFT, "the client left")
            chunk = message.get("body", b"")
            chunks.append(chunk)
            state["received"] += len(chunk)
            self._held += len(chunk)
            if state["received"] > self._max_bytes:
                raise RequestError(413, self._too_large)
            if self._held > BODIES * self._max_bytes:
                raise RequestError(503, "too many requests are being sent at the same time: try again", 2)
            if not message.get("more_body"):
                return

    async def _close_with(
        self, response: Response, scope: Scope, receive: Receive, send: Send, more: bool = True
    ) -> None:
        """Answer a request whose body may still be on its way, if there is more of it, and close the connection.

        What arrives within a moment is read and dropped: closing at once would reset the connection, and the client
        would not see the answer.
        """
        response.headers["Connection"] = "close"
        deadline = time.monotonic() + DRAIN_SECONDS
        while more and time.monotonic() < deadline:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                break
            more = message["type"] == "http.request" and message.get("more_body", False)
        await response(scope, receive, send)


def _replayed(chunks: deque[bytes], receive: Receive) -> Receive:
    """Return a channel that gives the body's parts, and then what comes after it: the client that leaves."""
    ended = False

    async def replay() -> Message:
        nonlocal ended
        if ended:
            return await receive()
        chunk = chunks.popleft()
        ended = not chunks
        return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

    return replay
