"""Where files hide previews of a picture, and how they are removed: they would show what was filled.

In EXIF's second directory and makers' notes, in XMP, IPTC and Photoshop's resources, in texts and comments.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from .tiff import Entry, directory_at, entries_of, numbers_of, order_of

UNPACKED = 64 << 20  # bytes that a compressed text or profile may become
XMP_KEY = b"XML:com.adobe.xmp"
RAW_PROFILE = b"Raw profile type "
IPTC_PREVIEWS = ((2, 200), (2, 201), (2, 202))  # its format, its version, itself
IPTC_OBJECT = (7, 8, 9)  # the records that hold the picture itself
PHOTOSHOP_PREVIEWS = (1033, 1036)
# How XMP that is not in UTF-8 begins: a mark of the order of bytes, or "<".
WIDE_LETTERS = (
    *((mark.encode(name), name) for name in ("utf-32-le", "utf-32-be") for mark in "\ufeff<"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"<\0", "utf-16-le"),
    (b"\0<", "utf-16-be"),
)
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# The first bytes of a JPEG, a PNG and a WebP.
_BASE64_PICTURE = re.compile(rb"(?:/9j/|iVBORw0KGgo|UklGR)(?:[A-Za-z0-9+/=\s]|&#x[AaDd];){64,}")
_XMP_IMAGE = re.compile(rb"""(<([\w.-]+:image)(?:\s[^<>]*)?>)[^<]*(</\2\s*>)""")
_XMP_IMAGE_ATTRIBUTE = re.compile(rb"""((?<![\w.-])[\w.-]+:image\s*=\s*)(?:"[^"<]*"|'[^'<]*')""")


def exif_without_previews(exif: bytes) -> bytes:
    """Return EXIF without its second directory (the thumbnail) and without the JPEGs in it (makers' previews)."""
    if not entries_of(exif):
        return exif
    order = order_of(exif)
    changed = bytearray(without_jpegs(exif))
    # What looks like a damaged JPEG's beginning, and has a JPEG's end after it, may lie in a value of numbers.
    for start, end, is_value in _parts(entries_of(exif), order, exif):
        changed[start:end] = without_jpegs(exif[start:end]) if is_value else exif[start:end]
    first = struct.unpack_from(order + "I", exif, 4)[0]
    link = first + 2 + 12 * struct.unpack_from(order + "H", exif, first)[0]
    if link + 4 > len(exif):
        return bytes(changed)
    second = struct.unpack_from(order + "I", exif, link)[0]
    changed[link : link + 4] = bytes(4)
    entries = {entry.tag: entry for entry in directory_at(exif, second)} if second else {}
    gone = [(second, second + 6 + 12 * len(entries))] if entries else []
    for start, length in ((0x0201, 0x0202), (0x0111, 0x0117)):
        if start in entries and length in entries:
            starts, lengths = numbers_of(entries[start], order), numbers_of(entries[length], order)
            gone += [(at, at + size) for at, size in zip(starts, lengths, strict=False)]
    for start, end in sorted(gone, reverse=True):
        if start < 8 or (start < link + 4 and end > first):
            continue  # a damaged file's second directory lies over the first one
        if end >= len(changed):
            del changed[start:]
        else:
            changed[start:end] = bytes(end - start)
    return bytes(changed)


def _parts(entries: Iterable[Entry], order: str, exif: bytes) -> Iterator[tuple[int, int, bool]]:
    """Return where EXIF's entries, and their values that are elsewhere, begin and end, and which of the two it is."""
    for entry in entries:
        yield entry.at - 2, entry.at + 12, False  # the number of entries is before the first
        if len(entry.data) > 4:
            start = struct.unpack_from(order + "I", exif, entry.at + 8)[0]
            yield start, start + len(entry.data), True
        yield from _parts(entry.inner or (), order, exif)


def info_without_previews(info: dict[Any, Any]) -> dict[Any, Any]:
    """Return what Pillow's `info` of a picture says, less its previews."""
    kept: dict[Any, Any] = {}
    for key, value in info.items():
        if key == "exif" and isinstance(value, bytes):
            head = b"Exif\0\0" if value.startswith(b"Exif\0\0") else b""
            kept[key] = head + exif_without_previews(value.removeprefix(head))
        elif key == "photoshop" and isinstance(value, dict):
            kept[key] = {kind: body for kind, body in value.items() if kind not in PHOTOSHOP_PREVIEWS}
        elif key == "xmp" and isinstance(value, bytes):
            kept[key] = xmp_without_previews(value)
        elif key in ("comment", "iptc") and isinstance(value, bytes):
            kept[key] = without_jpegs(value)
        elif isinstance(value, str):
            if not str(key).startswith(RAW_PROFILE.decode()):
                text = value.encode("utf-8", "surrogateescape")
                clean = xmp_without_previews(text) if key == XMP_KEY.decode() else _BASE64_PICTURE.sub(b"", text)
                kept[key] = value if clean == text else clean.decode("utf-8", "surrogateescape")
        else:
            kept[key] = value
    return kept


def iptc_without_previews(iptc: bytes) -> bytes:
    """Return IPTC records less those of a preview (IIM 4.2, 1.5: marker, record, data set, length, data)."""
    kept, position = [], 0
    while iptc[position : position + 1] == b"\x1c" and position + 5 <= len(iptc):
        start, length = position + 5, int.from_bytes(iptc[position + 3 : position + 5], "big")
        if length & 0x8000:  # the length of the length
            start, size = start + (length & 0x7FFF), length & 0x7FFF
            length = int.from_bytes(iptc[start - size : start], "big") if size <= 4 else len(iptc)
        kind = (iptc[position + 1], iptc[position + 2])
        if kind not in IPTC_PREVIEWS and kind[0] not in IPTC_OBJECT:
            kept.append(iptc[position : start + length])
        position = start + length
    return without_jpegs(b"".join(kept) + iptc[position:])


def xmp_without_previews(xmp: bytes) -> bytes:
    """Return XMP in UTF-8 less the pictures in it; b"" where its letters cannot be read."""
    wide = next((name for start, name in WIDE_LETTERS if xmp.startswith(start)), None)
    if wide:
        try:
            xmp = xmp.decode(wide).encode()
        except UnicodeError:
            return b""
    xmp = _XMP_IMAGE_ATTRIBUTE.sub(rb'\1""', _XMP_IMAGE.sub(rb"\1\3", xmp))
    return _BASE64_PICTURE.sub(b"", xmp)


def text_without_previews(kind: bytes, body: bytes) -> bytes:
    """Return the body of a PNG's text; the same bytes where no picture is in it."""
    key, _, rest = body.partition(b"\0")
    packed = kind == b"zTXt" or rest[:1] == b"\1"
    head = {b"tEXt": b"", b"zTXt": rest[:1]}.get(kind, b"")
    text = rest[len(head) :]
    if kind == b"iTXt":
        parts = rest[2:].split(b"\0", 2)
        if len(parts) < 3:
            return body
        text = parts[2]
        head = rest[: len(rest) - len(text)]
    if packed and kind != b"tEXt":
        text = inflated(text)
    cleaned = _BASE64_PICTURE.sub(b"", without_jpegs(text))
    if cleaned == text:
        return body
    return key + b"\0" + head + (zlib.compress(cleaned) if packed and kind != b"tEXt" else cleaned)


def without_jpegs(data: bytes) -> bytes:
    """Return bytes of the same length with zeros in place of each JPEG in them."""
    changed = bytearray(data)
    for start, end in jpegs_in(data):
        changed[start:end] = bytes(end - start)
    return bytes(changed)


def jpegs_in(data: bytes) -> list[tuple[int, int]]:
    """Return where the JPEGs in `data` begin and end; one within another is part of it."""
    found, start = [], data.find(b"\xff\xd8\xff")
    last = data.rfind(b"\xff\xd9")
    while start >= 0:
        end, whole = _jpeg_end(data, start)
        if not whole and start < last:  # a damaged one, up to the next end there is
            end = (data.find(b"\xff\xd9", end) if end <= last else last) + 2
            whole = True
        if whole:
            found.append((start, end))
        start = data.find(b"\xff\xd8\xff", max(end, start + 3))
    return found


def _jpeg_end(data: bytes, start: int) -> tuple[int, bool]:
    """Return where a JPEG that begins at `start` ends (a cut one: with the data), and True; or where it is none."""
    position, scanned = start + 2, False
    while position + 4 <= len(data) and data[position] == 0xFF:
        kind = data[position + 1]
        if kind == 0xD9:
            return position + 2, True
        if kind == 0xFF or kind == 0x01 or 0xD0 <= kind <= 0xD7:
            position += 1 if kind == 0xFF else 2
            continue
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if kind == 0xDA:
            scanned = True
            following = _AFTER_SCAN.search(data, position)
            if following is None:
                return len(data), True
            position = following.start()
    if data[position : position + 2] == b"\xff\xd9":
        return position + 2, True
    return (len(data), True) if scanned and position + 4 > len(data) else (min(position, len(data)), False)


def inflated(data: bytes) -> bytes:
    """Return what zlib compressed, b"" where it is damaged or longer than any text or profile."""
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(data, UNPACKED)
    except zlib.error:
        return b""
    return text if inflater.eof else b""
