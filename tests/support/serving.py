"""Servers for tests: a real uvicorn in a thread or in a process, and a model whose calls a test lets through."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from misf.runtime import Inpainter
from misf.runtime.serving.app import create_app
from misf.runtime.serving.serve_cli import listening, uvicorn_config
from misf.runtime.serving.settings import ServerSettings

MISF_SERVE = [sys.executable, "-c", "from misf.runtime.serving.serve_cli import main; main()"]


class GatedBackend:
    """A backend around another whose calls wait until the test opens the gate; `shapes` says what came."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.shapes: list[tuple[int, ...]] = []
        self.fails_on: Any = lambda _image: False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def __call__(self, image: Any, mask: Any) -> Any:
        self.shapes.append(image.shape)
        self.entered.set()
        assert self.gate.wait(60)
        if self.fails_on(image):
            raise RuntimeError("/secret/path: this picture makes the model fail")
        return self._backend(image, mask)


def gated(model: Path) -> tuple[Inpainter, GatedBackend]:
    """Return an Inpainter whose backend is gated; the gate is open until a test closes it."""
    inpainter = Inpainter(model, backend="onnxruntime", device="cpu", threads=1)
    backend = GatedBackend(inpainter.backend)
    backend.gate.set()
    inpainter.backend = backend
    return inpainter, backend


@contextlib.contextmanager
def serving(model: Path, inpainter: Inpainter | None = None, **options: Any) -> Iterator[httpx.Client]:
    """Yield a client of a server that runs in a thread."""
    import uvicorn

    settings = ServerSettings(str(model), backend="onnxruntime", device="cpu", threads=1, **options)
    server = uvicorn.Server(uvicorn_config(create_app(settings, inpainter), settings))
    with listening("127.0.0.1", 0) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            until(lambda: server.started or not thread.is_alive())
            with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


@contextlib.contextmanager
def spawned(model: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield a misf-serve process and its address; it is killed at the end, if it still runs."""
    command = [*MISF_SERVE, str(model), "--port=0", "--threads=1", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        yield process, address
    finally:
        process.kill()
        process.communicate(timeout=60)


def until(condition: Any, seconds: float = 60) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def png(array: Any, **options: Any) -> bytes:
    """Return an array as the bytes of a PNG."""
    return encoded(Image.fromarray(np.asarray(array)), "PNG", **options)


def encoded(image: Image.Image, format_: str, **options: Any) -> bytes:
    """Return a picture as the bytes of a file."""
    import io

    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    """Return the picture in a file."""
    import io

    image = Image.open(io.BytesIO(data))
    image.load()
    return image
