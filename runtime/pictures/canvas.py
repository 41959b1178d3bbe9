"""A picture as the network meets it: a part is read as RGB in [0,1], a fill is pasted into the hole and nowhere else.

Parts only: nothing here touches the whole picture, so a small hole costs the same in any photograph. Whatever kind of
picture it is (grey, alpha, CMYK, palette, 16 bit), a pixel outside the hole keeps its very bytes.
"""

from __future__ import annotations

import io
import logging
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .geometry import Box, Mask, Size

log = logging.getLogger(__name__)

Pixels = NDArray[np.float32]  # H,W,3 RGB in [0,1]
Weights = NDArray[np.float32]  # H,W in [0,1], the fill's share of a pixel
PILLOW_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's convert("L")


class Canvas(Protocol):
    """What the inpainter needs of a picture."""

    @property
    def size(self) -> Size:
        """H, W."""

    def read(self, box: Box, size: Size) -> Pixels:
        """Return a part of the picture, resized to `size`, as float32 H,W,3 RGB in [0,1]."""

    def paste(self, box: Box, fill: Pixels, hole: Mask, weights: Weights | None = None) -> None:
        """Write `fill` where `hole` is True, with `weights` blended into what is there; all have the size of `box`."""


class ArrayCanvas:
    """A canvas over a uint8 or uint16 array H,W or H,W,C, changed in place (C: 1 grey, 2 with alpha, 3 RGB, 4 RGBA)."""

    def __init__(self, array: NDArray[Any]):
        if array.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"expected a uint8 or uint16 picture, got an array of {array.dtype}")
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)) or 0 in array.shape:
            raise ValueError(f"expected a picture of shape H,W or H,W,C with C of 1 to 4, got {array.shape}")
        self.array = array
        self._levels = np.float32(np.iinfo(array.dtype).max)
        planes = array[..., None] if array.ndim == 2 else array
        self._colour = planes[..., : 1 if planes.shape[2] < 3 else 3]  # a view: alpha stays as it is

    @property
    def size(self) -> Size:
        """H, W."""
        return self.array.shape[0], self.array.shape[1]

    def read(self, box: Box, size: Size) -> Pixels:
        """Return a part as float32 H,W,3 RGB in [0,1]; grey thrice."""
        part = self._colour[box.slices].astype(np.float32) / self._levels
        return np.asarray(np.broadcast_to(resize(part, size), (*size, 3)))

    def paste(self, box: Box, fill: Pixels, hole: Mask, weights: Weights | None = None) -> None:
        """Write `fill` where `hole` is True, with `weights` blended into what is there."""
        colours = fill[hole]
        if self._colour.shape[2] == 1:
            colours = (colours @ LUMA)[:, None]
        values = np.clip(colours, 0, 1) * self._levels
        part = self._colour[box.slices]
        if weights is not None:
            share = weights[hole][:, None]
            values = share * values + (1 - share) * part[hole]
        part[hole] = np.rint(values).astype(self.array.dtype)


class PillowCanvas:
    """A canvas over a Pillow picture, changed in place.

    A picture with a palette is filled with the nearest of its colours. CMYK goes through its colour profile where it
    has one, so that the fill matches in print, and through Pillow's plain conversion where it has none.
    """

    def __init__(self, image: Image.Image):
        if image.mode not in PILLOW_MODES:
            raise ValueError(f"pictures of Pillow's mode {image.mode} are not supported: expected {PILLOW_MODES}")
        self.image = image
        self._profiles = _cmyk_transforms(image)

    @property
    def size(self) -> Size:
        """H, W."""
        return self.image.height, self.image.width

    def read(self, box: Box, size: Size) -> Pixels:
        """Return a part as float32 H,W,3 RGB in [0,1]."""
        part = self.image.crop(box)
        rgb = _transformed(part, self._profiles[0]) if self._profiles else part.convert("RGB")
        if box.size != size:
            rgb = rgb.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return np.asarray(rgb, np.float32) / np.float32(255)

    def paste(self, box: Box, fill: Pixels, hole: Mask, weights: Weights | None = None) -> None:
        """Write `fill` where `hole` is True, with `weights` blended into what is there: in its own colours, not in RGB,
        unless it has too few of them."""
        part = self.image.crop(box)
        share = hole if weights is None else np.where(hole, np.rint(weights * 255), 0).astype(np.uint8)
        if weights is not None and self.image.mode in ("1", "P"):
            fill = weights[..., None] * fill + (1 - weights[..., None]) * self.read(box, box.size)
            share = hole
        rgb = Image.fromarray(np.rint(np.clip(fill, 0, 1) * 255).astype(np.uint8))
        if self.image.mode == "P":
            patch = _nearest_palette_colours(rgb, part, hole)
        elif self._profiles:
            patch = _transformed(rgb, self._profiles[1])
        else:
            patch = rgb.convert(self.image.mode, dither=Image.Dither.NONE)
        if self.image.mode in ("LA", "RGBA"):
            patch.putalpha(part.getchannel("A"))
        self.image.paste(patch, box, Image.fromarray(share))


def resize(part: NDArray[np.float32], size: Size, smooth: bool = False) -> NDArray[np.float32]:
    """Return float32 H,W,C resized to `size`: bilinear over all pixels that fall together, or bicubic when `smooth`."""
    if part.shape[:2] == size:
        return part
    resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.BILINEAR
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize((size[1], size[0]), resample))
        for plane in np.moveaxis(part, -1, 0)
    ]
    return np.stack(planes, axis=-1)


def _nearest_palette_colours(rgb: Image.Image, part: Image.Image, hole: Mask) -> Image.Image:
    """Return `part` with, inside the hole, the index of the opaque palette colour nearest to `rgb`."""
    from scipy.spatial import KDTree

    palette = np.array(part.getpalette("RGB"), np.int16).reshape(-1, 3)
    transparency = part.info.get("transparency")
    opaque = np.ones(len(palette), np.bool_)
    if isinstance(transparency, int) and transparency < len(palette):
        opaque[transparency] = False
    elif isinstance(transparency, bytes):
        alpha = np.frombuffer(transparency, np.uint8)[: len(palette)]
        opaque[: len(alpha)] = alpha == 255
    indices = np.flatnonzero(opaque) if opaque.any() else np.arange(len(palette))
    _, nearest = KDTree(palette[indices]).query(np.asarray(rgb)[hole])
    filled = np.array(part)
    filled[hole] = indices[nearest]
    patch = Image.fromarray(filled)
    patch.putpalette(part.getpalette("RGB") or [])
    return patch


def _cmyk_transforms(image: Image.Image) -> tuple[Any, Any] | None:
    """Return the transforms CMYK to sRGB and back by the picture's profile; None without a usable one."""
    profile = image.info.get("icc_profile")
    if image.mode != "CMYK" or not profile:
        return None
    from PIL import ImageCms

    try:
        cmyk, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        return (
            ImageCms.buildTransform(cmyk, srgb, "CMYK", "RGB"),
            ImageCms.buildTransform(srgb, cmyk, "RGB", "CMYK"),
        )
    except (ImageCms.PyCMSError, OSError) as error:
        log.warning("the CMYK colour profile cannot be used (%s): plain conversion instead", error)
        return None


def cmyk_to_srgb(image: Image.Image) -> Image.Image:
    """Return a CMYK picture as sRGB, by its colour profile where it has a usable one."""
    transforms = _cmyk_transforms(image)
    return _transformed(image, transforms[0]) if transforms else image.convert("RGB")


def _transformed(image: Image.Image, transform: Any) -> Image.Image:
    from PIL import ImageCms

    result = ImageCms.applyTransform(image, transform)
    assert result is not None  # it is None only when working in place
    return result
