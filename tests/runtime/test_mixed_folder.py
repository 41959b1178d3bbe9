"""A folder of 200 pictures, sound, odd and broken: one command does the ones and names the others."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from misf.runtime.run_cli import main

SIDE = 48
HOLE = np.zeros((SIDE, SIDE), np.bool_)
HOLE[10:20, 14:40] = True
TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
ODD_EXIF = (b"a text", b"II*\0", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + bytes(range(256)))
ODD_CHUNKS = (b"eXIf", b"iCCP", b"zTXt", b"iTXt", b"pHYs", b"tIME", b"gAMA", b"bKGD", b"sBIT", b"prVt", b"tRNS")


def _pixels(number: int) -> Image.Image:
    y, x = np.mgrid[:SIDE, :SIDE]
    return Image.fromarray(np.stack([x * 5, y * 5, (x + y + number) * 2], -1).astype(np.uint8))


def _file(image: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def _sound(number: int) -> list[tuple[str, bytes]]:
    image = _pixels(number)
    grey16 = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return [
        ("grey.png", _file(image.convert("L"), "PNG")),
        ("alpha.png", _file(image.convert("RGBA"), "PNG", dpi=(300, 300))),
        ("palette.png", _file(image.quantize(16), "PNG")),
        ("bilevel.png", _file(image.convert("1"), "PNG")),
        ("16.png", _file(grey16, "PNG")),
        ("16.tif", _file(grey16, "TIFF")),
        ("turned.jpg", _file(image, "JPEG", exif=TURNED)),
        ("progressive.jpeg", _file(image, "JPEG", progressive=True)),
        ("print.jpg", _file(image.convert("CMYK"), "JPEG")),
        ("lossless.webp", _file(image, "WEBP", lossless=True)),
        ("packed.tif", _file(image, "TIFF", compression="tiff_lzw")),
        ("old.bmp", _file(image, "BMP")),
        ("old.gif", _file(image.quantize(16), "GIF")),
        ("new.avif", _file(image, "AVIF")),
    ]


def _odd(number: int) -> list[tuple[str, bytes, bytes]]:
    """Return names, files, and the same files without what is odd in them."""
    image = _pixels(number)
    jpeg, png = _file(image, "JPEG"), _file(image, "PNG")
    body = bytes([number]) * (number + 1)
    kind = ODD_CHUNKS[number % len(ODD_CHUNKS)]
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    exif = b"Exif\0\0" + ODD_EXIF[number % len(ODD_EXIF)]
    return [
        (f"damaged {kind.decode()} \u6771\u4eac.PNG", png[:33] + chunk + png[33:], png),
        ("odd exif.JPG", jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:], jpeg),
        ("more after the end.jpg", jpeg + b"more" * 100, jpeg),
        ("a png in truth.webp", png, png),
    ]


def _broken(number: int) -> list[tuple[str, bytes]]:
    image, other = _pixels(number), _pixels(number + 1)
    return [
        *(
            (f"cut.{name}", data[: len(data) // 2])
            for name, data in (("png", _file(image, "PNG")), ("bmp", _file(image, "BMP")))
        ),
        ("cut.avif", _file(image, "AVIF")[:150]),
        ("empty.jpg", b""),
        ("text.tif", b"no picture"),
        ("zeros.webp", bytes(1000)),
        ("moves.gif", _file(image, "GIF", save_all=True, append_images=[other])),
        ("pages.tif", _file(image, "TIFF", save_all=True, append_images=[other])),
        ("large.png", _file(image.resize((SIDE + 1, SIDE)), "PNG")),  # the mask has another size
    ]


def _run(folder: Path, *options: str) -> Result:
    arguments = ["misf-small", folder / "in", folder / "hole.png", "-o", folder / "out", "--json", *options]
    return CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)


def _compare(path: Path, before: bytes) -> None:
    with Image.open(path) as filled, Image.open(io.BytesIO(before)) as picture:
        assert filled.size == picture.size
        if path.suffix.lower() in (".png", ".tif", ".bmp") and filled.mode == picture.mode:
            same = np.atleast_3d(np.asarray(filled) == np.asarray(picture))
            assert same[~HOLE].all(), path.name
            assert not same[HOLE].all(), path.name


@pytest.mark.timeout(120)
def test_the_sound_are_done_and_the_broken_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(HOLE).save(tmp_path / "hole.png")
    sound = {f"{number} {name}": data for number in range(7) for name, data in _sound(number)}
    sound |= {os.fsdecode(b"not UTF-8 \xff.png"): sound["0 grey.png"], "two\nlines.png": sound["0 grey.png"]}
    odd = {f"{number} {name}": (data, plain) for number in range(7) for name, data, plain in _odd(number)}
    broken = {f"{number} {name}": data for number in range(8) for name, data in _broken(number)}
    files = sound | {name: data for name, (data, _) in odd.items()} | broken
    sound |= {name: plain for name, (_, plain) in odd.items()}
    assert len(files) == 200
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)

    result = _run(tmp_path)
    assert result.exit_code == 5
    document = json.loads(result.stdout)
    failures = {Path(one["input"]).name: one["error"] for one in document["failures"]}
    assert set(failures) == set(broken)
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(sound)
    for name, error in failures.items():
        assert "\n" not in error
        assert any(name in line and line.startswith("error: ") for line in result.stderr.splitlines())
    warned = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warned) == len(set(warned)) > 5
    assert all(sum(line.count(name) for name in files) == 1 for line in warned), warned
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of the odd ones
        for path in (tmp_path / "out").iterdir():
            _compare(path, sound[path.name])

    begun = time.process_time()
    again = _run(tmp_path, "--skip-existing")
    assert time.process_time() - begun < 10  # measured 1 to 2 s
    assert again.exit_code == 5
    document = json.loads(again.stdout)
    assert document["images"] == []
    assert {Path(name).name for name in document["finished_before"]} == set(sound)
    assert {Path(one["input"]).name for one in document["failures"]} == set(broken)
