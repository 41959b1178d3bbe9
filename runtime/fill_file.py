"""Jobs run one after the other on one Inpainter: read, fill, write; a failure of one does not stop the others."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..plugins.shared.command import one_line
from ..plugins.shared.errors import MisfError
from ..plugins.shared.files import written_whole
from .inpainter import FillReport, Inpainter
from .jobs import Job, check_output, find_mask
from .pictures.canvas import Canvas, Pixels
from .pictures.crops import plan_crops
from .pictures.geometry import Box, Mask, Size
from .pictures.image_io import open_mask, open_picture, stored_size, written_format
from .pictures.masks import check_mask, feathered, resized_mask

log = logging.getLogger(__name__)

PANEL = 1024  # longest side of each picture in a comparison
GAP = 8


class FileFiller:
    """Fills pictures in files with one model and one way of reading masks, both the Inpainter's."""

    def __init__(self, inpainter: Inpainter, mask: Path | None, concat: bool, force: bool):
        self._inpainter, self._mask = inpainter, mask
        self._concat, self._force = concat, force
        self._read_mask = functools.lru_cache(maxsize=1)(self._decode_mask)  # one mask for a thousand pictures

    def run(self, job: Job, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Return what was done with one picture, for --json. Raises ValueError, OSError, MisfError or MemoryError."""
        with _known_failures(job):
            return self._run(job, progress)

    def _run(self, job: Job, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
        started = time.perf_counter()
        mask_path = None if self._mask is None else find_mask(job, self._mask)
        check_output(job, mask_path, self._concat, self._force)
        target = written_format(job.output, job.image)
        picture = open_picture(job.image, target)
        height, width = picture.canvas.size
        masks = self._inpainter.masks
        hole = masks.fitted(self._read_mask(mask_path or job.image), (height, width))
        before = _panel(picture.canvas) if self._concat else None
        report = self._inpainter.fill(picture.canvas, hole, progress, feather=masks.feather)
        if mask_path is None:
            picture.make_opaque(hole)
        job.output.parent.mkdir(parents=True, exist_ok=True)
        encoded = picture.encoded(target or picture.format, report.hole_pixels > 0)
        record = {"input": str(job.image), "mask": str(mask_path or job.image), "output": str(job.output)}
        with written_whole(job.output) as temporary:
            temporary.write_bytes(encoded)
            if before is not None:  # within, so that a picture that is there has its comparison
                _save_comparison(job.comparison, before, hole, _panel(picture.canvas))
                record["concat"] = str(job.comparison)
        seconds = time.perf_counter() - started
        return {**record, "width": width, "height": height, **asdict(report), "seconds": round(seconds, 4)}

    def crop_sizes(self, job: Job) -> list[Size]:
        """Return the sizes H,W at which the network would see a picture's crops, by its mask and its file's header.

        Errors as of `run`, for what would stop it before the network is asked.
        """
        with _known_failures(job):
            mask_path = None if self._mask is None else find_mask(job, self._mask)
            check_output(job, mask_path, self._concat, self._force)
            masks, hole = self._inpainter.masks, self._read_mask(mask_path or job.image)
            size = stored_size(job.image)
            if hole.shape == size[::-1] != size:  # perhaps it is stored turned; the mask is for what is displayed
                size = open_picture(job.image, written_format(job.output, job.image)).canvas.size
            hole = masks.fitted(hole, size)
            check_mask(hole, size)
            hole = feathered(hole, masks.feather) > 0 if masks.feather else hole
            return [crop.size for crop in plan_crops(hole, self._inpainter.settings)]

    def rehearse(self, job: Job) -> FillReport:
        """Fill a picture and encode it without writing it, and return how it was filled. Errors as of `run`."""
        with _known_failures(job):
            mask_path = None if self._mask is None else find_mask(job, self._mask)
            target = written_format(job.output, job.image)
            picture = open_picture(job.image, target)
            masks = self._inpainter.masks
            hole = masks.fitted(self._read_mask(mask_path or job.image), picture.canvas.size)
            report = self._inpainter.fill(picture.canvas, hole, feather=masks.feather)
            picture.encoded(target or picture.format, changed=report.hole_pixels > 0)
            return report

    def _decode_mask(self, path: Path) -> Mask:
        try:
            return self._inpainter.masks.hole(open_mask(path))
        except ValueError as error:
            text = str(error)
            raise ValueError(text if str(path) in text else f"{path}: {text}") from error


@contextlib.contextmanager
def _known_failures(job: Job) -> Iterator[None]:
    """Turn whatever is raised within the block into one of the failures that do not end a folder's run."""
    try:
        yield
    except (MisfError, ValueError, OSError, MemoryError):
        raise
    except Exception as error:
        log.debug("the failure in full:", exc_info=True)
        raise MisfError(f"{job.image}: unexpected {type(error).__name__}: {one_line(error)}") from error


def _panel(canvas: Canvas) -> Pixels:
    """Return the whole picture, small enough to look at."""
    height, width = canvas.size
    scale = min(1.0, PANEL / max(height, width))
    return canvas.read(Box(0, 0, width, height), (max(1, round(height * scale)), max(1, round(width * scale))))


def _save_comparison(path: Path, before: Pixels, hole: Mask, after: Pixels) -> None:
    """Write the picture, the picture with its holes in red, and the result, side by side, as PNG."""
    marked = before.copy()
    marked[resized_mask(hole, (before.shape[0], before.shape[1]))] = (0.9, 0.1, 0.15)
    gap = np.ones((before.shape[0], GAP, 3), np.float32)
    row = np.concatenate([before, gap, marked, gap, after], axis=1)
    with written_whole(path) as temporary:
        Image.fromarray(np.rint(row * 255).astype(np.uint8)).save(temporary, "PNG")
