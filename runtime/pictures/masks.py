"""Masks: white is the hole. Any picture, array or alpha channel becomes a bool array, True = hole."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from .geometry import Mask, Size

log = logging.getLogger(__name__)

THRESHOLD = 127
MOSTLY_HOLE = 0.7
BAND_ROWS = 512
GREY_BITS = "misf.grey_bits"  # in `info` of a picture


@dataclass(frozen=True)
class MaskSettings:
    """How masks are read, by every command and by `Inpainter`. ValueError for settings that make no sense."""

    threshold: int = THRESHOLD
    """Values above this, 0 to 254, are holes."""
    invert: bool = False
    """Holes and known pixels change places."""
    from_alpha: bool = False
    """Transparent pixels are holes, instead of white ones."""
    values: tuple[int, ...] | None = None
    """Holes are the pixels with one of these values (indices of a palette, or grey values), instead of white ones."""
    resize: bool = False
    """A mask of another size than the picture is resized to it, by the nearest pixel."""
    grow: int = 0
    """The hole grows by this many pixels of the picture, in a straight line."""
    feather: int = 0
    """The fill blends into the known pixels over this many pixels around the hole; those pixels then change too."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 254:
            raise ValueError(f"the mask threshold must be from 0 to 254, got {self.threshold}")
        if min(self.grow, self.feather) < 0:
            raise ValueError(
                f"a mask cannot grow by {self.grow} or feather over {self.feather} pixels: expected 0 or more"
            )
        if self.values is not None and self.from_alpha:
            raise ValueError("mask values are those of an indexed or grey mask, not of an alpha channel: choose one")
        if self.values is not None and (not self.values or min(self.values) < 0):
            raise ValueError(f"mask values must be one or more whole numbers from 0 on, got {self.values}")

    def hole(self, mask: Image.Image | NDArray[Any], quiet: bool = False) -> Mask:
        """Return bool H,W, True = hole, of a picture or an array, at its own size."""
        if isinstance(mask, Image.Image):
            return mask_from_image(mask, self.threshold, self.invert, self.from_alpha, quiet, values=self.values)
        return mask_from_array(mask, self.threshold, self.invert, self.values)

    def fitted(self, hole: Mask, size: Size) -> Mask:
        """Return the hole at the picture's size H,W, resized and grown as the settings say."""
        if self.resize and hole.shape != size:
            log.info("the mask is resized from %dx%d to %dx%d", hole.shape[1], hole.shape[0], size[1], size[0])
            hole = resized_mask(hole, size)
        return grown_mask(hole, self.grow)


def mask_from_image(
    image: Image.Image,
    threshold: int = THRESHOLD,
    invert: bool = False,
    from_alpha: bool = False,
    quiet: bool = False,
    *,
    values: tuple[int, ...] | None = None,
) -> Mask:
    """Return bool H,W, True = hole, from a picture of any 8- or 16-bit mode: the one rule of every command.

    A pixel is a hole where its grey value (over black where it is transparent) is over `threshold`. With `from_alpha`
    it is one where the alpha channel is transparent by more than `threshold`: alpha 0 is a hole. With `values` it is
    one where its palette index or grey value is among them. `invert` swaps both.
    quiet: log nothing about masks that look unusual. Raises ValueError for a picture that has no such mask.
    """
    if values is not None:
        labels = _labels(image)
        mask = np.isin(labels, values)
        if not quiet and not mask.any():
            wanted, found = (", ".join(map(str, numbers[:20])) for numbers in (values, np.unique(labels).tolist()))
            log.warning("no pixel of the mask has the value %s: those that it has are %s", wanted, found)
        return ~mask if invert else mask
    if from_alpha:
        if not image.has_transparency_data:
            raise ValueError(f"the mask was to come from an alpha channel, and the picture ({image.mode}) has none")
        grey = _alpha(image).point(lambda alpha: 255 - alpha)
    else:
        grey = _grey(image)
    mask = np.asarray(grey) > threshold
    if not quiet:
        _say_what_is_odd(image, grey, mask, threshold, painted=not (invert or from_alpha))
    return ~mask if invert else mask


def _say_what_is_odd(image: Image.Image, grey: Image.Image, mask: Mask, threshold: int, painted: bool) -> None:
    """Log grey levels, and warn of a mask that was painted and comes out empty for a reason that can be seen."""
    counts = grey.histogram()
    brightest = max(value for value, count in enumerate(counts) if count)
    between = sum(counts[1:255])
    if between:
        log.info(
            "the mask has grey levels (%.2f %% of its pixels): those over %d count as hole",
            100 * between / (grey.width * grey.height),
            threshold,
        )
    if painted and 0 < brightest <= threshold:
        log.warning(
            "the mask's brightest value is %s and only over %d is hole: make holes white (255), or use "
            "--mask-threshold 0 if every value but 0 is hole",
            *(brightest, threshold),
        )
    elif painted and not mask.any() and _is_partly_transparent(image):
        log.warning(
            "the mask has no white and its alpha channel tells painted from clear: use that as the mask "
            "(--mask-from-alpha: clear is hole; with --invert-mask: painted is hole)"
        )


def grown_mask(mask: Mask, pixels: int) -> Mask:
    """Return bool H,W: the hole and all that is at most `pixels` from it, counted in a straight line."""
    return _distance(mask, pixels) <= pixels if pixels else mask


def feathered(mask: Mask, pixels: int) -> NDArray[np.float32]:
    """Return float32 H,W: 1 in the hole, falling linearly to 0 at a distance of `pixels` + 1, in a straight line."""
    weights: NDArray[np.float32] = np.clip(1 - _distance(mask, pixels + 1) / np.float32(pixels + 1), 0, 1)
    return weights


def _distance(mask: Mask, reach: int) -> NDArray[np.float32]:
    """Return float32 H,W: the distance of every pixel to the hole where that is at most `reach`, else more.

    It is computed in bands of rows, because SciPy needs 17 bytes a pixel.
    """
    distance = np.full(mask.shape, np.inf, np.float32)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return distance
    from scipy.ndimage import distance_transform_edt

    near = slice(max(columns[0] - reach, 0), columns[-1] + reach + 1)
    for top in range(max(rows[0] - reach, 0), min(rows[-1] + reach + 1, len(mask)), BAND_ROWS):
        above = min(top, reach)
        hole = mask[top - above : top + BAND_ROWS + reach, near]
        if hole.any():
            distance[top : top + BAND_ROWS, near] = distance_transform_edt(~hole)[above : above + BAND_ROWS]
    return distance


def mask_from_array(
    array: NDArray[Any], threshold: int = THRESHOLD, invert: bool = False, values: tuple[int, ...] | None = None
) -> Mask:
    """Return bool H,W, True = hole, from a bool array or one of uint8, over `threshold` = hole; H,W or H,W,1.

    Raises ValueError for another shape or type, and for uint8 of 0 and 1, which would mean no hole at all.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 or array.dtype not in (np.bool_, np.uint8):
        raise ValueError(
            f"expected a mask of shape H,W and uint8 (over {threshold} = hole) or bool, "
            f"got shape {array.shape} and {array.dtype}"
        )
    if array.dtype == np.bool_:
        mask = array
    elif values is not None:
        mask = np.isin(array, values)
    elif array.size and array.max() == 1 and threshold:
        raise ValueError(f"the mask holds only 0 and 1, and over {threshold} is hole: pass bool, or 0 and 255")
    else:
        mask = array > threshold
    return ~mask if invert else mask


def resized_mask(mask: Mask, size: Size) -> Mask:
    """Return the mask at another size H,W, by the nearest pixel."""
    return np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))


def check_mask(mask: Mask, size: Size) -> None:
    """Warn of a mask that is empty, full or nearly full; raise ValueError for one of another size than the picture."""
    if mask.shape != size:
        raise ValueError(
            f"the mask is {mask.shape[1]}x{mask.shape[0]} and the picture {size[1]}x{size[0]} (width x height): "
            "give a mask of the picture's size, or have it resized (--resize-mask; resize_mask=True in Python)"
        )
    share = np.count_nonzero(mask) / mask.size
    if share == 0:
        log.warning("the mask is empty: nothing to fill, the picture stays as it is")
    elif share == 1:
        log.warning("the mask covers the whole picture: nothing is known to fill it from; is it inverted?")
    elif share > MOSTLY_HOLE:
        log.warning(
            "the mask covers %.0f %% of the picture: is it inverted? White is hole (--invert-mask swaps)", 100 * share
        )


def _is_partly_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    least, most = _alpha(image).getextrema()
    return least != most


def _labels(image: Image.Image) -> NDArray[Any]:
    """Return the palette indices or grey values of a picture, as in its file; ValueError for one in colour."""
    if image.mode not in ("P", "L", "1", "LA", "PA") and not image.mode.startswith("I"):
        raise ValueError(f"mask values need an indexed or grey mask, and this one is in colour ({image.mode})")
    labels = np.asarray(image.getchannel(0) if image.mode in ("LA", "PA") else image)
    if image.mode == "1":
        return labels.astype(np.uint8)
    return labels // (255 // (2 ** image.info[GREY_BITS] - 1)) if GREY_BITS in image.info else labels


def note_depth(image: Image.Image) -> None:
    """Note in `info` of a grey picture just opened (not loaded) that its file has 2 or 4 bits: Pillow makes them 8."""
    for tile in getattr(image, "tile", ()):
        mode = tile.args if isinstance(tile.args, str) else tile.args and tile.args[0]
        if match := re.fullmatch(r"L;([24])R?", str(mode)):
            image.info[GREY_BITS] = int(match[1])


def _alpha(image: Image.Image) -> Image.Image:
    """Return the alpha channel, mode L, of a picture that has one or a transparent colour."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion would compare 8 bits with a colour of 16
        opaque = np.asarray(image) != image.info["transparency"]
        return Image.fromarray(opaque.astype(np.uint8) * np.uint8(255))
    return image.convert("RGBA").getchannel("A")


def _grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return ImageChops.darker(grey, _alpha(image)) if image.has_transparency_data else grey
    if image.mode in ("I", "F"):
        raise ValueError(f"masks of 32-bit numbers (Pillow's mode {image.mode}) are not supported: save it as 8 bits")
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        return Image.composite(shown.convert("L"), Image.new("L", shown.size), shown.getchannel("A"))
    return image.convert("L")
