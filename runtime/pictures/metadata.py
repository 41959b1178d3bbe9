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
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from PIL import Image

from . import png16
from .previews import (
    RAW_PROFILE,
    XMP_KEY,
    exif_without_previews,
    inflated,
    iptc_without_previews,
    jpegs_in,
    text_without_previews,
    xmp_without_previews,
)
from .tiff import (
    ORIENTATION,
    POINTERS,
    Entry,
    directory_bytes,
    entries_of,
    in_other_order,
    numbers_of,
    order_of,
    turned_upright,
)

log = logging.getLogger(__name__)

XMP_TAG, IPTC_TAG = 700, 33723
# What a TIFF says of its picture, not of its layout: title, make, model, software, date, artist, host, copyright, and
# Windows' title, comment, author, keywords and subject.
DESCRIPTIVE = (269, 270, 271, 272, 285, 305, 306, 315, 316, 33432, 0x9C9B, 0x9C9C, 0x9C9D, 0x9C9E, 0x9C9F)
GEOGRAPHIC = (33550, 33922, 34264, 34735, 34736, 34737)  # GeoTIFF 1.1
EXTENDED_XMP = b"http://ns.adobe.com/xmp/extension/\0"
IPTC_RESOURCE = 0x0404
# IPTC and its digest, which would no longer hold; thumbnails; EXIF and XMP, which are carried by themselves.
LEFT_RESOURCES = (IPTC_RESOURCE, 0x0425, 0x0409, 0x040C, 0x0422, 0x0423, 0x0424)
SEGMENT = 65533  # bytes in a segment of a JPEG
# Kept beside what the PNG specification marks as safe to copy: they hold for the colours, which stay what they are.
COLOUR_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI", b"iCCP")
CHUNK_BYTES = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"cICP": 4, b"mDCV": 24, b"cLLI": 8, b"pHYs": 9}
KEY_BYTES = {0: range(2, 3), 2: range(6, 7), 3: range(1, 257)}  # of tRNS, by the PNG's colour type
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
DECODED_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"pHYs", b"eXIf")
_XMP_ORIENTATION = re.compile(rb"""(tiff:Orientation\s*(?:=\s*["']|>)\s*)(\d)""")


@dataclass
class Metadata:
    """What a file says about its picture; b"" for what it does not say."""

    exif: bytes = b""  # a TIFF structure: no "Exif\0\0" before it
    xmp: bytes = b""
    iptc: bytes = b""  # the records themselves (IIM)
    icc: bytes = b""
    resources: bytes = b""  # Photoshop's, of a JPEG, besides IPTC and previews
    chunks: list[tuple[bytes, bytes]] = field(default_factory=list)  # a PNG's own, texts among them
    left_out: list[str] = field(default_factory=list)  # a sentence each, after the file's name

    @property
    def orientation(self) -> int:
        """That of EXIF, of XMP where EXIF has none; 1 where neither has one of 1 to 8."""
        entry = next((entry for entry in entries_of(self.exif) if entry.tag == ORIENTATION), None)
        if entry is not None:
            [number, *_] = numbers_of(entry, order_of(self.exif)) or [1]
        else:
            match = _XMP_ORIENTATION.search(self.xmp)
            number = int(match[2]) if match else 1
        return number if 1 <= number <= 8 else 1

    def upright(self) -> Metadata:
        """Return the same of a picture that is stored as it is displayed."""
        return replace(self, exif=turned_upright(self.exif), xmp=_XMP_ORIENTATION.sub(rb"\g<1>1", self.xmp))


def read_metadata(image: Image.Image, data: bytes) -> Metadata:
    """Return what the file `data` says, opened as `image`, without previews."""
    if image.format == "PNG":
        found = _of_png(data)
    elif image.format == "TIFF":
        found = _of_tiff(data)
    else:
        exif, xmp = image.info.get("exif"), image.info.get("xmp")
        found = Metadata(exif if isinstance(exif, bytes) else b"", xmp if isinstance(xmp, bytes) else b"")
        applications = getattr(image, "applist", [])
        found.iptc = b"".join(_iptc(body) for kind, body in applications if kind == "APP13")
        found.resources = b"".join(_other_resources(body) for kind, body in applications if kind == "APP13")
        if any(kind == "APP1" and body.startswith(EXTENDED_XMP) for kind, body in applications):
            found.left_out.append("its extended XMP is left out")
    if image.format != "PNG":
        profile = image.info.get("icc_profile")
        found.icc = profile if isinstance(profile, bytes) else b""
    found.exif = found.exif.removeprefix(b"Exif\0\0")
    if found.exif and not entries_of(found.exif):
        found.left_out.append("its EXIF data is damaged and left out")
        found.exif = b""
    found.exif = exif_without_previews(found.exif)
    found.iptc = iptc_without_previews(found.iptc)
    if found.xmp and not (cleaned := xmp_without_previews(found.xmp)):
        found.left_out.append("its XMP is damaged and left out")
    found.xmp = cleaned if found.xmp else b""
    return found


def png_for_decoder(data: bytes) -> bytes:
    """Return a PNG with what makes its pixels and, of EXIF, the orientation: no text can stop the decoder."""
    parts, position, colour, kind = [png16.SIGNATURE], len(png16.SIGNATURE), data[25:26], b""
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
    return b"".join(parts) if kind == b"IEND" else data


def add_to_jpeg(name: str, encoded: bytes, metadata: Metadata) -> bytes:
    """Return a JPEG with EXIF, XMP and IPTC; what does not fit into a segment is left out with a warning."""
    exif = [metadata.exif[at : at + SEGMENT - 6] for at in range(0, len(metadata.exif), SEGMENT - 6)]
    xmp = metadata.xmp
    if len(xmp) > SEGMENT - 29:
        xmp = re.sub(rb"\s{2,}", b"\n", xmp)  # the packet's padding
    iptc = metadata.iptc
    resource = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc + bytes(len(iptc) % 2) if iptc else b""
    resource += metadata.resources
    blocks = [(0xE1, b"Exif\0\0" + part) for part in exif]
    blocks += [(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)] if xmp else []
    blocks += [(0xED, b"Photoshop 3.0\0" + resource)] if resource else []
    segments = b""
    for marker, body in blocks:
        if len(body) > SEGMENT:
            log.warning(
                "%s: %s does not fit into a JPEG and is left out",
                name,
                "XMP" if marker == 0xE1 else "IPTC, with Photoshop's resources,",
            )
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
    order = order_of(encoded)
    source = order_of(metadata.exif)
    added = [entry for entry in entries_of(metadata.exif) if entry.tag in DESCRIPTIVE or entry.tag in POINTERS]
    if source != order:
        added = [in_other_order(entry) for entry in added]
    for tag, data in ((XMP_TAG, metadata.xmp), (IPTC_TAG, metadata.iptc)):
        added += [Entry(tag, 1 if tag == XMP_TAG else 7, len(data), data)] if data else []
    if not added:
        return encoded
    tags = {entry.tag for entry in added}
    entries = [entry for entry in entries_of(encoded) if entry.tag not in tags] + added
    encoded += bytes(len(encoded) % 2)
    directory = directory_bytes(entries, order, len(encoded))
    return encoded[:4] + struct.pack(order + "I", len(encoded)) + encoded[8:] + directory


def _of_png(data: bytes) -> Metadata:
    found = Metadata()
    for kind, body in png16.chunks(data):
        key = body.split(b"\0", 1)[0]
        if not _is_sound(kind, body, data[25:26]):
            found.left_out.append(f"its chunk {kind.decode()} is damaged and left out")
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
                found.left_out.append(f"its {key.decode('latin-1')} is left out")
        elif kind in TEXT_CHUNKS:
            found.chunks.append((kind, text_without_previews(kind, body)))
        elif kind in COLOUR_CHUNKS or (kind[0] & 32 and kind[3] & 32 and kind not in DECODED_CHUNKS):
            if kind not in COLOUR_CHUNKS and jpegs_in(body):
                found.left_out.append(f"its chunk {kind.decode()} holds a picture and is left out")
                continue
            found.chunks.append((kind, body))
            if kind == b"iCCP":
                found.icc = inflated(body[len(key) + 2 :])
    return found


def _is_sound(kind: bytes, body: bytes, colour: bytes) -> bool:
    """Return whether a PNG's chunk beside its pixels has the length of its kind, or can be unpacked."""
    if kind == b"tRNS":
        return len(body) in KEY_BYTES.get(int.from_bytes(colour, "big"), ())
    if kind in (b"zTXt", b"iCCP"):
        _, found, rest = body.partition(b"\0")
        return bool(found) and rest[:1] == b"\0" and (inflated(rest[1:]) != b"" or rest[1:] == zlib.compress(b""))
    return kind not in CHUNK_BYTES or len(body) == CHUNK_BYTES[kind]


def _of_tiff(data: bytes) -> Metadata:
    found = Metadata()
    kept = []
    for entry in entries_of(data):
        if entry.tag == XMP_TAG:
            found.xmp = entry.data
        elif entry.tag == IPTC_TAG:
            found.iptc = entry.data
        elif entry.tag in DESCRIPTIVE or entry.tag in POINTERS:
            kept.append(entry)
        elif entry.tag in GEOGRAPHIC and not found.left_out:
            found.left_out.append("its place on the map (GeoTIFF) is left out")
    if kept:
        order = order_of(data)
        found.exif = data[:2] + struct.pack(order + "HI", 42, 8) + directory_bytes(kept, order, 8)
    return found


def _iptc(block: bytes) -> bytes:
    """Return the IPTC records among Photoshop's resources; a block that is none of those is records already."""
    block = block.removeprefix(b"Photoshop 3.0\0")
    if not block.startswith(b"8BIM"):
        return block if block.startswith(b"\x1c") else b""
    return next((body for kind, body, _ in _resources(block) if kind == IPTC_RESOURCE), b"")


def _other_resources(block: bytes) -> bytes:
    """Return Photoshop's resources as they came, without IPTC, what describes it or EXIF, and pictures."""
    block = block.removeprefix(b"Photoshop 3.0\0")
    return b"".join(
        whole for kind, body, whole in _resources(block) if kind not in LEFT_RESOURCES and not jpegs_in(body)
    )


def _resources(block: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield Photoshop's resources: number, content, and the whole with its head."""
    position = 0
    while block[position : position + 4] == b"8BIM" and position + 12 <= len(block):
        kind = int.from_bytes(block[position + 4 : position + 6], "big")
        start = position + 6 + (block[position + 6] + 2) // 2 * 2
        length = int.from_bytes(block[start : start + 4], "big")
        body = block[start + 4 : start + 4 + length]
        if len(body) < length:
            return
        yield kind, body, block[position : start + 4 + length] + bytes(length % 2)
        position = start + 4 + length + length % 2


def _itxt(body: bytes) -> bytes:
    _, _, rest = body.partition(b"\0")
    parts = rest[2:].split(b"\0", 2)
    text = parts[2] if len(parts) == 3 else b""
    return inflated(text) if rest[:1] == b"\1" else text


def _raw_profile(kind: bytes, body: bytes) -> bytes:
    """Return ImageMagick's profile in a text: a name, a length and hexadecimal digits."""
    _, _, rest = body.partition(b"\0")
    text = _itxt(body) if kind == b"iTXt" else inflated(rest[1:]) if kind == b"zTXt" else rest
    try:
        return bytes.fromhex(b"".join(text.split()[2:]).decode("ascii"))
    except ValueError:
        return b""
