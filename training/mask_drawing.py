"""Masks for training and evaluation: random free-form ones, or those of a folder.

A mask is a bool array H,W, True = hole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..plugins.shared.command import one_line
from ..plugins.shared.errors import MisfError
from ..runtime.pictures.geometry import Mask
from ..runtime.pictures.image_io import open_mask
from ..runtime.pictures.masks import MaskSettings, resized_mask

log = logging.getLogger(__name__)

Band = tuple[float, float]

#: The paper's three mask bands: minimum and maximum fraction of the picture that is hole (arXiv 2203.06304, 4.1).
BANDS: tuple[Band, ...] = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6))

SMALLEST_SHARE = 0.01  # lower end of the first band: smaller holes teach and measure little


def band_name(band: Band) -> str:
    """Return a band as text, such as '20-40%'."""
    return f"{round(100 * band[0])}-{round(100 * band[1])}%"


#: The shapes that misf-eval --by kind compares.
KINDS = ("strokes", "boxes", "centre box", "outlines")

# Shapes of one size, so that only their form differs: about the quarter that the centre box has.
_KIND_BAND: Band = (0.2, 0.3)


def band_of(mask: Mask) -> Band | None:
    """Return the band that a mask falls into (at a limit, the lower one); None without a hole or above all bands."""
    share = float(mask.mean())
    return next((band for band in BANDS if 0 < share <= band[1]), None)


def mask_of_kind(rng: np.random.Generator, height: int, width: int, kind: str) -> Mask:
    """Return a mask bool H,W, True = hole, of one of KINDS.

    The centre box has half of each side, rounded up, and is the same every time, as in Pathak et al. (arXiv
    1604.07379, section 3.3). Of the others, one or several shapes at random places, cut by the picture's border where
    they cross it, make a hole of 20 to 30 % of the picture. Outlines are closed curves like those of objects.

    Args:
        rng: the only source of randomness; the same generator state gives the same mask.
        height, width: at least 1 each, with a whole number of pixels between 20 and 30 % of the area.
        kind: one of KINDS.

    """
    if kind == "centre box":
        mask = np.zeros((height, width), np.bool_)
        mask[height // 4 : height // 4 + (height + 1) // 2, width // 4 : width // 4 + (width + 1) // 2] = True
        return mask
    return random_mask(rng, height, width, _KIND_BAND, _MAKER_OF[kind])


def random_mask(
    rng: np.random.Generator, height: int, width: int, band: Band | None = None, draw: Maker | None = None
) -> Mask:
    """Return a random mask bool H,W, True = hole: strokes, boxes, ellipses, blobs or a mixture of them.

    Args:
        rng: the only source of randomness; the same generator state gives the same mask.
        height, width: at least 1 each.
        band: minimum and maximum fraction of the picture that is hole, always met; by default one of BANDS at random.
        draw: the function that draws each shape; by default one at random.

    Raises:
        ValueError: no whole number of pixels lies within the band.

    """
    low, high = BANDS[int(rng.integers(len(BANDS)))] if band is None else band
    area = height * width
    fewest, most = max(1, math.ceil(low * area - 1e-9)), math.floor(high * area + 1e-9)
    if not 0 <= low < high <= 1 or fewest > most:
        raise ValueError(f"no mask of {width}x{height} pixels has a hole of {low:g} to {high:g} of its area")
    share = rng.uniform(min(max(low, SMALLEST_SHARE), high), high)
    target = int(np.clip(round(share * area), fewest, most))
    draw = draw or _MAKERS[int(rng.integers(len(_MAKERS)))]
    canvas = np.zeros((height, width), np.uint8)
    count = 0
    for _ in range(40):
        # Half of the shapes have all of the missing area, so that most masks need no trimming.
        missing = target - count
        draw(rng, canvas, missing if rng.random() < 0.5 else missing * rng.uniform(0.2, 1.0))
        count = int(np.count_nonzero(canvas))
        if count >= 0.97 * target:
            break
    if fewest <= count <= most:
        return canvas.astype(bool)
    return _resized(canvas, target, fewest, most)


def _resized(canvas: NDArray[np.uint8], target: int, fewest: int, most: int) -> Mask:
    """Return the drawing dilated or eroded evenly to `target` pixels, by whole level sets where the limits allow."""
    import cv2

    if not canvas.any():
        canvas[canvas.shape[0] // 2, canvas.shape[1] // 2] = 1
    # A signed distance, negative inside the drawing: its level sets are the dilated and eroded masks.
    distance = cv2.distanceTransform(1 - canvas, cv2.DIST_L2, 5) - cv2.distanceTransform(canvas, cv2.DIST_L2, 5)
    order = np.argsort(distance, axis=None, kind="stable")
    level = distance.flat[order[target - 1]]
    mask: Mask = distance <= level
    if not fewest <= np.count_nonzero(mask) <= most:
        mask = np.zeros(canvas.shape, bool)
        mask.flat[order[:target]] = True
    return mask


Maker = Callable[[np.random.Generator, NDArray[np.uint8], float], None]

_BITS = 4  # fractional bits of OpenCV's drawing coordinates


def _fixed(points: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.round(np.clip(points, -1e5, 1e5) * (1 << _BITS)).astype(np.int32)


def _place(rng: np.random.Generator, canvas: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return a random point (x, y) of the picture."""
    return rng.random(2) * (canvas.shape[1], canvas.shape[0])


def _outline(rng: np.random.Generator, canvas: NDArray[np.uint8], unit: NDArray[np.float64], area: float) -> None:
    """Fill a closed curve (points x, y around 0, of area near 1), randomly scaled, stretched, rotated and moved."""
    import cv2

    stretch = math.exp(rng.uniform(-0.7, 0.7))
    angle = rng.uniform(0, math.pi)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    points = unit * (stretch, 1 / stretch) * math.sqrt(area) @ turn + _place(rng, canvas)
    cv2.fillPoly(canvas, [_fixed(points)], 1, shift=_BITS)


_ANGLES = np.arange(48) * (2 * math.pi / 48)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


def _ellipse(rng: np.random.Generator, canvas: NDArray[np.uint8], area: float) -> None:
    _outline(rng, canvas, _CIRCLE / math.sqrt(math.pi), area)


def _blob(rng: np.random.Generator, canvas: NDArray[np.uint8], area: float) -> None:
    """Fill an outline like that of an object: a circle whose radius is perturbed by a few low harmonics."""
    waves = np.arange(2, 8)
    heights = rng.normal(size=6) * 0.5 / waves
    phases = rng.uniform(0, 2 * math.pi, 6)
    radius = np.maximum(1 + (heights * np.cos(_ANGLES[:, None] * waves + phases)).sum(axis=1), 0.15)
    radius /= math.sqrt(math.pi * float(np.mean(radius**2)))
    _outline(rng, canvas, _CIRCLE * radius[:, None], area)


def _box(rng: np.random.Generator, canvas: NDArray[np.uint8], area: float) -> None:
    stretch = math.exp(rng.uniform(-0.8, 0.8))
    sides = np.maximum(np.round(np.array([stretch, 1 / stretch]) * math.sqrt(area)), 1)
    left, top = np.floor(_place(rng, canvas) - sides / 2).astype(int)
    canvas[max(top, 0) : max(top + int(sides[1]), 0), max(left, 0) : max(left + int(sides[0]), 0)] = 1


def _stroke(rng: np.random.Generator, canvas: NDArray[np.uint8], area: float) -> None:
    """Draw a brush stroke of constant width along a random walk that turns smoothly or sharply."""
    import cv2

    side = min(canvas.shape)
    thickness = max(1, round(side * rng.uniform(0.02, 0.14)))
    corners = int(rng.integers(2, 9))
    step = min(max(area / thickness, 1.0), 3.0 * side) / corners
    turns = rng.normal(size=corners) * rng.uniform(0.2, 1.6)
    angles = rng.uniform(0, 2 * math.pi) + np.cumsum(turns)
    steps = np.stack([np.cos(angles), np.sin(angles)], axis=1) * step * rng.uniform(0.5, 1.5, (corners, 1))
    points = _place(rng, canvas) + np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    cv2.polylines(canvas, [_fixed(points)], False, 1, thickness=thickness, shift=_BITS)


_MAKER_OF: dict[str, Maker] = {"strokes": _stroke, "boxes": _box, "outlines": _blob}

_SHAPES: tuple[Maker, ...] = (_stroke, _box, _ellipse, _blob)


def _mixture(rng: np.random.Generator, canvas: NDArray[np.uint8], area: float) -> None:
    _SHAPES[int(rng.integers(len(_SHAPES)))](rng, canvas, area * rng.uniform(0.2, 0.7))


# Strokes are listed twice: users paint strokes, and most of the published masks are strokes.
_MAKERS: tuple[Maker, ...] = (_stroke, _stroke, _box, _ellipse, _blob, _mixture, _mixture)


class RandomMasks:
    """Random masks for training: `mask(rng, height, width)` draws each band equally often."""

    def __init__(self, bands: Sequence[Band] = BANDS) -> None:
        self.bands = tuple(bands)

    def mask(self, rng: np.random.Generator, height: int, width: int) -> Mask:
        """Return a random mask bool H,W of one of the bands."""
        return random_mask(rng, height, width, self.bands[int(rng.integers(len(self.bands)))])


class MaskFolder:
    """Masks from files of any mode and size: `mask(rng, height, width)` for training, `read` for evaluation.

    Args:
        paths: the mask files. `mask` logs a file that cannot be read or marks no hole once, adds it to `bad` and skips
            it; `read` raises an error that names it if it cannot be read.
        settings: how the files are read; resize, grow and feather are not used.
        cache_bytes: size of the cache of decoded masks, which take one bit per pixel.

    """

    def __init__(
        self, paths: Sequence[Path], settings: MaskSettings | None = None, *, cache_bytes: int = 1 << 29
    ) -> None:
        if not paths:
            raise MisfError("no mask files: expected a folder or a list with at least one picture")
        self.paths = tuple(paths)
        self.settings = settings or MaskSettings()
        self.bad: dict[Path, str] = {}
        self._space = cache_bytes
        self._kept: dict[int, tuple[NDArray[np.uint8], tuple[int, int]]] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int, height: int | None = None, width: int | None = None) -> Mask:
        """Return mask `index` as bool H,W, True = hole, resized (nearest pixel) if a size is given."""
        mask = self._decoded(index)
        if height is None or width is None or mask.shape == (height, width):
            return mask
        return resized_mask(mask, (height, width))

    def mask(self, rng: np.random.Generator, height: int, width: int) -> Mask:
        """Return one of the masks, bool H,W, True = hole, resized, and mirrored at random in both directions.

        The result depends only on the state of `rng`, not on earlier calls.

        Raises:
            MisfError: none of the masks is usable.

        """
        for _ in range(1000):
            mask = self._usable(int(rng.integers(len(self.paths))), height, width)
            if mask is not None:
                flips = rng.random(2) < 0.5
                return mask[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1]
        raise MisfError(
            f"none of {len(self.bad)} masks is usable: {next(iter(self.bad.values()))}, for example; "
            "--invert-mask and --mask-threshold change what counts as a hole"
        )

    def _usable(self, index: int, height: int, width: int) -> Mask | None:
        path = self.paths[index]
        if path in self.bad:
            return None
        try:
            mask = self.read(index, height, width)
            if mask.any() or self.read(index).any():  # resizing may lose a thin hole; the file is still usable
                return mask
            self.bad[path] = f"mask {path} marks no hole"
        except MisfError as error:
            self.bad[path] = str(error)
        log.warning("%s: skipped", self.bad[path])
        return None

    def _decoded(self, index: int) -> Mask:
        if index in self._kept:
            bits, shape = self._kept[index]
            kept: Mask = np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).astype(np.bool_)
            return kept
        try:
            mask = self.settings.hole(open_mask(self.paths[index]), quiet=True)
        except (ValueError, OSError) as error:
            raise MisfError(f"mask {self.paths[index]} cannot be read: {one_line(error)}") from error
        bits = np.packbits(mask)
        if bits.nbytes <= self._space:
            self._space -= bits.nbytes
            self._kept[index] = bits, mask.shape
        return mask
