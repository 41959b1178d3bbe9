"""uvicorn's HTTP protocol with a time limit on headers, and with JSON where it would answer in plain text."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .failures import failure_line

HEADER_SECONDS = 20.0
HEADER_BYTES = 32 << 10


class PatientProtocol(H11Protocol):
    """Closes connections that do not send whole headers in time; by uvicorn's own they could stay open without end."""

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Start the first request's time."""
        super().connection_made(transport)
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        super().connection_lost(exc)
        self._stop_header_timer()

    def data_received(self, data: bytes) -> None:
        """Start the time where a request begins on a connection that was kept, and stop it where its headers end."""
        if self._header_timer is None and self._between_requests:
            self._start_header_timer()
        super().data_received(data)

    def handle_events(self) -> None:
        """Stop the time when headers are complete."""
        super().handle_events()
        if not self._between_requests:
            self._stop_header_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or has headers that are too large."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        line = failure_line("Bad Request", msg).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(line))]
        events: list[Any] = [
            h11.Response(status_code=400, headers=[*headers, (b"connection", b"close")], reason=b"Bad Request"),
            h11.Data(data=line),
            h11.EndOfMessage(),
        ]
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def _between_requests(self) -> bool:
        return self.conn.their_state is h11.IDLE

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
