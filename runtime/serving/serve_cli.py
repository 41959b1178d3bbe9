"""misf-serve: fill holes for clients over HTTP."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import resource
import signal
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...plugins.shared.command import command
from ...plugins.shared.command import log as misf_log
from ...plugins.shared.errors import MisfError
from ...plugins.shared.extras import need
from ...plugins.shared.shipped import ModelFile
from ..backends.contract import BACKENDS, PRECISIONS
from .settings import LOOPBACK, PAGE, TOKEN_VARIABLE, ServerSettings

if TYPE_CHECKING:
    import uvicorn

log = logging.getLogger(__name__)

LEAST_TOKEN = 16
BACKLOG = 2048
STARTING_SECONDS = 120
UNREAD_SECONDS = 60
KEPT_SECONDS = 75  # longer than load balancers keep theirs (60), or they would send into a connection that we close
M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 1 << 20  # blocks from this size on go back to the system at once


@command("misf-serve")
@click.argument("model", type=ModelFile())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all of IPv4.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any that is free, printed."
)
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="As of misf-run.")
@click.option("--device", envvar="MISF_DEVICE", show_envvar=True, help="auto, cpu, cuda or cuda:N.  [default: auto]")
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True, help="As of misf-run.")
@click.option("--working-size", type=click.IntRange(min=64), help="As of misf-run.  [default: the network's own]")
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads of each worker.  [default: the cores, shared evenly]"
)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, a model in each.")
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Requests in work or waiting, in each worker; further ones are refused with 503.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 86400),
    default=60.0,
    show_default=True,
    help="Seconds a request may take; also how long a stopping server finishes what it has taken.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    help="Crops of equal size run together.  [default: 8 on a GPU, 1 on a CPU]",
)
@click.option(
    "--batch-delay",
    type=click.FloatRange(0, 1000),
    default=3.0,
    show_default=True,
    metavar="MS",
    help="Milliseconds that a crop waits for others of its size while the model is idle.",
)
@click.option(
    "--max-megabytes", type=click.IntRange(min=1), default=64, show_default=True, help="Largest request, 2^20 bytes."
)
@click.option(
    "--max-megapixels",
    type=click.IntRange(1, 178),
    default=50,
    show_default=True,
    help="Largest picture; checked before it is decoded.",
)
@click.option(
    "--cors", multiple=True, metavar="ORIGIN", help="Origin whose pages may call, such as https://example.org; repeat."
)
@click.option(
    "--allowed-host",
    multiple=True,
    metavar="NAME",
    help="Host name that requests may be for; repeat.  [default: the local ones on a loopback address, else any]",
)
@click.option(
    "--token-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"File with a secret that clients send as Authorization: Bearer.  [default: ${TOKEN_VARIABLE}, else none]",
)
@click.option(
    "--page",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of static files to serve at /.  [default: the page that comes with misf]",
)
@click.option("--json-logs", is_flag=True, help="Log JSON, an object a line.")
def main(
    model: Path,
    host: str,
    port: int,
    workers: int,
    batch_delay: float,
    max_megabytes: int,
    max_megapixels: int,
    allowed_host: tuple[str, ...],
    token_file: Path | None,
    page: Path | None,
    threads: int | None,
    **others: Any,
) -> int:
    """Serve MODEL over HTTP: plain routes, IOPaint's API, and a page at /. Prints the address when it is ready.

    MODEL is an .onnx file, an engine (.plan), a checkpoint, or misf-small, the network that comes with misf.

    SIGTERM and SIGINT stop it: it takes no further requests and finishes those it has taken.

    \b
    Example:
      misf-serve misf-small --port 8080
      curl -F image=@photo.jpg -F mask=@mask.png http://127.0.0.1:8080/inpaint -o filled.jpg
    """
    need("misf-serve", "serve", "fastapi", "uvicorn", "python_multipart", "prometheus_client")
    from ..memory import usable_cores

    if workers > 1 and threads is None:
        threads = max(1, usable_cores() // workers)
    settings = ServerSettings(
        model=str(model),
        threads=threads,
        batch_delay=batch_delay / 1000,
        max_bytes=max_megabytes << 20,
        max_pixels=max_megapixels * 1_000_000,
        hosts=allowed_host or (LOOPBACK if host in LOOPBACK else ()),
        token=_token(token_file),
        page=str(page or PAGE),
        **others,
    )
    if host not in LOOPBACK and not settings.token:
        log.warning("listening on %s without a token: whoever reaches it may use it (--token-file)", host)
    prepare_process(settings)
    with listening(host, port) as listener:
        address = listener.getsockname()
        name = f"[{address[0]}]" if ":" in address[0] else address[0]
        serve = _serve_here if workers == 1 else _serve_by_workers
        return serve(settings, listener, f"http://{name}:{address[1]}", workers)


def prepare_process(settings: ServerSettings) -> None:
    """Set a serving process's log and limits; workers do it again for themselves."""
    if settings.json_logs:
        from .observing import JsonLines

        misf_log.handlers[:] = [JsonLines()]
        logging.getLogger().addHandler(JsonLines())  # what uvicorn and asyncio warn of
    # As many connections as the system lets us have: the default of 1024 is soon reached by idle ones.
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # By default glibc raises this limit with every large block that is freed, and keeps such blocks in the heaps of a
    # dozen threads: after hostile requests it held 336 MB where 192 were in use.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def _token(file: Path | None) -> str:
    token = (file.read_text(encoding="utf-8") if file else os.environ.get(TOKEN_VARIABLE, "")).strip()
    if (token and len(token) < LEAST_TOKEN) or (file and not token):
        raise click.UsageError(f"the token has {len(token)} characters: expected at least {LEAST_TOKEN}")
    return token


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises OSError that names the address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {_reason(error)}") from error
    # asyncio sets it only on sockets that were made with a protocol's number; without it an answer takes 40 ms more.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A client that does not read its answer would keep it in our memory without end.
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
    return listener


def _reason(error: OSError) -> str:
    """Return the system's text, where asyncio and getaddrinfo have longer or other ones."""
    return error.strerror or str(error) if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)


def uvicorn_config(app: Any, settings: ServerSettings, **options: Any) -> uvicorn.Config:
    """Return how uvicorn serves an application, or the application that an import string names."""
    import uvicorn

    from .protocol import HEADER_BYTES, PatientProtocol

    return uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        loop="asyncio",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=KEPT_SECONDS,
        timeout_graceful_shutdown=math.ceil(settings.timeout),
        **options,
    )


def _serve_here(settings: ServerSettings, listener: socket.socket, address: str, _workers: int) -> int:
    import uvicorn

    from .app import create_app

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(address, flush=True)
            log.info("serving %s at %s", Path(settings.model).name, address)

    server = Server(uvicorn_config(create_app(settings), settings))
    # uvicorn raises the signal again when it has ended gracefully; then there is nothing left to do.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    server.run([listener])
    return 0


def _serve_by_workers(settings: ServerSettings, listener: socket.socket, address: str, workers: int) -> int:
    from uvicorn.supervisors import Multiprocess

    from .app import open_inpainter
    from .observing import ADDRESS_NOTE, WORKERS_FOLDER

    open_inpainter(settings)  # what is wrong with the model is said once, here
    settings.to_environment()
    with tempfile.TemporaryDirectory(prefix="misf-metrics-") as folder:
        os.environ[WORKERS_FOLDER] = folder
        config = uvicorn_config(
            "misf.runtime.serving.app:app_from_environment",
            settings,
            factory=True,
            workers=workers,
            timeout_worker_healthcheck=STARTING_SECONDS,
        )
        (Path(folder) / ADDRESS_NOTE).write_text(address, encoding="utf-8")
        log.info("starting %s at %s with %d workers", Path(settings.model).name, address, workers)
        supervisor = Multiprocess(config, [listener])
        supervisor.run()
        if any(process.exitcode not in (0, -signal.SIGTERM) for process in supervisor.processes):
            raise MisfError("a worker failed; its lines above say why")
    return 0
