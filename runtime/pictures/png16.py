"""PNG files of 16 bits a channel in colour, which Pillow reads and writes with 8."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Pillow's raw modes keep the first byte of each big-endian sample; the second entry of a pair makes it keep the other.
# Grey with alpha has no such pair: its four bytes are read as RGBA and put together again.
_RAW_MODES = {"RGB;16B": ("RGB;16B", "RGB;16L"), "RGBA;16B": ("RGBA;16B", "RGBA;16L"), "LA;16B": ("RGBA",)}
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # channels to the PNG specification's colour type


def raw_mode(image: Image.Image) -> str | None:
    """Return Pillow's raw mode of a PNG just opened (not loaded) with 16 bits and several channels; else None."""
    tiles = getattr(image, "tile", [])
    return tiles[0].args if image.format == "PNG" and tiles and tiles[0].args in _RAW_MODES else None


def decode(data: bytes, raw_mode: str) -> NDArray[np.uint16]:
    """Return uint16 H,W,C (C: 2 grey and alpha, 3 RGB, 4 RGBA): the file's samples, all 16 bits."""
    halves = [_decode_as(data, mode).astype(np.uint16) for mode in _RAW_MODES[raw_mode]]
    high, low = halves if len(halves) == 2 else (halves[0][..., 0::2], halves[0][..., 1::2])
    return high * np.uint16(256) + low


def with_alpha(samples: NDArray[np.uint16], key: int | tuple[int, ...]) -> NDArray[np.uint16]:
    """Return H,W,2 or H,W,4 of samples H,W or H,W,3: with alpha, which is 0 where they are the transparent colour."""
    pixels = samples.reshape(*samples.shape[:2], -1)
    opaque = (pixels != np.array(key)).any(axis=2)
    return np.dstack([pixels, opaque * np.uint16(65535)])


def encode(pixels: NDArray[np.uint16]) -> bytes:
    """Return a PNG file of uint16 H,W or H,W,C."""
    height, width = pixels.shape[:2]
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    rows = np.ascontiguousarray(pixels, dtype=">u2").reshape(height, -1).view(np.uint8)
    filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 2  # filter "up": each row less the one above
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 16, _COLOUR_TYPES[channels], 0, 0, 0)
    image_data = zlib.compress(filtered.tobytes())
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", image_data) + chunk(b"IEND", b"")


def _decode_as(data: bytes, raw_mode: str) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        mode = "RGB" if raw_mode.startswith("RGB;") else "RGBA"
        if image.mode != mode:
            raise ValueError(f"a 16-bit PNG of mode {image.mode} where {mode} was expected")
        image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
        return np.asarray(image)


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Return the kind and the body of each chunk of a PNG file, up to its end or to the first that is cut or none."""
    position, kind = len(SIGNATURE), b""
    while position + 12 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        if position + 12 + length > len(data) or not (kind.isalpha() and kind.isascii()):
            return
        yield kind, data[position + 8 : position + 8 + length]
        position += 12 + length


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
