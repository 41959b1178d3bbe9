"""A file server for the page, with one route that fills, as misf-serve has it; a test can make it answer otherwise."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from misf.plugins.shared.errors import MisfError
from misf.runtime import Inpainter

SAMPLES = Path(__file__).parents[2] / "runtime/samples"


@dataclass
class Site:
    """What is served, and what was asked of it."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    """One per fill: image, mask (bytes of files), query, headers."""
    answers: list[tuple[int, dict[str, str], dict[str, str]]] = field(default_factory=list)
    """What to answer the next fills instead: status, headers, JSON."""


@contextlib.contextmanager
def served(folder: Path, inpainter: Inpainter | None = None) -> Iterator[Site]:
    """Serve a folder on a free port of 127.0.0.1, and fills at /inpaint by `inpainter`."""
    site = Site("")

    class Handler(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            name = urlsplit(path).path.lstrip("/")
            beside = SAMPLES / name.removeprefix("samples/")
            return str(beside) if name.startswith("samples/") else str(folder / (name or "index.html"))

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            parts = list(BytesParser(policy=HTTP).parsebytes(head + body).iter_parts())
            form = {str(part.get_param("name", header="content-disposition")): part for part in parts}
            files = {name: part.get_payload(decode=True) for name, part in form.items()}
            query = dict(parse_qsl(urlsplit(self.path).query))
            site.requests.append({**files, "query": query, "headers": dict(self.headers)})
            status, headers, document = site.answers.pop(0) if site.answers else (200, {}, {})
            answer, kind = json.dumps(document).encode(), "application/json"
            if status == 200:
                assert inpainter is not None
                try:
                    answer, kind = (
                        inpainter.inpaint_file(files["image"], files["mask"]),
                        form["image"].get_content_type(),
                    )
                except (ValueError, MisfError) as error:
                    status, answer = 400, json.dumps({"error": type(error).__name__, "detail": str(error)}).encode()
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(answer)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    site.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
