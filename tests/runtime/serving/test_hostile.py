"""Some 250 requests that mean no good: each is refused with one line of JSON, and the server is as it was before."""

from __future__ import annotations

import base64
import io
import json
import resource
import socket
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.serving import encoded, png, spawned
from tests.support.tiny_models import mean_fill

pytestmark = pytest.mark.timeout(280)
PIXELS = np.random.default_rng(7).integers(0, 256, (60, 80, 3), np.uint8)
MASK = png((PIXELS[..., 0] > 200).astype(np.uint8) * 255)
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")


def picture(format_: str, **options: Any) -> bytes:
    return encoded(Image.fromarray(PIXELS).convert("P" if format_ == "GIF" else "RGB"), format_, **options)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, extra: bytes = b"", rows: bytes = b"\0" * 64) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def bombs() -> Iterator[bytes]:
    yield png_of(60000, 60000)
    yield png_of(2**31 - 1, 2**31 - 1)
    yield png_of(0, 0)
    yield png_of(6000, 6000, rows=bytes(6000 * 6001))
    yield (
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0xF7, 0, 0) + bytes(768) + b",\0\0\0\0\xff\xff\xff\xff\0\x08\0;"
    )
    yield (
        b"BM"
        + struct.pack("<IHHI", 100, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)
    )
    yield b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, -5, 7, 1, 24, 0, 0, 0, 0, 0, 0)
    yield picture("JPEG").replace(struct.pack(">HH", 60, 80), struct.pack(">HH", 65000, 65000), 1)
    yield encoded(Image.new("RGB", (4000, 4000)), "WEBP", lossless=True, method=0, quality=0)
    yield picture("TIFF").replace(struct.pack("<HHIH", 256, 4, 1, 80), struct.pack("<HHII", 256, 4, 1, 600000)[:10], 1)
    frames = [Image.new("L", (2000, 2000), level) for level in range(5)]
    yield encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    yield encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:3], compression="tiff_lzw")


def no_pictures() -> Iterator[bytes]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", picture("PNG"))
    yield from (b"", b"\0", b"no picture", b"\xff" * 5000, archive.getvalue(), b"%PDF-1.7\n%%EOF")
    yield b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
    yield b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><svg>&e;</svg>'
    yield b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"
    yield b"#!/bin/sh\nexit 1\n"
    yield b"GIF89a/*" + b"*/=1;alert(1)//"
    yield b"\x89PNG\r\n\x1a\n" + archive.getvalue()
    yield b"\xff\xd8\xff\xe0<html><script>alert(1)</script>"
    yield b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(40)
    yield b"\0\0\0\x1cftypavif" + bytes(200)
    yield b"II*\0\x08\0\0\0\xff\xff" + bytes(3000)  # a directory that says it has 65535 entries
    yield b"II*\0\x08\0\0\0\0\0\x08\0\0\0"  # a directory that is its own successor


def damaged(rng: np.random.Generator) -> Iterator[bytes]:
    for format_ in FORMATS:
        data = picture(format_)
        for share in (0.02, 0.1, 0.5, 0.95):
            yield data[: int(len(data) * share)]
        for _ in range(8):
            flipped = bytearray(data)
            for position in rng.integers(0, min(len(data), 600), 6):
                flipped[position] = rng.integers(0, 256)
            yield bytes(flipped)


def polyglots() -> Iterator[bytes]:
    yield picture("PNG") + b"PK\x03\x04<script>alert(1)</script>"
    yield picture("JPEG") + b"<?php system($_GET[0]); ?>"
    yield picture("GIF") + bytes(5000)


def swollen() -> Iterator[bytes]:
    """Pictures that are fine, with 64 MB of text, profile or XMP packed into some kilobytes."""
    zeros = zlib.compress(bytes(64 << 20), 9)
    heads = {b"zTXt": b"Comment\0\0", b"iCCP": b"profile\0\0", b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0"}
    for kind, head in heads.items():
        yield png_of(80, 60, chunk(kind, head + zeros), rows=bytes(81 * 60))


def json_bodies() -> Iterator[bytes]:
    image, mask = (base64.b64encode(data).decode() for data in (picture("PNG"), MASK))
    yield from (b"", b"null", b"[]", b"3", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"NaN")
    for broken in (
        {"image": image},
        {"image": [image], "mask": mask},
        {"image": {"path": "/etc/passwd"}, "mask": mask},
        {"image": "/etc/passwd", "mask": mask},
        {"image": "file:///etc/passwd", "mask": mask},
        {"image": "http://127.0.0.1:1/x.png", "mask": mask},
        {"image": "data:image/png;base64", "mask": mask},
        {"image": "data:,", "mask": mask},
        {"image": "\ud800", "mask": mask},
        {"image": "é" * 1000, "mask": mask},
        {"image": mask[:-9], "mask": mask},
        {"image": image, "mask": base64.b64encode(png(np.full((1, 1), 255, np.uint8))).decode()},
    ):
        yield json.dumps(broken).encode()


def multiparts() -> Iterator[tuple[str, bytes]]:
    def part(name: str, body: bytes, extra: str = "") -> bytes:
        return (
            f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="x"{extra}\r\n\r\n'.encode()
            + body
            + b"\r\n"
        )

    kind = "multipart/form-data; boundary=b"
    yield kind, b""
    yield kind, b"--b--\r\n"
    yield kind, b"garbage"
    yield kind, part("image", picture("PNG"))
    yield kind, part("image", picture("PNG"), f"\r\nX: {'y' * 100_000}") + b"--b--\r\n"
    yield kind, part("image", picture("PNG")) + part("mask", b"") + b"--b--\r\n"
    yield kind, b"".join(part(f"f{number}", b"x") for number in range(3000)) + b"--b--\r\n"
    yield kind, b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nnot a file\r\n--b--\r\n'
    yield "multipart/form-data", part("image", picture("PNG"))
    yield "multipart/form-data; boundary=" + "b" * 3000, part("image", picture("PNG"))
    yield "application/x-www-form-urlencoded", b"image=1&mask=2"
    yield "image/png", picture("PNG")


def raw_requests() -> Iterator[bytes]:
    host = b"Host: 127.0.0.1\r\n"
    yield b"garbage\r\n\r\n"
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)  # TLS
    yield b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + host + b"\r\n"
    yield b"GET / HTTP/1.1\r\n" + host + b"X: " + b"y" * 100_000 + b"\r\n\r\n"
    yield b"GET / HTTP/1.1\r\n" + host + b"".join(b"X%d: y\r\n" % number for number in range(9000)) + b"\r\n"
    yield b"GET /inpaint HTTP/1.1\r\n\r\n"  # no Host
    yield b"GET /inpaint HTTP/9.9\r\n" + host + b"\r\n"
    yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield b"POST /inpaint HTTP/1.1\r\n" + host + b"Content-Length: -1\r\n\r\n"
    yield b"POST /inpaint HTTP/1.1\r\n" + host + b"Content-Length: 9" + b"9" * 30 + b"\r\n\r\n"
    yield b"POST /inpaint HTTP/1.1\r\n" + host + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd"
    yield b"POST /inpaint HTTP/1.1\r\n" + host + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    yield b"POST /inpaint HTTP/1.1\r\n" + host + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"
    yield b"DELETE /inpaint HTTP/1.1\r\n" + host + b"\r\n"
    yield b"TRACE / HTTP/1.1\r\n" + host + b"\r\n"
    yield b"CONNECT example.org:80 HTTP/1.1\r\n" + host + b"\r\n"
    yield b"GET /..%2f..%2fetc/passwd HTTP/1.1\r\n" + host + b"\r\n"
    yield b"GET /%00 HTTP/1.1\r\n" + host + b"\r\n"
    yield b"GET /static/../../../../etc/passwd HTTP/1.1\r\n" + host + b"\r\n"
    yield b"GET /ws HTTP/1.1\r\n" + host + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n"
    yield b"GET /api/v1/model HTTP/1.1\r\nHost: attacker.example\r\n\r\n"


class Server:
    """A server in a process, and what is asked of each of its answers."""

    def __init__(self, pid: int, address: str) -> None:
        self._pid = pid
        self._client = httpx.Client(base_url=address, trust_env=False, timeout=60)
        self.host, port = address.removeprefix("http://").split(":")
        self.port = int(port)
        self.count = 0

    def close(self) -> None:
        self._client.close()

    def post(self, path: str, fine: tuple[int, ...] = (), **request: Any) -> None:
        started = time.monotonic()
        answer = self._client.post(path, **request)
        assert time.monotonic() - started < 20
        self.check(answer.status_code, answer.content, fine)

    def check(self, status: int, body: bytes, fine: tuple[int, ...] = ()) -> None:
        self.count += 1
        if status in fine:
            return
        assert 400 <= status < 500 or status == 503, (status, body[:500])
        assert body.count(b"\n") == 1, body[:500]
        failure = json.loads(body)
        assert failure["detail"]
        assert len(failure["detail"]) < 1000
        for inside in ("Traceback", "site-packages", ".py", " at 0x"):
            assert inside not in failure["detail"]

    def alive(self) -> None:
        assert self._client.get("/readyz").status_code == 200
        files = {"image": picture("PNG"), "mask": MASK}
        assert self._client.post("/inpaint", files=files).headers["content-type"] == "image/png"

    def megabytes(self) -> float:
        return int(Path(f"/proc/{self._pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    def connection(self) -> socket.socket:
        connection = socket.create_connection((self.host, self.port), 30)
        connection.settimeout(60)
        return connection

    def send_raw(self, request: bytes) -> None:
        with self.connection() as connection:
            try:
                connection.sendall(request)
                answer = b""
                while b"\r\n\r\n" not in answer or len(answer.partition(b"\r\n\r\n")[2]) < _length(answer):
                    part = connection.recv(65536)
                    if not part:
                        break
                    answer += part
            except ConnectionError:  # the server closed while we were still sending: refused too
                self.count += 1
                return
        head, _, body = answer.partition(b"\r\n\r\n")
        page = request.startswith(b"GET / ")  # an odd header is no reason to withhold the page
        self.check(int(head.split()[1]), body, fine=(200,) if page else ())


def _length(answer: bytes) -> int:
    lines = answer.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
    return next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 1 << 30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = mean_fill(tmp_path_factory.mktemp("model") / "mean.onnx")
    options = ("--max-megabytes=4", "--max-megapixels=10", "--timeout=20", "--queue=16", "--quiet")
    with spawned(model, *options) as (process, address):
        server = Server(process.pid, address)
        yield server
        server.close()


def everything(server: Server, made: tuple[list[bytes], list[bytes]]) -> None:
    bad, packed = made
    for data in bad:
        server.post("/inpaint", files={"image": data, "mask": MASK})
        server.post("/inpaint", files={"image": picture("PNG"), "mask": data})
        text = base64.b64encode(data).decode()
        if len(text) < 1 << 20:
            server.post("/api/v1/inpaint", json={"image": text, "mask": base64.b64encode(MASK).decode()})
    for data in damaged(np.random.default_rng(1)):
        server.post("/inpaint", fine=(200,), files={"image": data, "mask": MASK})
    for data in [*polyglots(), *packed]:
        server.post("/inpaint", fine=(200,), files={"image": data, "mask": MASK})
    for body in json_bodies():
        for path in ("/api/v1/inpaint", "/api/v1/adjust_mask", "/api/v1/model"):
            server.post(path, content=body, headers={"Content-Type": "application/json"})
    for kind, body in multiparts():
        server.post("/inpaint", content=body, headers={"Content-Type": kind})
    for request in raw_requests():
        server.send_raw(request)
    for query in ("grow=-1", "grow=99999999999", "grow=nan", "strategy=../../x", "threshold=255", "margin=1e9"):
        server.post(f"/inpaint?{query}", files={"image": picture("PNG"), "mask": MASK})
    for size in ((1, 1), (1, 60), (80, 1), (61, 80)):
        server.post("/inpaint", files={"image": picture("PNG"), "mask": png(np.full(size, 255, np.uint8))})
    server.post("/inpaint", files={"image": picture("PNG") + bytes(5 << 20), "mask": MASK})


@pytest.mark.slow
def test_each_is_refused_with_a_line_and_memory_comes_back(server: Server) -> None:
    made = [*bombs(), *no_pictures()], [*swollen()]
    everything(server, made)
    assert server.count > 200
    server.alive()
    first = server.megabytes()
    for data in [*made[0], *made[1]]:
        server.post("/inpaint", fine=(200,), files={"image": data, "mask": MASK})
    server.alive()
    assert server.megabytes() < 1.05 * first


def test_one_pixel_and_thin_pictures_are_pictures(server: Server) -> None:
    for size in ((1, 1), (1, 300), (300, 1), (2, 3)):
        for value in (0, 255):
            mask = np.full(size, value, np.uint8)
            server.post("/inpaint", fine=(200,), files={"image": png(mask), "mask": png(mask)})
    server.alive()


def test_uploads_that_are_given_up(server: Server) -> None:
    before = server.megabytes()
    head = b"POST /inpaint HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4000000\r\n\r\n"
    for _ in range(100):
        with server.connection() as connection:
            connection.sendall(head + bytes(300_000))
    server.alive()
    assert server.megabytes() < before + 40


def test_many_slow_uploads_take_no_place_in_the_queue(server: Server) -> None:
    head = b"POST /inpaint HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4000000\r\n\r\n"
    slow = [server.connection() for _ in range(64)]
    try:
        for connection in slow:
            connection.sendall(head + b"x")
        time.sleep(0.2)
        server.alive()
        for connection in slow:
            connection.sendall(b"x")
        server.alive()
    finally:
        for connection in slow:
            connection.close()


@pytest.mark.slow
def test_ten_thousand_idle_connections(server: Server) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(10_000, hard - 1000)
    if count < 1000:
        pytest.skip(f"this system allows {hard} open files: too few for a thousand connections")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    before = server.megabytes()
    idle = []
    try:
        for _ in range(count):
            idle.append(server.connection())
        server.alive()
        assert server.megabytes() < before + 200
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    server.alive()
