"""The Python API: a model, a picture, a mask, and the picture with its holes filled."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..plugins.shared.command import one_line
from ..plugins.shared.errors import MisfError, OutOfMemory
from .backends import open_backend
from .backends.contract import Backend
from .memory import available_bytes, least_bytes
from .pictures.canvas import ArrayCanvas, Canvas, PillowCanvas, Pixels, resize
from .pictures.crops import Crop, fit, plan_crops
from .pictures.geometry import Mask, Size
from .pictures.image_io import as_stored, open_mask, open_picture, orientation_of, upright
from .pictures.masks import THRESHOLD, MaskSettings, check_mask, feathered
from .pictures.previews import info_without_previews
from .pictures.settings import CropSettings, network_working_size

log = logging.getLogger(__name__)

Picture_ = TypeVar("Picture_", NDArray[Any], Image.Image)
File = str | os.PathLike[str] | bytes
"""A path, or what is in the file."""

MANY_CROPS = 32
SMALLER = "use the strategy crop or a smaller working size (--strategy crop, --working-size)"


@dataclass(frozen=True)
class FillReport:
    """How a picture was filled."""

    strategy: str  # crop, resize or original: what auto came to
    crops: int
    hole_pixels: int
    model_seconds: float


class Inpainter:
    """A model ready to fill holes.

        inpaint = Inpainter("misf-small")
        result = inpaint(image, mask)

    Several threads may call one Inpainter at the same time: each gets its own result (on an engine the calls wait for
    each other).

    Args:
        model: an .onnx file, an engine, a checkpoint, or "misf-small", the network that comes with misf; or a
            `Backend`, which is what those become.
        backend, device, precision, threads: see `open_backend`.
        strategy: "crop" runs the model around each hole, "resize" on the whole picture reduced to the working size,
            "original" on the whole picture as it is; "auto" is original for a picture of about the working size or
            less, else crop.
        working_size: the model sees about working_size x working_size pixels at a time, at least 64; None: the size
            that the model file gives for its network.
        margin: pixels of context around a hole, at least; None: a quarter of the hole's side.
        mask_threshold, invert_mask, resize_mask, mask_from_alpha, mask_values, grow_mask, feather: see `MaskSettings`.

    Raises:
        ValueError: an unknown strategy, backend or device, or a file that is no such model.
        MisfError: the model cannot be loaded; its subclass EnvironmentMismatch: this machine lacks what was requested.

    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Backend,
        *,
        backend: str = "auto",
        device: str | None = None,
        strategy: str = "auto",
        working_size: int | None = None,
        margin: int | None = None,
        precision: str = "auto",
        threads: int | None = None,
        mask_threshold: int = THRESHOLD,
        invert_mask: bool = False,
        resize_mask: bool = False,
        mask_from_alpha: bool = False,
        mask_values: Sequence[int] | None = None,
        grow_mask: int = 0,
        feather: int = 0,
    ):
        values = None if mask_values is None else tuple(mask_values)
        self.masks = MaskSettings(mask_threshold, invert_mask, mask_from_alpha, values, resize_mask, grow_mask, feather)
        self.settings = CropSettings(strategy, working_size or CropSettings.working_size, margin)
        self.backend: Backend = (
            open_backend(model, backend, device, precision, threads) if isinstance(model, str | os.PathLike) else model
        )
        if working_size is None:
            self.settings = replace(self.settings, working_size=network_working_size(self.backend.config))
        self._limits = self.backend.limits

    def inpaint(
        self,
        image: Picture_,
        mask: Any,
        *,
        settings: CropSettings | None = None,
        masks: MaskSettings | None = None,
    ) -> Picture_:
        """Return the picture with its holes filled, as the type that came; pixels outside the hole are equal.

        The mask is for the picture as it is displayed, turned by its EXIF orientation, and the result is stored turned
        as the picture was, as by misf-run. A Pillow picture's `info` is kept, except for previews, which would show
        what was removed.

        Args:
            image: uint8 or uint16 H,W,3 RGB (or H,W grey, H,W,4 RGBA), or a Pillow picture.
            mask: uint8 H,W (over 127 = hole) or bool, a Pillow picture (white = hole), a path, or the bytes of a file.
            settings, masks: for this call instead of the Inpainter's own.

        Raises:
            ValueError: a wrong shape, type or size.
            MisfError: the model fails, or memory runs out.

        """
        masks = masks or self.masks
        hole = _hole(mask, masks)
        if not isinstance(image, Image.Image):
            result = np.array(image)
            self._fill(ArrayCanvas(result), hole, settings, masks)
            return result
        shown = upright(image, "the picture")
        if image.mode.startswith("I;16"):
            canvas = ArrayCanvas(np.array(shown, np.uint16))
            self._fill(canvas, hole, settings, masks)
            shown = Image.fromarray(canvas.array)
        else:
            shown = shown.copy()
            self._fill(PillowCanvas(shown), hole, settings, masks)
        stored = as_stored(shown, orientation_of(image, "the picture"))
        stored.info = info_without_previews(image.info)
        return stored

    __call__ = inpaint

    def inpaint_file(
        self,
        image: File,
        mask: Any = None,
        name: str = "the picture",
        *,
        settings: CropSettings | None = None,
        masks: MaskSettings | None = None,
    ) -> bytes:
        """Return a picture file with its holes filled, in the format that came: EXIF, profile, alpha and depth stay.

        Args:
            image: a path, or the bytes of a file.
            mask: the same, or what `inpaint` takes; for the picture as it is displayed. None, with `mask_from_alpha`:
                the picture's transparent pixels, which are opaque in the result.
            name: of a picture that comes as bytes, for messages.
            settings, masks: for this call instead of the Inpainter's own.

        Raises:
            ValueError: one of them is no picture, is damaged, or the sizes differ.
            OSError: a file cannot be read.
            MisfError: the model fails, or memory runs out.

        """
        masks = masks or self.masks
        if mask is None and not masks.from_alpha:
            raise ValueError("expected a mask, or mask_from_alpha")
        picture = open_picture(Path(name), data=image) if isinstance(image, bytes) else open_picture(Path(image))
        hole = _hole(image if mask is None else mask, masks)
        report = self._fill(picture.canvas, hole, settings, masks)
        if mask is None:
            picture.make_opaque(hole)
        return picture.encoded(picture.format, changed=report.hole_pixels > 0)

    def _fill(self, canvas: Canvas, hole: Mask, settings: CropSettings | None, masks: MaskSettings) -> FillReport:
        return self.fill(canvas, masks.fitted(hole, canvas.size), settings=settings, feather=masks.feather)

    def fill(
        self,
        canvas: Canvas,
        hole: Mask,
        progress: Callable[[int, int], None] | None = None,
        *,
        settings: CropSettings | None = None,
        feather: int = 0,
    ) -> FillReport:
        """Fill the holes of a canvas in place and return how.

        Args:
            canvas: the picture.
            hole: bool H,W.
            progress: called with the number of crops done and in total.
            settings: for this call instead of the Inpainter's own.
            feather: blend the fill into the known pixels over this many pixels around the hole. The network does not
                see those pixels.

        """
        check_mask(hole, canvas.size)
        settings = settings or self.settings
        asked = int(np.count_nonzero(hole))
        weights = feathered(hole, feather) if feather else None
        if weights is not None:
            hole = weights > 0
        crops = self._within_limits(plan_crops(hole, settings))
        if len(crops) > MANY_CROPS:
            log.info("%d crops: many holes, or a long one, at native resolution", len(crops))
        if shrunk := [crop.box.size[0] / crop.size[0] for crop in crops if crop.size[0] < crop.box.size[0]]:
            log.info(
                "%d of %d crops are larger than the working size and filled at down to 1/%.1f of their resolution: "
                "their fill is softer than what is around it",
                *(len(shrunk), len(crops), max(shrunk)),
            )
        waiting = hole.copy() if len(crops) > 1 else hole  # not filled yet: later crops see what earlier ones filled
        seconds = 0.0
        for done, crop in enumerate(crops):
            log.debug("crop %s at %dx%d", tuple(crop.box), crop.size[1], crop.size[0])
            started = time.perf_counter()
            fill = self._predict(canvas.read(crop.box, crop.size), reduced_mask(waiting[crop.box.slices], crop.size))
            seconds += time.perf_counter() - started
            share = None if weights is None else weights[crop.core.slices]
            canvas.paste(crop.core, _full_resolution(fill, crop), crop.hole, share)
            if len(crops) > 1:
                waiting[crop.core.slices] &= ~crop.hole
            if progress:
                progress(done + 1, len(crops))
        return FillReport(settings.strategy_for(canvas.size), len(crops), asked, seconds)

    def _within_limits(self, crops: list[Crop]) -> list[Crop]:
        """Return the crops, seen smaller where the model, an engine, does not take their size."""
        if self._limits is None:
            return crops
        largest = self._limits.max[1:]
        fitted = [replace(crop, size=fit(crop.size, largest)) for crop in crops]
        reduced = [(old, new) for old, new in zip(crops, fitted, strict=True) if old.size != new.size]
        if reduced:
            (old, new), (height, width) = reduced[0], largest
            log.warning(
                "the engine takes up to %dx%d pixels (height x width): %d of %d crops are seen smaller, such as %dx%d "
                "at %dx%d; build one that takes more with misf-build --max-shape",
                *(height, width, len(reduced), len(crops), *old.size, *new.size),
            )
        return fitted

    def _predict(self, rgb: Pixels, hole: Mask) -> Pixels:
        """Return the model's finished picture for float32 H,W,3 and bool H,W."""
        height, width = hole.shape
        below, right = -height % self.backend.multiple, -width % self.backend.multiple
        if self._limits is not None:
            below, right = max(below, self._limits.min[1] - height), max(right, self._limits.min[2] - width)
        if below or right:
            rgb = np.pad(rgb, ((0, below), (0, right), (0, 0)), "symmetric")
            hole = np.pad(hole, ((0, below), (0, right)), "symmetric")
        self._check_memory(hole.shape)
        image = np.ascontiguousarray(rgb.transpose(2, 0, 1)[None])
        mask = hole[None, None].astype(np.float32)
        try:
            output = self.backend(image, mask)
        except MisfError:
            raise
        except Exception as error:  # every backend has its own exceptions
            raise self._failure(error, hole.shape) from error
        if output.shape != image.shape:
            raise MisfError(f"the model returned the shape {output.shape} for a picture of {image.shape}")
        if not np.isfinite(output).all():
            raise MisfError(
                f"the model returned NaN or infinity at {width}x{height} in {self.backend.precision}: "
                "check it with misf-verify, and use an fp32 model meanwhile"
            )
        return np.asarray(output[0].transpose(1, 2, 0)[:height, :width], np.float32)

    def _check_memory(self, size: Size) -> None:
        needed, free = least_bytes(self.backend.config, self.backend.precision, size), available_bytes()
        if self.backend.device == "cpu" and free is not None and needed > free:
            raise OutOfMemory(
                f"{size[1]}x{size[0]} pixels at once need at least {needed / 1e9:.0f} GB of memory and "
                f"{free / 1e9:.0f} GB are free: {SMALLER}"
            )

    def _failure(self, error: Exception, size: Size) -> MisfError:
        if is_out_of_memory(error):
            return OutOfMemory(f"out of memory at {size[1]}x{size[0]} pixels on {self.backend.device}: {SMALLER}")
        return MisfError(f"{self.backend.name} failed at {size[1]}x{size[0]}: {one_line(error)}")


def _hole(mask: Any, masks: MaskSettings) -> Mask:
    """Return a mask of any kind that Inpainter takes, as bool H,W, True = hole, at its own size."""
    if isinstance(mask, bytes):
        return masks.hole(open_mask(Path("the mask"), data=mask))
    if isinstance(mask, str | os.PathLike):
        return masks.hole(open_mask(Path(mask)))
    if isinstance(mask, Image.Image):
        return masks.hole(upright(mask, "the mask"))
    return masks.hole(np.asarray(mask))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception of any backend says that memory ran out: it is known by its text only."""
    text = str(error).lower()
    signs = ("out of memory", "bad_alloc", "bad allocation", "failed to allocate", "can't allocate")
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


def reduced_mask(hole: Mask, size: Size) -> Mask:
    """Return the mask at the size that the model sees: every pixel into which a hole pixel bleeds is hole."""
    return hole if hole.shape == size else resize(hole[..., None].astype(np.float32), size)[..., 0] > 0


def _full_resolution(fill: Pixels, crop: Crop) -> Pixels:
    """Return the part of a prediction that lies over the crop's core, at native resolution."""
    left, top = crop.core.left - crop.box.left, crop.core.top - crop.box.top
    height, width = crop.core.size
    if crop.size != crop.box.size:
        fill = resize(fill, crop.box.size, smooth=True)
    return fill[top : top + height, left : left + width]
