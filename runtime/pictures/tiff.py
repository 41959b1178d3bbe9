"""The structure of TIFF files, which EXIF has too: directories of entries, read and written as bytes.

TIFF 6.0, section 2; BigTIFF is read, never written.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

ORIENTATION = 0x0112
EXIF_IFD, GPS_IFD, INTEROP_IFD = 0x8769, 0x8825, 0xA005
POINTERS = (EXIF_IFD, GPS_IFD, INTEROP_IFD)
LONG = 4
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
SWAPPED = {5: 4, 10: 4}  # a rational is two numbers


@dataclass(frozen=True)
class Entry:
    """One entry of a TIFF directory; `inner`: the directory that it points to."""

    tag: int
    kind: int
    count: int
    data: bytes
    at: int = 0  # where the entry is in the file
    inner: tuple[Entry, ...] | None = None


def entries_of(tiff: bytes) -> list[Entry]:
    """Return the entries of the first directory; none where the bytes are no TIFF structure."""
    if tiff[:4] in (b"II*\0", b"MM\0*"):
        return directory_at(tiff, struct.unpack_from(order_of(tiff) + "I", tiff.ljust(8, b"\0"), 4)[0])
    if tiff[:4] in (b"II+\0", b"MM\0+"):
        return directory_at(tiff, struct.unpack_from(order_of(tiff) + "Q", tiff.ljust(16, b"\0"), 8)[0])
    return []


def order_of(tiff: bytes) -> str:
    """Return the order of bytes, as struct writes it."""
    return "<" if tiff[:2] == b"II" else ">"


def directory_at(tiff: bytes, offset: int, depth: int = 0) -> list[Entry]:
    """Return the entries of one directory, with those that it points to; what lies outside the bytes is left out.

    Damage can make every entry point at one place, a directory among them: of a tag the first entry counts, and all
    values that lie elsewhere are together no longer than the bytes.
    """
    order, big = order_of(tiff), 43 in tiff[2:4]
    head, row, value = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
    size = struct.calcsize(order + head)
    if offset + size > len(tiff):
        return []
    found: list[Entry] = []
    tags: set[int] = set()
    left = len(tiff)
    step = struct.calcsize(order + row) + value
    for number in range(min(struct.unpack_from(order + head, tiff, offset)[0], 65535)):
        at = offset + size + number * step
        if at + step > len(tiff):
            break
        tag, kind, count = struct.unpack_from(order + row, tiff, at)
        length = SIZES.get(kind, 1) * count
        start, elsewhere = at + step - value, length if length > value else 0
        if elsewhere:
            start = struct.unpack_from(order + ("Q" if big else "I"), tiff, start)[0]
        if start + length > len(tiff) or elsewhere > left or tag in tags:
            continue
        tags.add(tag)
        left -= elsewhere
        data = tiff[start : start + length]
        inner = None
        if tag in POINTERS and depth < 2 and kind in (4, 13, 16, 18) and count == 1:
            inner = tuple(directory_at(tiff, numbers_of(Entry(tag, kind, count, data), order)[0], depth + 1))
        if kind not in (16, 17, 18) or inner is not None:
            found.append(Entry(tag, kind, count, data, at, inner))
    return found


def numbers_of(entry: Entry, order: str) -> list[int]:
    """Return an entry's values as whole numbers without sign."""
    size = SIZES.get(entry.kind, 1)
    step = "little" if order == "<" else "big"
    return [int.from_bytes(entry.data[at : at + size], step) for at in range(0, len(entry.data), size)]  # type: ignore[arg-type]


def directory_bytes(entries: Any, order: str, start: int) -> bytes:
    """Return a directory that begins at offset `start`, its values and what it points to after it."""
    rows, body = b"", b""
    after = start + 2 + 12 * len(entries) + 4
    for entry in sorted(entries, key=lambda entry: entry.tag):
        kind, count, value = entry.kind, entry.count, entry.data.ljust(4, b"\0")
        if entry.inner is not None:
            kind, count, value = LONG, 1, struct.pack(order + "I", after + len(body))
            body += directory_bytes(entry.inner, order, after + len(body))
        elif len(entry.data) > 4:
            value = struct.pack(order + "I", after + len(body))
            body += entry.data
        body += bytes(len(body) % 2)
        rows += struct.pack(order + "HHI", entry.tag, kind, count) + value
    return struct.pack(order + "H", len(entries)) + rows + bytes(4) + body


def in_other_order(entry: Entry) -> Entry:
    """Return an entry for a TIFF of the other order of bytes."""
    if entry.inner is not None:
        return replace(entry, inner=tuple(in_other_order(one) for one in entry.inner))
    size = SWAPPED.get(entry.kind, SIZES.get(entry.kind, 1))
    data = b"".join(entry.data[at : at + size][::-1] for at in range(0, len(entry.data), size))
    return replace(entry, data=data)


def turned_upright(exif: bytes) -> bytes:
    """Return EXIF whose orientation is 1, where it has one."""
    entry = next((entry for entry in entries_of(exif) if entry.tag == ORIENTATION), None)
    if entry is None:
        return exif
    value = struct.pack(order_of(exif) + "HHIHH", ORIENTATION, 3, 1, 1, 0)
    return exif[: entry.at] + value + exif[entry.at + 12 :]


def without_orientation(exif: bytes) -> bytes:
    """Return EXIF without the entry of the orientation: for AVIF, which holds it elsewhere."""
    entry = next((entry for entry in entries_of(exif) if entry.tag == ORIENTATION), None)
    if entry is None:
        return exif
    order = order_of(exif)
    first = struct.unpack_from(order + "I", exif, 4)[0]
    count = struct.unpack_from(order + "H", exif, first)[0]
    end = first + 2 + 12 * count + 4
    rest = exif[entry.at + 12 : end] + bytes(12)
    changed = exif[: entry.at] + rest + exif[end:]
    return changed[:first] + struct.pack(order + "H", count - 1) + changed[first + 2 :]
