"""Fills one picture at a time: bytes from wherever they are, through `Inpainter`, and back."""

from __future__ import annotations

import functools
import logging
import posixpath
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec

from ...plugins.shared.command import one_line
from ...plugins.shared.errors import MisfError
from ...plugins.shared.files import written_whole
from ..inpainter import Inpainter
from ..jobs import MASK_NAME
from ..pictures.image_io import FORMATS
from .entries import Entry

log = logging.getLogger(__name__)

Result = TypeVar("Result")
ATTEMPTS = 4
"""A store that fails is asked this often, after 0.5, 1 and 2 seconds."""


class Worker:
    """One loaded model; lives in a process of the cluster.

    Args:
        model: path or name of the model.
        contents: the model's files by name, for machines where `model` is not there.
        options: keywords of `Inpainter`.
        force: fill pictures anew whose output exists.

    """

    def __init__(self, model: str, contents: dict[str, bytes], options: dict[str, Any], force: bool) -> None:
        self._force = force
        if contents and not Path(model).exists():
            folder = Path(tempfile.mkdtemp(prefix="misf-model-"))
            for name, data in contents.items():
                (folder / name).write_bytes(data)
            model = str(folder / Path(model).name)
        self._inpaint = Inpainter(model, **options)
        self._mask = functools.lru_cache(maxsize=4)(_read)
        self._index = functools.lru_cache(maxsize=4)(_masks_by_name)

    def backend(self) -> str:
        """Return what the model runs on, such as "onnxruntime, cpu, fp16"."""
        backend = self._inpaint.backend
        return f"{backend.name}, {backend.device}, {backend.precision}"

    def fill(self, entries: list[Entry]) -> list[dict[str, Any]]:
        """Return a record for each entry: its status is "done", "exists" or, with an error, "failed"."""
        return [self._record(entry) for entry in entries]

    def _record(self, entry: Entry) -> dict[str, Any]:
        record: dict[str, Any] = {"input": entry.image, "output": entry.output}
        started = time.perf_counter()
        try:
            record["status"] = self._fill(entry, record)
        except Exception as error:  # one picture must not end the run of millions
            log.debug("the failure in full:", exc_info=True)
            known = isinstance(error, MisfError | ValueError | OSError | MemoryError)
            text = one_line(error) if known else f"unexpected {type(error).__name__}: {one_line(error)}"
            record |= {"status": "failed", "error": text if entry.image in text else f"{entry.image}: {text}"}
        return {**record, "seconds": round(time.perf_counter() - started, 4)}

    def _fill(self, entry: Entry, record: dict[str, Any]) -> str:
        if not self._force and _exists(entry.output):
            return "exists"
        mask = entry.mask or self._find_mask(entry)
        data = _read(entry.image)
        if mask:
            record["mask"] = mask
        name = posixpath.basename(entry.image)
        _write(entry.output, self._inpaint.inpaint_file(data, self._mask(mask) if mask else None, name))
        return "done"

    def _find_mask(self, entry: Entry) -> str:
        """Return the mask of the picture's name, as misf-run finds it; "" where there is no folder of masks."""
        if not entry.masks:
            return ""
        stem = PurePosixPath(entry.image).stem
        found = self._candidates(entry.masks, stem)
        same = [path for path in found if PurePosixPath(path).stem == stem and path != entry.image]
        masks = same or [path for path in found if PurePosixPath(path).stem != stem]
        if len(masks) != 1:
            names = ", ".join(sorted(map(posixpath.basename, masks))) or f"expected {stem}.* or {stem}_mask*.*"
            raise ValueError(f"{len(masks) or 'no'} masks in {entry.masks}: {names}")
        return masks[0]

    def _candidates(self, folder: str, stem: str) -> list[str]:
        """Return the masks of a name: from one listing of a local folder, from a request of its own in a store."""
        fs, path = fsspec.url_to_fs(folder)
        if (isinstance(fs.protocol, tuple | list) and "file" in fs.protocol) or fs.protocol == "file":
            return self._index(folder).get(stem, [])
        found = fs.find(path, maxdepth=1, prefix=stem)
        names = [posixpath.basename(name) for name in found]
        return [f"{folder}/{name}" for name in names if stem in _stems(name)]


def _masks_by_name(folder: str) -> dict[str, list[str]]:
    fs, path = fsspec.url_to_fs(folder)
    index: dict[str, list[str]] = defaultdict(list)
    if fs.isdir(path):
        for found in fs.ls(path, detail=False):
            name = posixpath.basename(found)
            for stem in _stems(name):
                index[stem].append(f"{folder}/{name}")
    return index


def _stems(name: str) -> set[str]:
    """Return the names of the pictures that a file may be the mask of."""
    path = PurePosixPath(name)
    if path.suffix.lower() not in FORMATS:
        return set()
    match = MASK_NAME.fullmatch(path.stem)
    return {path.stem, match[1]} if match else {path.stem}


def _patiently(action: Callable[[], Result]) -> Result:
    """Return what `action` does, tried again where a store fails in passing."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
            raise
        except Exception as error:  # every store has exceptions of its own
            if attempt == ATTEMPTS - 1:
                raise OSError(f"{type(error).__name__}: {one_line(error)}") from error
            time.sleep(0.5 * 2**attempt)
    raise AssertionError


def _exists(url: str) -> bool:
    fs, path = fsspec.url_to_fs(url)
    return bool(_patiently(lambda: fs.info(path) if fs.exists(path) else None))


def _read(url: str) -> bytes:
    fs, path = fsspec.url_to_fs(url)
    data: bytes = _patiently(lambda: fs.cat_file(path))
    return data


def _write(url: str, data: bytes) -> None:
    """Write a file whole or not at all: under another name first on a disk; an object store does so by itself."""
    fs, path = fsspec.url_to_fs(url)
    if fs.protocol == "file" or "file" in fs.protocol:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_bytes(data)
    else:
        _patiently(lambda: fs.pipe_file(path, data))
