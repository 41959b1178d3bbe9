"""What a file says about its picture, carried as the bytes that came: EXIF, XMP, IPTC, colour profile, PNG texts.

Nothing is decoded and encoded again: a value of an odd type stays the odd value that it is. Only two things change.
The orientation is set to what is true of the result, and previews are removed, since they show the unfilled picture.

Pillow writes EXIF by its own table of types, in ASCII; piexif (no release since 2019) does likewise; exifread only
reads; pyexiv2 brings Exiv2 as a binary, under the GPL. What is needed here is less than any of them: TIFF 6.0,
section 2, is a few pages.
"""

from __future__ import annotations

import logging
import re
import struct
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from . import png16

log = logging.getLogger(__name__)

ORIENTATION = 0x0112
EXIF_IFD, GPS_IFD, INTEROP_IFD = 0x8769, 0x8825, 0xA005
XMP_TAG, IPTC_TAG = 700, 33723
# What a TIFF says of its picture, not of its layout: title, make, model, software, date, artist, host, copyright, and
# Windows' title, comment, author, keywords and subject.
DESCRIPTIVE = (269, 270, 271, 272, 285, 305, 306, 315, 316, 33432, 0x9C9B, 0x9C9C, 0x9C9D, 0x9C9E, 0x9C9F)
POINTERS = (EXIF_IFD, GPS_IFD, INTEROP_IFD)
LONG = 4
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
SWAPPED = {5: 4, 10: 4}  # a rational is two numbers
SEGMENT = 65533  # bytes in a segment of a JPEG
UNPACKED = 64 << 20  # bytes that a compressed text or profile may become
XMP_KEY = b"XML:com.adobe.xmp"
# Kept beside what the PNG specification marks as safe to copy: they hold for the colours, which stay what they are.
COLOUR_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI", b"iCCP")
CHUNK_BYTES = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"cICP": 4, b"mDCV": 24, b"cLLI": 8, b"pHYs": 9}
KEY_BYTES = {0: range(2, 3), 2: range(6, 7), 3: range(1, 257)}  # of tRNS, by the PNG's colour type
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
DECODED_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"pHYs", b"eXIf")
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
_XMP_IMAGE_ATTRIBUTE = re.compile(rb"""([\w.-]+:image\s*=\s*)(?:"[^"<]*"|'[^'<]*')""")
_XMP_ORIENTATION = re.compile(rb"""(tiff:Orientation\s*(?:=\s*["']|>)\s*)(\d)""")


@dataclass
class Metadata:
    """What a file says about its picture; b"" for what it does not say."""

    exif: bytes = b""  # a TIFF structure: no "Exif\0\0" before it
    xmp: bytes = b""
    iptc: bytes = b""  # the records themselves (IIM)
    icc: bytes = b""
    chunks: list[tuple[bytes, bytes]] = field(default_factory=list)  # a PNG's own, texts among them

    @property
    def orientation(self) -> int:
        """That of EXIF, of XMP where EXIF has none; 1 where neither has one of 1 to 8."""
        entry = next((entry for entry in _entries(self.exif) if entry.tag == ORIENTATION), None)
        if entry is not None:
            number = int.from_bytes(entry.data, "little" if self.exif[:2] == b"II" else "big")
        else:
            match = _XMP_ORIENTATION.search(self.xmp)
            number = int(match[2]) if match else 1
        return number if 1 <= number <= 8 else 1

    def upright(self) -> Metadata:
        """Return the same of a picture that is stored as it is displayed."""
        return replace(self, exif=_turned(self.exif), xmp=_XMP_ORIENTATION.sub(rb"\g<1>1", self.xmp))


@dataclass(frozen=True)
class _Entry:
    """One entry of a TIFF directory; `inner`: the directory that it points to."""

    tag: int
    kind: int
    count: int
    data: bytes
    at: int = 0  # where the entry is in the file
    inner: tuple[_Entry, ...] | None = None


def read_metadata(name: str, image: Image.Image, data: bytes) -> Metadata:
    """Return what the file `data` says, opened as `image`, without previews; a warning names what cannot be kept."""
    if image.format == "PNG":
        found = _of_png(name, data)
    elif image.format == "TIFF":
        found = _of_tiff(data)
    else:
        exif, xmp = image.info.get("exif"), image.info.get("xmp")
        found = Metadata(exif if isinstance(exif, bytes) else b"", xmp if isinstance(xmp, bytes) else b"")
        found.iptc = b"".join(_iptc(body) for kind, body in getattr(image, "applist", []) if kind == "APP13")
    if image.format != "PNG":
        profile = image.info.get("icc_profile")
        found.icc = profile if isinstance(profile, bytes) else b""
    found.exif = found.exif.removeprefix(b"Exif\0\0")
    if found.exif and not _entries(found.exif):
        log.warning("%s: its EXIF data is damaged and left out", name)
        found.exif = b""
    found.exif = without_previews(found.exif)
    found.iptc = _iptc_without_previews(found.iptc)
    if found.xmp and not (cleaned := _xmp_without_previews(found.xmp)):
        log.warning("%s: its XMP is damaged and left out", name)
    found.xmp = cleaned if found.xmp else b""
    return found


def without_jpegs(data: bytes) -> bytes:
    """Return bytes of the same length with zeros in place of each JPEG in them."""
    changed = bytearray(data)
    for start, end in _jpegs(data):
        changed[start:end] = bytes(end - start)
    return bytes(changed)


def info_without_previews(info: dict[Any, Any]) -> dict[Any, Any]:
    """Return what Pillow's `info` of a picture says, less its previews."""
    kept: dict[Any, Any] = {}
    for key, value in info.items():
        if key == "exif" and isinstance(value, bytes):
            head = b"Exif\0\0" if value.startswith(b"Exif\0\0") else b""
            kept[key] = head + without_previews(value.removeprefix(head))
        elif key == "photoshop" and isinstance(value, dict):
            kept[key] = {kind: body for kind, body in value.items() if kind not in PHOTOSHOP_PREVIEWS}
        elif key == "xmp" and isinstance(value, bytes):
            kept[key] = _xmp_without_previews(value)
        elif key in ("comment", "iptc") and isinstance(value, bytes):
            kept[key] = without_jpegs(value)
        elif isinstance(value, str):
            if not str(key).startswith(RAW_PROFILE.decode()):
                text = value.encode("utf-8", "surrogateescape")
                clean = _xmp_without_previews(text) if key == XMP_KEY.decode() else _BASE64_PICTURE.sub(b"", text)
                kept[key] = value if clean == text else clean.decode("utf-8", "surrogateescape")
        else:
            kept[key] = value
    return kept


def png_for_decoder(data: bytes) -> bytes:
    """Return a PNG with what makes its pixels and, of EXIF, the orientation: no text can stop the decoder."""
    parts, position, colour = [png16.SIGNATURE], len(png16.SIGNATURE), data[25:26]
    for kind, body in png16.chunks(data):
        end = position + 12 + len(body)
        if kind == b"eXIf":
            orientation = Metadata(body).orientation
            exif = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, ORIENTATION, 3, 1, orientation, 0)
            parts.append(png16.chunk(kind, exif))
        elif not _is_sound(kind, body, colour):
            pass
        elif kind in DECODED_CHUNKS or kind in (b"acTL", b"fcTL", b"fdAT"):
            parts.append(data[position:end])  # with its checksum, so that damage shows
        position = end
    whole = data.endswith(b"IEND\xaeB`\x82")
    return b"".join(parts) if whole else data


def without_previews(exif: bytes) -> bytes:
    """Return EXIF without its second directory (the thumbnail) and without the JPEGs in it (makers' previews)."""
    if not _entries(exif):
        return exif
    order = _order(exif)
    changed = bytearray(without_jpegs(exif))
    first = struct.unpack_from(order + "I", exif, 4)[0]
    link = first + 2 + 12 * struct.unpack_from(order + "H", exif, first)[0]
    if link + 4 > len(exif):
        return bytes(changed)
    second = struct.unpack_from(order + "I", exif, link)[0]
    changed[link : link + 4] = bytes(4)
    entries = {entry.tag: entry for entry in _directory(exif, second)} if second else {}
    gone = [(second, second + 6 + 12 * len(entries))] if entries else []
    for start, length in ((0x0201, 0x0202), (0x0111, 0x0117)):
        if start in entries and length in entries:
            starts, lengths = _numbers(entries[start], order), _numbers(entries[length], order)
            gone += [(at, at + size) for at, size in zip(starts, lengths, strict=False)]
    for start, end in sorted(gone, reverse=True):
        if start < 8 or (start < link + 4 and end > first):
            continue  # a damaged file's second directory lies over the first one
        if end >= len(changed):
            del changed[start:]
        else:
            changed[start:end] = bytes(end - start)
    return bytes(changed)


def without_orientation(exif: bytes) -> bytes:
    """Return EXIF without the entry of the orientation: for AVIF, which holds it elsewhere."""
    entry = next((entry for entry in _entries(exif) if entry.tag == ORIENTATION), None)
    if entry is None:
        return exif
    order = "<" if exif[:2] == b"II" else ">"
    first = struct.unpack_from(order + "I", exif, 4)[0]
    count = struct.unpack_from(order + "H", exif, first)[0]
    end = first + 2 + 12 * count + 4
    rest = exif[entry.at + 12 : end] + bytes(12)
    changed = exif[: entry.at] + rest + exif[end:]
    return changed[:first] + struct.pack(order + "H", count - 1) + changed[first + 2 :]


def add_to_jpeg(name: str, encoded: bytes, metadata: Metadata) -> bytes:
    """Return a JPEG with EXIF, XMP and IPTC; what does not fit into a segment is left out with a warning."""
    exif = [metadata.exif[at : at + SEGMENT - 6] for at in range(0, len(metadata.exif), SEGMENT - 6)]
    xmp = metadata.xmp
    if len(xmp) > SEGMENT - 29:
        xmp = re.sub(rb"\s{2,}", b"\n", xmp)  # the packet's padding
    iptc = metadata.iptc
    resource = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc + bytes(len(iptc) % 2)
    blocks = [(0xE1, b"Exif\0\0" + part) for part in exif]
    blocks += [(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)] if xmp else []
    blocks += [(0xED, b"Photoshop 3.0\0" + resource)] if iptc else []
    segments = b""
    for marker, body in blocks:
        if len(body) > SEGMENT:
            log.warning("%s: %s does not fit into a JPEG and is left out", name, "XMP" if marker == 0xE1 else "IPTC")
            continue
        segments += struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
    start = 4 + struct.unpack_from(">H", encoded, 4)[0] if encoded[2:4] == b"\xff\xe0" else 2
    return encoded[:start] + segments + encoded[start:]


def png_chunks(metadata: Metadata, same: bool) -> list[tuple[bytes, bytes]]:
    """Return the chunks for a PNG: `same` for one that was a PNG before, whose profile is among its own."""
    kept = list(metadata.chunks)
    if metadata.icc and not same:
        kept.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata.icc)))
    if metadata.exif:
        kept.append((b"eXIf", metadata.exif))
    if metadata.xmp:
        kept.append((b"iTXt", XMP_KEY + bytes(5) + metadata.xmp))
    if metadata.iptc:
        text = (
            b"\niptc\n%8d\n" % len(metadata.iptc) + re.sub(rb"(.{72})", rb"\1\n", metadata.iptc.hex().encode()) + b"\n"
        )
        kept.append((b"zTXt", RAW_PROFILE + b"iptc\0\0" + zlib.compress(text)))
    return kept


def add_to_png(encoded: bytes, extra: list[tuple[bytes, bytes]]) -> bytes:
    """Return a PNG with further chunks after its header, in place of those of the same kind that Pillow wrote."""
    kinds = {kind for kind, _ in extra} - set(TEXT_CHUNKS)
    parts = [png16.SIGNATURE]
    for kind, body in png16.chunks(encoded):
        if kind not in kinds:
            parts.append(png16.chunk(kind, body))
        if kind == b"IHDR":
            parts += [png16.chunk(*one) for one in extra]
    return b"".join(parts)


def add_to_tiff(encoded: bytes, metadata: Metadata) -> bytes:
    """Return a TIFF with the descriptive tags of EXIF, its inner directories, XMP and IPTC."""
    order = "<" if encoded[:2] == b"II" else ">"
    source = "<" if metadata.exif[:2] == b"II" else ">"
    added = [entry for entry in _entries(metadata.exif) if entry.tag in DESCRIPTIVE or entry.tag in POINTERS]
    if source != order:
        added = [_other_order(entry) for entry in added]
    for tag, data in ((XMP_TAG, metadata.xmp), (IPTC_TAG, metadata.iptc)):
        added += [_Entry(tag, 1 if tag == XMP_TAG else 7, len(data), data)] if data else []
    if not added:
        return encoded
    tags = {entry.tag for entry in added}
    entries = [entry for entry in _entries(encoded) if entry.tag not in tags] + added
    encoded += bytes(len(encoded) % 2)
    directory = _directory_bytes(entries, order, len(encoded))
    return encoded[:4] + struct.pack(order + "I", len(encoded)) + encoded[8:] + directory


def _of_png(name: str, data: bytes) -> Metadata:
    found = Metadata()
    for kind, body in png16.chunks(data):
        key = body.split(b"\0", 1)[0]
        if not _is_sound(kind, body, data[25:26]):
            log.warning("%s: its chunk %s is damaged and left out", name, kind.decode("latin-1"))
        elif kind == b"eXIf":
            found.exif = body
        elif kind == b"iTXt" and key == XMP_KEY:
            found.xmp = _itxt(body)
        elif kind in TEXT_CHUNKS and key.startswith(RAW_PROFILE):
            what, profile = key.removeprefix(RAW_PROFILE), _raw_profile(kind, body)
            if what in (b"exif", b"APP1") and profile.startswith(b"Exif\0\0"):
                found.exif = found.exif or profile
            elif what == b"xmp":
                found.xmp = found.xmp or profile
            elif what in (b"iptc", b"8bim"):
                found.iptc = found.iptc or _iptc(profile)
            else:
                log.warning("%s: its %s is left out", name, key.decode("latin-1"))
        elif kind in TEXT_CHUNKS:
            found.chunks.append((kind, _text_without_previews(kind, body)))
        elif kind in COLOUR_CHUNKS or (kind[0] & 32 and kind[3] & 32 and kind not in DECODED_CHUNKS):
            if kind not in COLOUR_CHUNKS and _jpegs(body):
                log.warning("%s: its chunk %s holds a picture and is left out", name, kind.decode("latin-1"))
                continue
            found.chunks.append((kind, body))
            if kind == b"iCCP":
                found.icc = _inflated(body[len(key) + 2 :])
    return found


def _is_sound(kind: bytes, body: bytes, colour: bytes) -> bool:
    """Return whether a PNG's chunk beside its pixels has the length of its kind, or can be unpacked."""
    if kind == b"tRNS":
        return len(body) in KEY_BYTES.get(int.from_bytes(colour, "big"), ())
    if kind in (b"zTXt", b"iCCP"):
        _, found, rest = body.partition(b"\0")
        return bool(found) and rest[:1] == b"\0" and (_inflated(rest[1:]) != b"" or rest[1:] == zlib.compress(b""))
    return kind not in CHUNK_BYTES or len(body) == CHUNK_BYTES[kind]


def _of_tiff(data: bytes) -> Metadata:
    found = Metadata()
    kept = []
    for entry in _entries(data):
        if entry.tag == XMP_TAG:
            found.xmp = entry.data
        elif entry.tag == IPTC_TAG:
            found.iptc = entry.data
        elif entry.tag in DESCRIPTIVE or entry.tag in POINTERS:
            kept.append(entry)
    if kept:
        order = "<" if data[:2] == b"II" else ">"
        found.exif = data[:2] + struct.pack(order + "HI", 42, 8) + _directory_bytes(kept, order, 8)
    return found


def _iptc(block: bytes) -> bytes:
    """Return the IPTC records among Photoshop's resources; a block that is none of those is records already."""
    block = block.removeprefix(b"Photoshop 3.0\0")
    if not block.startswith(b"8BIM"):
        return block if block.startswith(b"\x1c") else b""
    position = 0
    while block[position : position + 4] == b"8BIM" and position + 12 <= len(block):
        kind = int.from_bytes(block[position + 4 : position + 6], "big")
        start = position + 6 + (block[position + 6] + 2) // 2 * 2
        length = int.from_bytes(block[start : start + 4], "big")
        if kind == 0x0404:
            return block[start + 4 : start + 4 + length]
        position = start + 4 + length + length % 2
    return b""


def _iptc_without_previews(iptc: bytes) -> bytes:
    """Return IPTC records less those of a preview (IIM 4.2, 1.5: marker, record, data set, length, data)."""
    kept, position = b"", 0
    while iptc[position : position + 1] == b"\x1c" and position + 5 <= len(iptc):
        start, length = position + 5, int.from_bytes(iptc[position + 3 : position + 5], "big")
        if length & 0x8000:  # the length of the length
            start, size = start + (length & 0x7FFF), length & 0x7FFF
            length = int.from_bytes(iptc[start - size : start], "big") if size <= 4 else len(iptc)
        kind = (iptc[position + 1], iptc[position + 2])
        if kind not in IPTC_PREVIEWS and kind[0] not in IPTC_OBJECT:
            kept += iptc[position : start + length]
        position = start + length
    return without_jpegs(kept + iptc[position:])


def _xmp_without_previews(xmp: bytes) -> bytes:
    """Return XMP in UTF-8 less the pictures in it; b"" where its letters cannot be read."""
    wide = next((name for start, name in WIDE_LETTERS if xmp.startswith(start)), None)
    if wide:
        try:
            xmp = xmp.decode(wide).encode()
        except UnicodeError:
            return b""
    xmp = _XMP_IMAGE_ATTRIBUTE.sub(rb'\1""', _XMP_IMAGE.sub(rb"\1\3", xmp))
    return _BASE64_PICTURE.sub(b"", xmp)


def _text_without_previews(kind: bytes, body: bytes) -> bytes:
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
        text = _inflated(text)
    cleaned = _BASE64_PICTURE.sub(b"", without_jpegs(text))
    if cleaned == text:
        return body
    return key + b"\0" + head + (zlib.compress(cleaned) if packed and kind != b"tEXt" else cleaned)


def _jpegs(data: bytes) -> list[tuple[int, int]]:
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


def _inflated(data: bytes) -> bytes:
    """Return what zlib compressed, b"" where it is damaged or longer than any text or profile."""
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(data, UNPACKED)
    except zlib.error:
        return b""
    return text if inflater.eof else b""


def _itxt(body: bytes) -> bytes:
    _, _, rest = body.partition(b"\0")
    parts = rest[2:].split(b"\0", 2)
    text = parts[2] if len(parts) == 3 else b""
    return _inflated(text) if rest[:1] == b"\1" else text


def _raw_profile(kind: bytes, body: bytes) -> bytes:
    """Return ImageMagick's profile in a text: a name, a length and hexadecimal digits."""
    _, _, rest = body.partition(b"\0")
    text = _itxt(body) if kind == b"iTXt" else _inflated(rest[1:]) if kind == b"zTXt" else rest
    try:
        return bytes.fromhex(b"".join(text.split()[2:]).decode("ascii"))
    except ValueError:
        return b""


def _turned(exif: bytes) -> bytes:
    """Return EXIF whose orientation is 1, where it has one."""
    entry = next((entry for entry in _entries(exif) if entry.tag == ORIENTATION), None)
    if entry is None:
        return exif
    value = struct.pack(("<" if exif[:2] == b"II" else ">") + "HHIHH", ORIENTATION, 3, 1, 1, 0)
    return exif[: entry.at] + value + exif[entry.at + 12 :]


def _entries(tiff: bytes) -> list[_Entry]:
    """Return the entries of the first directory; none where the bytes are no TIFF structure."""
    if tiff[:4] in (b"II*\0", b"MM\0*"):
        return _directory(tiff, struct.unpack_from(_order(tiff) + "I", tiff.ljust(8, b"\0"), 4)[0])
    if tiff[:4] in (b"II+\0", b"MM\0+"):
        return _directory(tiff, struct.unpack_from(_order(tiff) + "Q", tiff.ljust(16, b"\0"), 8)[0])
    return []


def _order(tiff: bytes) -> str:
    return "<" if tiff[:2] == b"II" else ">"


def _directory(tiff: bytes, offset: int, depth: int = 0) -> list[_Entry]:
    """Return the entries of one directory, with those that it points to; what lies outside the bytes is left out.

    Damage can make every entry point at one place, a directory among them: of a tag the first entry counts, and all
    values together are no longer than the bytes.
    """
    order, big = _order(tiff), 43 in tiff[2:4]
    head, row, value = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
    size = struct.calcsize(order + head)
    if offset + size > len(tiff):
        return []
    found: list[_Entry] = []
    tags: set[int] = set()
    left = len(tiff)
    step = struct.calcsize(order + row) + value
    for number in range(min(struct.unpack_from(order + head, tiff, offset)[0], 65535)):
        at = offset + size + number * step
        if at + step > len(tiff):
            break
        tag, kind, count = struct.unpack_from(order + row, tiff, at)
        length = SIZES.get(kind, 1) * count
        start = at + step - value
        if length > value:
            start = struct.unpack_from(order + ("Q" if big else "I"), tiff, start)[0]
        if start + length > len(tiff) or length > left or tag in tags:
            continue
        tags.add(tag)
        left -= length
        data = tiff[start : start + length]
        inner = None
        if tag in POINTERS and depth < 2 and kind in (4, 13, 16, 18) and count == 1:
            inner = tuple(_directory(tiff, _numbers(_Entry(tag, kind, count, data), order)[0], depth + 1))
        if kind not in (16, 17, 18) or inner is not None:
            found.append(_Entry(tag, kind, count, data, at, inner))
    return found


def _numbers(entry: _Entry, order: str) -> list[int]:
    size = SIZES.get(entry.kind, 1)
    step = "little" if order == "<" else "big"
    return [int.from_bytes(entry.data[at : at + size], step) for at in range(0, len(entry.data), size)]  # type: ignore[arg-type]


def _directory_bytes(entries: Any, order: str, start: int) -> bytes:
    """Return a directory that begins at offset `start`, its values and what it points to after it."""
    rows, body = b"", b""
    after = start + 2 + 12 * len(entries) + 4
    for entry in sorted(entries, key=lambda entry: entry.tag):
        kind, count, value = entry.kind, entry.count, entry.data.ljust(4, b"\0")
        if entry.inner is not None:
            kind, count, value = LONG, 1, struct.pack(order + "I", after + len(body))
            body += _directory_bytes(entry.inner, order, after + len(body))
        elif len(entry.data) > 4:
            value = struct.pack(order + "I", after + len(body))
            body += entry.data
        body += bytes(len(body) % 2)
        rows += struct.pack(order + "HHI", entry.tag, kind, count) + value
    return struct.pack(order + "H", len(entries)) + rows + bytes(4) + body


def _other_order(entry: _Entry) -> _Entry:
    if entry.inner is not None:
        return replace(entry, inner=tuple(_other_order(one) for one in entry.inner))
    size = SWAPPED.get(entry.kind, SIZES.get(entry.kind, 1))
    data = b"".join(entry.data[at : at + size][::-1] for at in range(0, len(entry.data), size))
    return replace(entry, data=data)
