"""How far a model is from the PyTorch reference, and whether that is close enough.

`misf-verify` uses it, and `misf-export` on its output. Finished pictures of real photographs are compared, since errors
on noise say little about errors on photographs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ...plugins.shared.command import one_line
from ...plugins.shared.errors import MisfError
from ..engines.side_car import Limits

Array = NDArray[np.float32]
Inpaint = Callable[[Array, Array], Array]
"""image float32 N,3,H,W in [0,1] and mask float32 N,1,H,W (1 = hole) -> the finished picture N,3,H,W."""

SAMPLES = Path(__file__).parent.parent / "samples"

SIZES = ((1, 256, 256), (1, 192, 320), (2, 128, 160), (1, 131, 93))
"""N, H, W of the default cases: the training size, a non-square one, a batch, and a size that must be padded."""


def default_sizes(limits: Limits | None = None) -> tuple[tuple[int, int, int], ...]:
    """Return SIZES or, for an engine, the nearest sizes that it supports, and its minimum and optimum."""
    if limits is None:
        return SIZES
    low, high = limits.min, limits.max
    near = [tuple(min(max(side, low[axis]), high[axis]) for axis, side in enumerate(size)) for size in SIZES]
    return tuple(dict.fromkeys((low, limits.opt, *((n, height, width) for n, height, width in near))))


@dataclass(frozen=True)
class Tolerance:
    """The limits for a precision; None sets no limit."""

    max_abs: float | None = None
    min_psnr_db: float | None = None


TOLERANCES = {
    # Float32 implementations differ only by the order of their sums: 4e-7 with the shipped weights, 1e-5 at the
    # published sizes; instance norms of untrained networks can raise this to 1e-4.
    "fp32": Tolerance(max_abs=1e-4),
    # On average well below one step of an 8-bit picture (1/255 everywhere is 48 dB).
    "fp16": Tolerance(min_psnr_db=50.0),
    # bfloat16 has 8 bits of mantissa.
    "bf16": Tolerance(min_psnr_db=45.0),
}


def tolerance(*precisions: str) -> Tolerance:
    """Return the loosest tolerance of several precisions: that of a file, and that of a backend's computation."""
    return max((TOLERANCES[precision] for precision in precisions), key=list(TOLERANCES.values()).index)


@dataclass(frozen=True)
class CaseResult:
    """One comparison; PSNR in dB for a peak of 1, infinite if both pictures are equal."""

    size: str
    finite: bool
    known_equal: bool
    max_abs: float
    mean_abs: float
    psnr_hole_db: float
    psnr_db: float

    def faults(self, tolerance: Tolerance) -> list[str]:
        """Return a description of each missed tolerance; empty if the case passes."""
        found = []
        if not self.finite:
            found.append(f"{self.size}: NaN or infinite values")
        if not self.known_equal:
            found.append(f"{self.size}: known pixels were changed")
        if tolerance.max_abs is not None and not self.max_abs <= tolerance.max_abs:
            found.append(f"{self.size}: largest difference {self.max_abs:.1e}, allowed {tolerance.max_abs:.0e}")
        if tolerance.min_psnr_db is not None and not self.psnr_hole_db >= tolerance.min_psnr_db:
            found.append(f"{self.size}: {self.psnr_hole_db:.1f} dB in the hole, needed {tolerance.min_psnr_db:g} dB")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON: infinity and NaN become null."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def compare(inpaint: Inpaint, reference: Inpaint, image: Array, mask: Array) -> CaseResult:
    """Return how `inpaint` differs from `reference` on one batch (shapes and ranges as for `Inpaint`).

    Raises:
        MisfError: the model raises any exception, or returns another shape.

    """
    hole = np.broadcast_to(mask > 0.5, image.shape)
    size = "x".join(map(str, (image.shape[0], *image.shape[2:])))
    try:
        which = "reference"
        wanted = reference(image, mask)
        which = "model"
        got = inpaint(image, mask)
    except Exception as error:  # the backends' exceptions share no base class
        raise MisfError(f"the {which} fails at {size}: {one_line(error)}") from error
    if got.shape != wanted.shape:
        raise MisfError(f"the model returned a picture of shape {got.shape} for {size}, expected {wanted.shape}")
    difference = np.abs(got.astype(np.float64) - wanted.astype(np.float64))
    return CaseResult(
        size=size,
        finite=bool(np.isfinite(got).all()),
        known_equal=bool(np.array_equal(got[~hole], image[~hole])),
        max_abs=float(difference.max(initial=0)),
        mean_abs=float(difference.mean()),
        psnr_hole_db=_psnr_db(difference[hole]),
        psnr_db=_psnr_db(difference),
    )


def _psnr_db(difference: NDArray[np.float64]) -> float:
    mse = float(np.square(difference).mean()) if difference.size else 0.0
    return math.inf if mse == 0 else -10 * math.log10(mse)


def cases(
    photographs: Sequence[NDArray[np.uint8]], sizes: Iterable[tuple[int, int, int]] = SIZES
) -> Iterator[tuple[Array, Array]]:
    """Yield (image N,3,H,W, mask N,1,H,W) for each size, cut from photographs (uint8 H,W,3), with a few holes."""
    rng = np.random.default_rng(0)
    turn = 0
    for batch, height, width in sizes:
        images, masks = [], []
        for _ in range(batch):
            images.append(_cut(photographs[turn % len(photographs)], height, width))
            masks.append(_holes(rng, height, width))
            turn += 1
        yield np.stack(images), np.stack(masks)


def _cut(photograph: NDArray[np.uint8], height: int, width: int) -> Array:
    """Return the middle of a photograph as float32 3,H,W in [0,1], padded by reflection if it is too small."""
    border = [(max(0, want - have), 0) for want, have in zip((height, width), photograph.shape[:2], strict=True)]
    padded = np.pad(photograph, [*border, (0, 0)], mode="symmetric")
    top, left = (padded.shape[0] - height) // 2, (padded.shape[1] - width) // 2
    cut = padded[top : top + height, left : left + width].transpose(2, 0, 1)
    return np.ascontiguousarray(cut, dtype=np.float32) / np.float32(255)


def _holes(rng: np.random.Generator, height: int, width: int) -> Array:
    """Return a mask float32 1,H,W with an ellipse and a bar as holes, roughly a fifth of the area."""
    y, x = np.mgrid[0:height, 0:width]
    centre_y, centre_x = rng.uniform(0.3, 0.7, 2) * (height, width)
    ellipse = ((y - centre_y) / (0.22 * height)) ** 2 + ((x - centre_x) / (0.22 * width)) ** 2 <= 1
    top = int(rng.uniform(0, 0.9) * height)
    ellipse[top : top + max(1, height // 16)] = True
    holes: Array = ellipse[None].astype(np.float32)
    return holes


SAMPLE_NAMES = ("astronaut", "chelsea", "coffee", "rocket")
"""Whatever else a user has put beside them."""


def load_photographs(folder: Path = SAMPLES) -> list[NDArray[np.uint8]]:
    """Return the pictures of a folder as uint8 H,W,3 RGB, sorted by name; the shipped samples by default.

    Raises:
        ValueError: the folder contains no pictures, or one that cannot be read.

    """
    from ..pictures.image_io import read_rgb

    shown = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found = sorted(path for path in shown if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    names = [path for path in found if folder != SAMPLES or path.stem in SAMPLE_NAMES]
    if not names:
        raise ValueError(f"expected .jpg, .png or .webp pictures in {folder}, found none")
    return [read_rgb(name) for name in names]


def torch_reference(network: Any) -> Inpaint:
    """Return a network of `misf.training` as an `Inpaint` on the CPU in float32, the reference for everything else."""
    import torch

    from ...training.model.network import composite

    def inpaint(image: Array, mask: Array) -> Array:
        with torch.inference_mode():
            picture, hole = torch.from_numpy(image), torch.from_numpy(mask)
            return cast(Array, composite(picture, network(picture, hole), hole).numpy())

    return inpaint


def results_table(results: Sequence[CaseResult], title: str) -> Any:
    """Return the results as a rich table."""
    from rich.table import Table

    table = Table(title=title)
    for heading in ("N x H x W", "max abs", "mean abs", "PSNR hole", "PSNR", "finite", "known"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.size,
            f"{result.max_abs:.1e}",
            f"{result.mean_abs:.1e}",
            f"{result.psnr_hole_db:.1f} dB",
            f"{result.psnr_db:.1f} dB",
            "yes" if result.finite else "NO",
            "equal" if result.known_equal else "CHANGED",
        )
    return table
