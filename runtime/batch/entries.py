"""Which pictures, with which masks, to which outputs: streamed, so that a list of millions is never held in memory."""

from __future__ import annotations

import json
import logging
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec

from ..jobs import MASK_NAME
from ..pictures.image_io import FORMATS

log = logging.getLogger(__name__)

LISTS = (".jsonl", ".ndjson")
_S3_PAGE = 1000


@dataclass(frozen=True)
class Entry:
    """One picture to fill: URLs or paths, as fsspec takes them."""

    image: str
    output: str
    mask: str = ""
    """A mask file; "" to look for one of the picture's name in `masks`, or to take the picture's alpha channel."""
    masks: str = ""
    """The folder of masks that belongs to the picture's folder."""


def is_folder(url: str) -> bool:
    """Return whether a URL or path is a folder (in an object store: a prefix with something below it)."""
    fs, path = fsspec.url_to_fs(url)
    return bool(fs.isdir(path))


def entries(image: str, mask: str, output: str) -> Iterator[Entry]:
    """Yield an entry for every picture of a folder or of a list of JSON Lines, in the order in which they are found.

    Args:
        image: a folder, one picture, or a list (.jsonl): an object a line with `image`, and perhaps `mask`, `output`.
        mask: a mask file, a folder of masks, or "".
        output: the folder to write to.

    Raises:
        ValueError: a line of a list is not such an object; `image` holds nothing.
        OSError: something cannot be listed or read.

    """
    one_mask = "" if not mask or is_folder(mask) else mask
    masks = "" if one_mask else mask.rstrip("/")
    if PurePosixPath(image).suffix.lower() in LISTS:
        yield from _listed(image, one_mask, masks, output.rstrip("/"))
        return
    if not is_folder(image):
        name = posixpath.basename(image)
        yield Entry(image, f"{output.rstrip('/')}/{name}", one_mask, masks)
        return
    root, below = image.rstrip("/"), output.rstrip("/")
    found = False
    for relative in _pictures(root, mask_folder=masks, apart=below):
        found = True
        folder = posixpath.dirname(relative)
        yield Entry(f"{root}/{relative}", f"{below}/{relative}", one_mask, masks and f"{masks}/{folder}".rstrip("/"))
    if not found:
        raise ValueError(f"{image} holds no pictures: expected files that end in one of {' '.join(FORMATS)}")


def _listed(path: str, one_mask: str, masks: str, output: str) -> Iterator[Entry]:
    with fsspec.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                fields: dict[str, Any] = json.loads(line)
                image, known = fields["image"], {"image", "mask", "output"}
                if not all(isinstance(value, str) for value in fields.values()) or not set(fields) <= known:
                    raise ValueError
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object with image, and perhaps mask and output, each a "
                    f"path or URL; got {line.strip():.80}"
                ) from error
            mask = fields.get("mask", one_mask)
            yield Entry(
                image, fields.get("output") or f"{output}/{posixpath.basename(image)}", mask, "" if mask else masks
            )


def _pictures(root: str, mask_folder: str, apart: str) -> Iterator[str]:
    """Yield the pictures below a folder, relative to it; no hidden ones, no masks beside them, nothing in `apart`."""
    fs, top = fsspec.url_to_fs(root)
    skipped = [fsspec.url_to_fs(url)[1].rstrip("/") + "/" for url in (mask_folder, apart) if url and url != root]
    paired = mask_folder == root
    for path in _files(fs, top):
        relative = posixpath.relpath(path, top)
        name = PurePosixPath(relative)
        hidden = any(part.startswith(".") for part in name.parts)
        if (
            hidden
            or name.suffix.lower() not in FORMATS
            or any(f"/{path}".startswith(f"/{skip}") or path.startswith(skip) for skip in skipped)
        ):
            continue
        if paired and MASK_NAME.fullmatch(name.stem):
            continue
        yield relative


def _files(fs: Any, top: str) -> Iterator[str]:
    """Yield the files below a folder: page by page from S3, folder by folder elsewhere."""
    if "s3" not in fs.protocol:
        for folder, folders, names in fs.walk(top):
            folders_in_order = sorted(folders)
            folders[:] = folders_in_order if isinstance(folders, list) else folders
            yield from (f"{folder}/{name}" for name in sorted(names))
        return
    bucket, _, prefix = top.partition("/")
    page: dict[str, Any] = {}
    while not page or page.get("IsTruncated"):
        more = {"ContinuationToken": page["NextContinuationToken"]} if page else {}
        page = fs.call_s3(
            "list_objects_v2", Bucket=bucket, Prefix=f"{prefix}/" if prefix else "", MaxKeys=_S3_PAGE, **more
        )
        yield from (f"{bucket}/{item['Key']}" for item in page.get("Contents", ()) if not item["Key"].endswith("/"))
