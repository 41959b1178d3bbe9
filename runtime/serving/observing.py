"""What is seen of each request: an id, a line in the log, numbers for Prometheus; and headers of every answer."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Container
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.process_collector import ProcessCollector
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...plugins.shared.command import current_subject
from .failures import CLIENT_LEFT, response_for

log = logging.getLogger(__name__)

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 32)
WORKERS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
ADDRESS_NOTE = "address"
"""File in that folder: what the first worker that is ready prints."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; font-src 'self' data:; "
    "connect-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every answer. The two of cross-origin isolation give the page's WebAssembly its threads; no-cache has browsers ask
whether the files that they keep are still the same."""

disable_created_metrics()  # type: ignore[no-untyped-call] # a time for each counter, which nobody reads


class Metrics:
    """What Prometheus is told; with several workers their sums."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        known: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("misf_requests", "Requests answered", ("route", "status"), **known)
        self.seconds = Histogram(
            "misf_request_seconds",
            "From a request's head to its answer's end",
            ("route",),
            buckets=SECONDS,
            **known,
        )
        self.bytes = Counter("misf_bytes", "Bytes of bodies", ("direction",), **known)
        self.in_work = Gauge(
            "misf_requests_in_work", "Requests in work or in the queue", multiprocess_mode="livesum", **known
        )
        self.batches = Histogram("misf_batch_size", "Crops that the model ran together", buckets=SIZES, **known)
        self.model_seconds = Histogram("misf_model_seconds", "Runs of the model", buckets=SECONDS, **known)
        self.hole_share = Histogram("misf_hole_share", "Share of a picture that was hole", buckets=SHARES, **known)
        if WORKERS_FOLDER not in os.environ:
            ProcessCollector(registry=self._registry)

    def batch(self, size: int, seconds: float) -> None:
        """Count one run of the model."""
        self.batches.observe(size)
        self.model_seconds.observe(seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        if WORKERS_FOLDER not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def forget_dead_workers() -> None:
    """Take what workers that died had in work out of the sum."""
    for file in Path(os.environ[WORKERS_FOLDER]).glob("gauge_live*.db"):
        if not Path("/proc", file.stem.rpartition("_")[2]).exists():
            file.unlink(missing_ok=True)


class Observed:
    """The outermost ASGI layer: request id, headers, log, metrics, and an answer for whatever went wrong within.

    Log and metrics name a request's path if it is one of `routes`, else `other`: a client cannot make up labels.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, resource_policy: str, routes: Container[str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes
        self._headers = HEADERS | {"Cross-Origin-Resource-Policy": resource_policy}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and note what became of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, sent = time.perf_counter(), 0, 0
        request_id = scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex[:12]

        async def send_observed(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_observed)
        except Exception as error:
            if not status:
                await response_for(error)(scope, receive, send_observed)
        finally:
            seconds = time.perf_counter() - started
            # Where a worker of uvicorn ends a request at shutdown there is no status.
            self._note(scope, request_id, status or CLIENT_LEFT, seconds, scope["state"].get("received", 0), sent)

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float, received: int, sent: int) -> None:
        route = scope["path"] if scope["path"] in self._routes else "other"
        self._metrics.requests.labels(route, status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        self._metrics.bytes.labels("in").inc(received)
        self._metrics.bytes.labels("out").inc(sent)
        record = {
            "request_id": request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "received": received,
            "sent": sent,
        }
        level = logging.DEBUG if route in ("/healthz", "/readyz", "/metrics") else logging.INFO
        log.log(level, "%s", " ".join(map(str, record.values())), extra={"record": record})


class JsonLines(logging.Handler):
    """Writes each log record to stderr as one JSON object."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := current_subject().removesuffix(": "):
            line["request_id"] = request_id
        line |= getattr(record, "record", {})
        if record.exc_info:
            line["traceback"] = logging.Formatter().formatException(record.exc_info)
        try:
            print(json.dumps(line), file=sys.stderr, flush=True)
        except OSError:  # a full disk or a closed pipe is no reason to fail a request
            self.handleError(record)
