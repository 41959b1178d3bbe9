"""The parts put together: one ASGI application for one model."""

from __future__ import annotations

import contextlib
import json
import mimetypes
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from ...plugins.shared.command import misf_version
from ...plugins.shared.errors import MisfError
from ..inpainter import Inpainter
from .failures import failure_response, response_for
from .filling import Filler
from .guard import Guard
from .iopaint import iopaint_routes
from .observing import ADDRESS_NOTE, WORKERS_FOLDER, Metrics, Observed, forget_dead_workers
from .routes import plain_routes
from .settings import ServerSettings

SAMPLES = Path(__file__).parents[1] / "samples"
TYPES = {
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
    ".webmanifest": "application/manifest+json",
    ".webp": "image/webp",
    ".avif": "image/avif",
}
"""Of the page's files; browsers refuse modules of another type, and not every system's table has these."""
READABLE_BY_SCRIPTS = ["X-Seed", "X-Process-Time", "X-Precision", "X-Request-Id", "Retry-After"]


def create_app(
    settings: ServerSettings, inpainter: Inpainter | None = None, on_ready: Callable[[], None] = lambda: None
) -> ASGIApp:
    """Return the application; the model is loaded now, and is warm when the server takes its first request.

    on_ready: called once, when requests that the socket holds will be taken.
    """
    metrics = Metrics()
    filler = Filler(
        inpainter or open_inpainter(settings),
        queue=settings.queue,
        timeout=settings.timeout,
        max_pixels=settings.max_pixels,
        max_batch=settings.max_batch,
        batch_delay=settings.batch_delay,
        metrics=metrics,
    )
    MultiPartParser.spool_max_size = settings.max_bytes  # a client's picture is not written to the disk

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        filler.warm_up()
        on_ready()
        yield
        filler.close()

    handlers: dict[int | type[Exception], Any] = {RequestValidationError: _invalid, HTTPException: _refused}
    handlers |= dict.fromkeys((MisfError, ValueError, OSError, MemoryError, Exception), _failed)
    bearer = [Depends(HTTPBearer(auto_error=False))] if settings.token else []
    api = FastAPI(
        title="misf",
        version=misf_version(),
        description="Fills holes in pictures. Routes under /api/v1 are those of IOPaint.",
        lifespan=lifespan,
        docs_url=None,  # its pages come from another server
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=handlers,
    )
    name = Path(settings.model).stem
    routers = [plain_routes(filler, name), iopaint_routes(filler, name)]
    for router in routers:
        api.include_router(router, dependencies=bearer)
    _mount_page(api, Path(settings.page))
    app: ASGIApp = Guard(api, settings.hosts, settings.token, settings.max_bytes, settings.timeout)
    if settings.cors:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=READABLE_BY_SCRIPTS,
        )
    routes = {path for router in routers for route in router.routes if (path := getattr(route, "path", None))}
    return Observed(app, metrics, "cross-origin" if settings.cors else "same-origin", routes)


def _mount_page(api: FastAPI, folder: Path) -> None:
    """Serve a page at /, if there is one. A folder of misf-export --web learns that there is a server to fill too."""
    if not (folder / "index.html").is_file():
        return
    for suffix, kind in TYPES.items():
        mimetypes.add_type(kind, suffix)
    if (folder / "page.json").is_file():
        description: dict[str, Any] = json.loads((folder / "page.json").read_text(encoding="utf-8")) | {"server": True}

        @api.get("/page.json", include_in_schema=False)
        def page_json() -> dict[str, Any]:
            return description

    if not (folder / "samples").is_dir():  # the installed page has none of its own
        api.mount("/samples", StaticFiles(directory=SAMPLES))
    # Not mounted: a route for every path would answer 404 where a path is known and only its method is wrong.
    api.router.default = StaticFiles(directory=folder, html=True)


def app_from_environment() -> ASGIApp:
    """Return the application of a worker process."""
    from .serve_cli import prepare_process

    settings = ServerSettings.from_environment()
    prepare_process(settings)
    forget_dead_workers()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return create_app(settings, on_ready=say_ready)


def say_ready() -> None:
    """Print the address, which our parent process left for the first worker that is ready."""
    note = Path(os.environ[WORKERS_FOLDER]) / ADDRESS_NOTE
    with contextlib.suppress(FileNotFoundError):
        address = note.read_text(encoding="utf-8")
        note.unlink()
        print(address, flush=True)


def _end_with_parent() -> None:
    """Stop this worker when the process that looks after it was killed: it would hold the port without end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    shutil.rmtree(os.environ[WORKERS_FOLDER], ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)


def open_inpainter(settings: ServerSettings) -> Inpainter:
    """Return the model, loaded."""
    return Inpainter(
        settings.model,
        backend=settings.backend,
        device=settings.device,
        working_size=settings.working_size,
        precision=settings.precision,
        threads=settings.threads,
    )


async def _invalid(_request: Request, error: Exception) -> Response:
    """Answer a request whose fields are missing or wrong; what came is not repeated, it may be large or secret."""
    assert isinstance(error, RequestValidationError)
    texts = [f"{_place(problem)}: {problem['msg']}" for problem in error.errors()[:5]]
    return failure_response(422, "; ".join(texts) or "the request is not understood")


def _place(problem: Any) -> str:
    where = [str(part) for part in problem["loc"] if part not in ("body", "query")]
    return ".".join(where)[:80] or "body"


async def _refused(_request: Request, error: Exception) -> Response:
    """Answer 404, 405 and what FastAPI says of bodies that it cannot parse."""
    assert isinstance(error, HTTPException)
    return failure_response(error.status_code, str(error.detail), headers=error.headers)


async def _failed(_request: Request, error: Exception) -> Response:
    return response_for(error)
