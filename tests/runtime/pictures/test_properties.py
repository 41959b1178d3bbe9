"""Random metadata of random types in every format: nothing ends a run, and libvips too finds what was there.

With MISF_EXAMPLES set there are as many, and other ones each time, or those of --hypothesis-seed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, reject, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from misf.runtime.fill_file import FileFiller
from misf.runtime.inpainter import Inpainter
from misf.runtime.jobs import plan_jobs

pyvips = pytest.importorskip("pyvips")

SUFFIXES = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "WEBP": ".webp",
    "TIFF": ".tif",
    "AVIF": ".avif",
    "BMP": ".bmp",
    "GIF": ".gif",
}
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"),
    "AVIF": ("RGB", "RGBA"),
    "BMP": ("L", "RGB"),
    "GIF": ("P",),
}
HOLDS_ALPHA = ("PNG", "WEBP", "TIFF", "AVIF")
LOSSLESS = ("PNG", "WEBP", "TIFF", "BMP")
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SIZES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
# Tags that readers know, of one type each, and some that none knows.
KNOWN_TAGS = (
    270,
    271,
    272,
    282,
    283,
    296,
    305,
    306,
    315,
    33432,
    33434,
    36864,
    36867,
    37500,
    37510,
    40961,
    42036,
    40091,
)
INNER_TAGS = (0x8769, 0x8825, 0xA005)
KEPT_IN_TIFF = (270, 271, 272, 305, 306, 315, 33432, 40091)
FIT = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 tiff:Orientation="%d" dc:title="%s"/></rdf:RDF></x:xmpmeta>"""


@dataclass
class Said:
    """What a generated file says about its picture."""

    orientation: int = 1
    exif: bytes = b""
    exif_is_sound: bool = False
    exif_plain: bytes = b""  # less its preview
    xmp: bytes = b""
    xmp_is_sound: bool = False
    iptc: bytes = b""
    iptc_is_sound: bool = False
    profile: bytes = b""
    texts: dict[str, str] = field(default_factory=dict)
    comment: bytes = b""
    chunks: list[tuple[bytes, bytes]] = field(default_factory=list)


def _tiff(order: str, rows: list[tuple[int, int, int, bytes]], second: bytes = b"") -> bytes:
    """Return a TIFF structure of entries (tag, type, count, value), sorted, and a second directory's bytes."""
    after = 8 + 2 + 12 * len(rows) + 4
    table, body = b"", b""
    for tag, kind, count, value in sorted(rows):
        where = value.ljust(4, b"\0")
        if len(value) > 4:
            where = struct.pack(order + "I", after + len(body))
            body += value + bytes(len(value) % 2)
        table += struct.pack(order + "HHI", tag, kind, count) + where
    link = struct.pack(order + "I", after + len(body) if second else 0)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(rows))
    return head + table + link + body + second


@st.composite
def _rows(draw: st.DrawFn, order: str, tags: tuple[int, ...]) -> list[tuple[int, int, int, bytes]]:
    """Draw entries of known tags and unknown ones, of the type that belongs to them or any other."""
    found = {}
    for tag in draw(st.lists(st.sampled_from(tags) | st.integers(50000, 65535), max_size=6)):
        kind = draw(st.integers(0, 14))
        size = SIZES.get(kind, 1)
        value = draw(st.text(max_size=12)).encode() + b"\0" if kind == 2 else draw(st.binary(max_size=24))
        value = value[: len(value) // size * size]
        count = len(value) // size
        if draw(st.integers(0, 9)) == 0:  # a count that leads out of the file
            count = draw(st.integers(0, 2**32 - 1))
        found[tag] = (tag, kind, count, value)
    if draw(st.integers(0, 4)) == 0:  # a directory that is none
        tag = draw(st.sampled_from(INNER_TAGS))
        found[tag] = (tag, draw(st.sampled_from((2, 3, 4, 13))), 1, struct.pack(order + "I", draw(st.integers(0, 400))))
    return list(found.values())


@st.composite
def _exif(draw: st.DrawFn, orientation: int) -> tuple[bytes, bytes]:
    order = draw(st.sampled_from("<>"))
    rows = draw(_rows(order, KNOWN_TAGS))
    if orientation != 1:
        rows.append((0x0112, 3, 1, struct.pack(order + "H", orientation)))
    elif draw(st.booleans()):  # an orientation of an odd type says nothing, or 1
        kind = draw(st.sampled_from((1, 2, 4, 5, 7, 9, 12)))
        rows.append(
            (0x0112, kind, 1, draw(st.sampled_from((bytes(8), struct.pack(order + "I", 1))))[: SIZES.get(kind, 1)])
        )
    preview = b""
    if draw(st.booleans()):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), "red").save(buffer, "JPEG")
        preview = buffer.getvalue()
    plain = _tiff(order, rows)
    return _tiff(order, rows, preview and _second(order, preview, len(plain))), plain


def _second(order: str, preview: bytes, at: int) -> bytes:
    rows = struct.pack(order + "HHHII", 2, 0x0201, 4, 1, at + 30) + struct.pack(
        order + "HHII", 0x0202, 4, 1, len(preview)
    )
    return rows + bytes(4) + preview


TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30)
KEYWORDS = st.from_regex(r"[A-Za-z][A-Za-z0-9 -]{0,20}[A-Za-z0-9]", fullmatch=True)
GARBAGE = st.binary(min_size=1, max_size=200)


@st.composite
def _said(draw: st.DrawFn) -> Said:
    said = Said(orientation=draw(st.integers(1, 8)))
    if said.orientation != 1 or draw(st.booleans()):
        said.exif, said.exif_plain = draw(_exif(said.orientation))
        said.exif_is_sound = said.orientation != 1  # one entry at least is whole
        if not said.exif_is_sound and draw(st.integers(0, 3)) == 0:
            said.exif = draw(GARBAGE)
    if draw(st.booleans()):
        said.xmp, said.xmp_is_sound = (FIT % (said.orientation, draw(TEXTS.map(_escaped)))).encode(), True
        if said.orientation == 1 and draw(st.integers(0, 2)) == 0:
            said.xmp, said.xmp_is_sound = draw(GARBAGE), False
    if draw(st.booleans()):
        text = draw(TEXTS).encode()
        said.iptc_is_sound = draw(st.booleans())
        said.iptc = b"\x1c\x02\x78" + struct.pack(">H", len(text)) + text if said.iptc_is_sound else draw(GARBAGE)
    if draw(st.booleans()):
        said.profile = draw(st.just(PROFILE) | GARBAGE)
    if draw(st.booleans()):
        said.comment = draw(st.binary(min_size=1, max_size=50))
    said.texts = draw(st.dictionaries(KEYWORDS, TEXTS, max_size=3))
    for kind in draw(
        st.lists(
            st.sampled_from(
                (b"tIME", b"bKGD", b"pHYs", b"gAMA", b"sRGB", b"prVt", b"prVT", b"tEXt", b"zTXt", b"hIST", b"cICP")
            ),
            max_size=3,
            unique=True,
        )
    ):
        said.chunks.append((kind, draw(GARBAGE)))
    return said


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def _encoded(image: Image.Image, format_: str, said: Said) -> bytes:
    """Return a file that says it; what the format has no place for is not in it."""
    buffer = io.BytesIO()
    if format_ in ("WEBP", "AVIF"):
        options = {"exif": said.exif, "xmp": said.xmp, "icc_profile": said.profile}
        options |= {"lossless": True, "exact": True} if format_ == "WEBP" else {"quality": 95, "subsampling": "4:4:4"}
        image.save(buffer, format_, **{key: value for key, value in options.items() if value})
        return buffer.getvalue()
    image.save(buffer, format_, **({"quality": 95, "subsampling": 0} if format_ == "JPEG" else {}))
    data = buffer.getvalue()
    if format_ == "PNG":
        extra = list(said.chunks)
        extra += [(b"eXIf", said.exif)] if said.exif else []
        extra += [(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + said.xmp)] if said.xmp else []
        extra += [(b"iCCP", b"profile\0\0" + zlib.compress(said.profile))] if said.profile else []
        extra += [(b"iTXt", key.encode() + bytes(5) + text.encode()) for key, text in said.texts.items()]
        hexadecimal = b"\niptc\n%8d\n" % len(said.iptc) + said.iptc.hex().encode() + b"\n"
        extra += [(b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(hexadecimal))] if said.iptc else []
        chunks = b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in extra
        )
        return data[:33] + chunks + data[33:]
    if format_ == "JPEG":
        blocks = [(0xE1, b"Exif\0\0" + said.exif)] if said.exif else []
        blocks += [(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + said.xmp)] if said.xmp else []
        resource = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(said.iptc)) + said.iptc + bytes(len(said.iptc) % 2)
        blocks += [(0xED, b"Photoshop 3.0\0" + resource)] if said.iptc else []
        blocks += [(0xE2, b"ICC_PROFILE\0\1\1" + said.profile)] if said.profile else []
        blocks += [(0xFE, said.comment)] if said.comment else []
        segments = b"".join(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in blocks)
        return data[:2] + segments + data[2:]
    if format_ == "TIFF":
        return _tiff_with(data, said)
    return data


def _tiff_with(data: bytes, said: Said) -> bytes:
    """Return Pillow's TIFF (little-endian, one directory) with what `said` has, in a directory at its end."""
    rows = {tag: (tag, kind, count, where) for tag, kind, count, where in _directory(data)}
    body = b""
    start = len(data) + len(data) % 2
    extra = [
        (700, 1, len(said.xmp), said.xmp),
        (33723, 7, len(said.iptc), said.iptc),
        (34675, 7, len(said.profile), said.profile),
    ]
    extra += [(274, 3, 1, struct.pack("<H", said.orientation))] if said.orientation != 1 else []
    if said.exif[:2] == b"II" and said.exif_is_sound:
        extra += [
            (tag, kind, count, said.exif[at : at + count] if kind == 2 else where)
            for tag, kind, count, where in _directory(said.exif)
            if tag in KEPT_IN_TIFF
            for at in struct.unpack("<I", where)
        ]
    for tag, kind, count, value in extra:
        if not value:
            continue
        where = value.ljust(4, b"\0")
        if len(value) > 4:
            where = struct.pack("<I", start + len(body))
            body += value + bytes(len(value) % 2)
        rows[tag] = (tag, kind, count, where)
    table = b"".join(struct.pack("<HHI", *row[:3]) + row[3] for row in sorted(rows.values()))
    at = start + len(body)
    return (
        data[:4]
        + struct.pack("<I", at)
        + data[8:].ljust(start - 8, b"\0")
        + body
        + struct.pack("<H", len(rows))
        + table
        + bytes(4)
    )


def _directory(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield the entries of a TIFF's first directory as they are written: tag, type, count and four bytes."""
    order = "<" if data[:2] == b"II" else ">"
    [at] = struct.unpack_from(order + "I", data, 4)
    for number in range(struct.unpack_from(order + "H", data, at)[0]):
        yield (*struct.unpack_from(order + "HHI", data, at + 2 + 12 * number), data[at + 10 + 12 * number :][:4])  # type: ignore[misc]


@st.composite
def _files(draw: st.DrawFn) -> tuple[str, str, str, tuple[int, int], Said]:
    """Draw a source's format and mode, a target's format, a size and what the file says."""
    source = draw(st.sampled_from(list(SUFFIXES)))
    mode = draw(st.sampled_from(MODES[source]))
    targets = [one for one in SUFFIXES if mode not in ("LA", "RGBA") or one in HOLDS_ALPHA]
    targets = [one for one in targets if mode != "I;16" or one in ("PNG", "TIFF", "JPEG", "WEBP")]
    size = draw(st.tuples(st.integers(2, 40), st.integers(2, 40)))
    return source, mode, draw(st.just(source) | st.sampled_from(targets)), size, draw(_said())


def _image(mode: str, size: tuple[int, int]) -> Image.Image:
    """Return smooth colours, different in every corner, in a mode of Pillow."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    levels = np.stack([x * 255 / width, y * 255 / height, (x + y) * 127 / (height + width) + 60], -1).astype(np.uint8)
    image = Image.fromarray(levels)
    if mode == "I;16":
        return Image.fromarray(levels[..., 0].astype(np.uint16) * 257 + levels[..., 1])
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(levels[..., 1] // 2 + 100))
        return image
    return image.quantize(64) if mode == "P" else image.convert(mode)


TURNS = {
    1: (0, False),
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (1, True),
    6: (3, False),
    7: (3, True),
    8: (1, False),
}


def _displayed(stored: np.ndarray, orientation: int) -> np.ndarray:
    """Return an array turned as EXIF 2.32, 4.6.4, says: mirrored from left to right, then turned."""
    quarters, mirrored = TURNS[orientation]
    return np.rot90(stored[:, ::-1] if mirrored else stored, quarters)


@contextlib.contextmanager
def _loaded(data: bytes) -> Iterator[Image.Image]:
    """Return what Pillow reads, without its warnings of odd values: they stay what they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            yield image


def _shown_by_pillow(data: bytes, mode: str) -> np.ndarray:
    with _loaded(data) as image:
        stored = np.asarray(image if mode == image.mode == "I;16" else image.convert("RGBA"))
        return _displayed(stored, image.getexif().get(274, 1))


def _shown_by_vips(image: Any) -> np.ndarray:
    """Return H,W,C with C of 1 or 3, without alpha."""
    pixels = np.atleast_3d(image.autorot().numpy())
    return pixels[..., : 1 if pixels.shape[2] < 3 else 3]


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture(scope="module")
def inpainter() -> Inpainter:
    return Inpainter("misf-small", backend="onnxruntime", threads=1)


@settings(
    max_examples=int(os.environ.get("MISF_EXAMPLES", "100")),
    deadline=None,
    database=None,
    derandomize="MISF_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(_files())
def test_whatever_a_file_says_it_is_filled_and_two_readers_agree(
    inpainter: Inpainter, tmp_path_factory: pytest.TempPathFactory, drawn: tuple[str, str, str, tuple[int, int], Said]
) -> None:
    source, mode, target, size, said = drawn
    note(f"{source} {mode} to {target}, {size}: {said}")
    folder = tmp_path_factory.mktemp("example", numbered=True)
    image = _image(mode, size)
    path, output, mask = folder / f"in{SUFFIXES[source]}", folder / f"out{SUFFIXES[target]}", folder / "hole.png"
    try:
        path.write_bytes(_encoded(image, source, said))
    except Exception:  # Pillow does not write this: nobody comes with such a file
        reject()
    orientation = said.orientation if source not in ("BMP", "GIF") else 1
    expected = _displayed(np.asarray(image if mode == "I;16" else image.convert("RGBA")), orientation)
    hole = np.zeros(expected.shape[:2], np.bool_)
    hole[: hole.shape[0] // 3 + 1, hole.shape[1] // 2 :] = True
    Image.fromarray(hole).save(mask)
    handler = _Warnings()
    logging.getLogger("misf").addHandler(handler)
    try:
        [job], _ = plan_jobs(path, mask, output)
        FileFiller(inpainter, mask, False, False).run(job)
    finally:
        logging.getLogger("misf").removeHandler(handler)
    data = output.read_bytes()
    assert sorted(one.name for one in folder.iterdir()) == sorted([path.name, output.name, mask.name])
    for text in handler.texts:
        assert path.name in text or text.startswith("the CMYK colour profile cannot be used")

    exact = target in LOSSLESS and source not in ("JPEG", "AVIF")
    shown = _shown_by_pillow(data, mode)
    assert shown.shape[:2] == hole.shape
    _agree(shown, expected, hole, exact, mode, target)
    if target != "BMP":  # libvips reads none
        seen = pyvips.Image.new_from_buffer(data, "").copy_memory()
        _agree(_shown_by_vips(seen), expected, hole, exact, mode, target)
        _says_the_same(seen, data, said, source, target, mode, handler.texts)


def _agree(shown: np.ndarray, expected: np.ndarray, hole: np.ndarray, exact: bool, mode: str, target: str) -> None:
    """Compare what is displayed outside the hole; a lossy format only has to show the picture the same way up."""
    assert shown.shape[:2] == hole.shape
    if mode == "CMYK" or (target == "GIF" and mode != "P") or (not exact and min(hole.shape) < 16):
        return  # colours of another space, other colours, and too few pixels to know the hole's from the others
    if mode == "I;16" and (target not in ("PNG", "TIFF") or shown.dtype != np.uint16):
        return
    channels = min(shown.shape[2], expected.shape[2]) if shown.ndim == expected.ndim == 3 else 1
    shown, expected = (np.atleast_3d(one)[..., :channels][~hole].astype(int) for one in (shown, expected))
    if mode != "I;16" and "A" in mode and not exact:
        shown, expected = shown[..., :3], expected[..., :3]
    difference = np.abs(shown - expected)
    assert difference.max() == 0 if exact else difference.mean() < 20


def _says_the_same(seen: Any, data: bytes, said: Said, source: str, target: str, mode: str, warned: list[str]) -> None:
    """Compare what libvips and Pillow find in the result with what was said."""
    with_exif = ("PNG", "JPEG", "WEBP")
    if source in with_exif and target in with_exif and said.exif_is_sound:
        assert seen.get("exif-data").removeprefix(b"Exif\0\0") == said.exif_plain
    if source not in ("BMP", "GIF") and target not in ("BMP", "GIF"):
        if said.xmp_is_sound:
            kept = said.xmp
            if target in ("TIFF", "AVIF") or source == "TIFF":  # stored upright
                kept = re.sub(rb'(Orientation=")\d', rb"\g<1>1", kept)
            assert kept in (seen.get("xmp-data") if seen.get_typeof("xmp-data") else data)
        if said.profile == PROFILE and mode in ("RGB", "RGBA", "P"):  # it is one of RGB
            assert seen.get("icc-profile-data") == PROFILE
    if source in ("PNG", "JPEG", "TIFF") and said.iptc_is_sound:
        if target in ("JPEG", "TIFF"):
            assert said.iptc in seen.get("iptc-data")
        elif target != "PNG":
            assert any("IPTC" in text for text in warned)
    with _loaded(data) as image:
        if source == "PNG" == target:
            assert {key: image.info.get(key) for key in said.texts} == said.texts
        if source == "PNG" != target:
            assert all(any(key in text for text in warned) for key in said.texts)
        if source == "JPEG" == target and said.comment:
            assert image.info["comment"] == said.comment
