"""Measures any filling method on the same pictures and masks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...plugins.shared.command import one_line
from ...plugins.shared.errors import MisfError
from ...plugins.shared.files import sha256
from ...runtime.pictures.geometry import Mask
from ..dataset import Pictures
from ..mask_drawing import BANDS, KINDS, MaskFolder, band_name, band_of, mask_of_kind, random_mask
from .baselines import Fill
from .metrics import compare, mean_of, paste

if TYPE_CHECKING:
    from torch import nn

Picture = NDArray[np.uint8]
Distance = Callable[[Picture, Picture], float]

METRICS = (
    "means over pictures, measured on the 8-bit composite: PSNR in dB; SSIM with a Gaussian window of sigma 1.5, "
    "averaged over RGB; L1 in percent of the full range; hole PSNR over the pixels in the hole; if their weights were "
    "given, LPIPS (AlexNet) and the feature distance of an EfficientNet-Lite (lite0 to lite2)"
)

#: What results are averaged over, and the names of the groups.
GROUPS: dict[str, tuple[str, ...]] = {"band": tuple(map(band_name, BANDS)), "kind": KINDS}


@dataclass(frozen=True)
class Case:
    """One picture with one mask: `truth` uint8 size,size,3 RGB and `hole` bool size,size; `group` is one of GROUPS'."""

    name: str
    group: str
    truth: Picture
    hole: Mask

    @property
    def damaged(self) -> Picture:
        """The picture with its hole set to 0, as the methods see it; uint8 size,size,3."""
        return np.where(self.hole[:, :, None], 0, self.truth).astype(np.uint8)


def centre_crop(picture: Picture, size: int, resize: bool = False) -> Picture:
    """Return the middle square of a picture uint8 H,W,3 as uint8 size,size,3.

    Args:
        picture: if a side is smaller than `size`, the largest middle square is enlarged.
        size: side of the square in pixels.
        resize: resize the largest middle square instead of cropping at native pixels.

    """
    side = min(picture.shape[:2]) if resize else min(size, *picture.shape[:2])
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    square = picture[top : top + side, left : left + side]
    if side != size:
        square = np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS))
    return np.ascontiguousarray(square)


def cases(
    pictures: Pictures,
    *,
    size: int = 256,
    seed: int = 0,
    per_band: int | None = None,
    masks: MaskFolder | None = None,
    resize: bool = False,
    by: str = "band",
) -> Iterator[Case]:
    """Yield the centre crop of each picture once per band (or kind of mask), with a mask of that band.

    Args:
        pictures: those that cannot be decoded are skipped (they are in `pictures.bad`).
        size: side of the crops in pixels.
        seed: the masks depend only on the seed, the band or kind, and the picture's position in the list.
        per_band: number of pictures, spread evenly over the list; None uses all.
        masks: a source of masks, used in their order and grouped by area; None generates masks. A band for which it has
            no mask has no cases.
        resize: shrink the whole middle square to `size` instead of cropping at native pixels.
        by: band, or kind, for which `masks` has to be None.

    """
    chosen: Sequence[int] = range(len(pictures))
    if per_band is not None and per_band < len(chosen):
        chosen = [round(i * (len(pictures) - 1) / max(per_band - 1, 1)) for i in range(per_band)]
    groups = _grouped(masks, size) if masks else {}
    names = names_of(pictures.paths)
    for place, index in enumerate(chosen):
        picture = pictures.get(index)
        if picture is None:
            continue
        truth = centre_crop(picture, size, resize)
        for number, group in enumerate(GROUPS[by]):
            rng = np.random.default_rng([seed, number, index])
            if by == "kind":
                hole = mask_of_kind(rng, size, size, group)
            elif masks is None:
                hole = random_mask(rng, size, size, BANDS[number])
            elif groups[group]:
                hole = masks.read(groups[group][place % len(groups[group])], size, size)
            else:
                continue
            yield Case(names[pictures.paths[index]], group, truth, hole)


def names_of(paths: Sequence[Path]) -> dict[Path, str]:
    """Return a name for each file: its path below their common folder, with forward slashes."""
    full = {path: path.absolute() for path in paths}
    shared = os.path.commonpath([path.parent for path in full.values()])
    return {path: name.relative_to(shared).as_posix() for path, name in full.items()}


def _grouped(masks: MaskFolder, size: int) -> dict[str, list[int]]:
    """Return the mask indices of each band."""
    groups: dict[str, list[int]] = {band: [] for band in GROUPS["band"]}
    for index in range(len(masks)):
        band = band_of(masks.read(index, size, size))
        if band is not None:
            groups[band_name(band)].append(index)
    return groups


def distance_of(network: nn.Module) -> Distance:
    """Return a network's distance of tensors (truth, result) N,3,H,W in [0,1] as one of pictures uint8 H,W,3."""
    import torch

    def distance(truth: Picture, result: Picture) -> float:
        pair = [torch.from_numpy(x.transpose(2, 0, 1)[None].copy()).float() / 255 for x in (truth, result)]
        with torch.inference_mode():
            return float(network(*pair))

    return distance


@dataclass
class Method:
    """A way to fill holes, and its measurements so far."""

    name: str
    fill: Fill
    path: Path | None = None
    where: str = ""
    rows: list[dict[str, float]] = field(default_factory=list)
    labels: list[tuple[str, str]] = field(default_factory=list)
    fill_ms: list[float] = field(default_factory=list)

    def measure(self, case: Case, distances: Mapping[str, Distance] | None = None) -> Picture:
        """Return the composite for `case`, uint8 size,size,3, and record its metrics and the distances, by name.

        Raises:
            ValueError: the prediction is not finite; the message names the method and the picture.

        """
        start = time.perf_counter()
        filling = self.fill(case.damaged, case.hole)
        self.fill_ms.append(1000 * (time.perf_counter() - start))
        try:
            result = paste(case.truth, filling, case.hole)
        except ValueError as error:
            raise ValueError(f"{self.name} on {case.name}: {error}") from error
        row = compare(case.truth, result, case.hole)
        row |= {name: distance(case.truth, result) for name, distance in (distances or {}).items()}
        self.rows.append(row)
        self.labels.append((case.name, case.group))
        return result

    def report(self, by: str = "band") -> dict[str, Any]:
        """Return name, backend, time, and the mean of each metric per band (or kind) and overall, ready for JSON."""
        groups = {}
        for group in GROUPS[by]:
            rows = [row for row, (_, of) in zip(self.rows, self.labels, strict=True) if of == group]
            groups[group] = {"pictures": len(rows), **mean_of(rows)}
        return {
            "name": self.name,
            "where": self.where,
            "median_fill_ms": round(median(self.fill_ms), 2) if self.fill_ms else None,
            f"{by}s": groups,
            "all": {"pictures": len(self.rows), **mean_of(self.rows)},
        }

    def details(self, by: str = "band") -> list[dict[str, Any]]:
        """Return one entry per picture and mask: picture, band (or kind) and metrics."""
        return [{"picture": name, by: group, **row} for row, (name, group) in zip(self.rows, self.labels, strict=True)]


def model_fill(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    device: str | None = None,
    precision: str = "auto",
) -> tuple[Fill, str]:
    """Return a model file as a filling method, and where it runs, such as 'onnxruntime cpu fp32'.

    Arguments and errors are those of `misf.runtime.backends.open_backend`.
    """
    from ...runtime.backends import open_backend

    run = open_backend(path, backend, device, precision)

    def fill(picture: Picture, hole: Mask) -> NDArray[np.generic]:
        image = np.ascontiguousarray(picture.transpose(2, 0, 1)[None], np.float32) / np.float32(255)
        try:
            filled: NDArray[np.float32] = run(image, hole[None, None].astype(np.float32))[0]
        except Exception as error:  # the backends' exceptions share no base class
            size = f"{picture.shape[1]}x{picture.shape[0]}"
            raise MisfError(f"{Path(path).name} fails at a picture of {size}: {one_line(error)}") from error
        return filled.transpose(1, 2, 0)

    return fill, f"{run.name} {run.device} {run.precision}"


def evaluate(
    methods: Sequence[Method], measured: Iterable[Case], distances: Mapping[str, Distance] | None = None
) -> Iterator[tuple[Case, list[Picture]]]:
    """Measure every method on every case; yield each case with its composites in the order of `methods`."""
    for case in measured:
        yield case, [method.measure(case, distances) for method in methods]


def document(
    methods: Sequence[Method],
    data: str,
    pictures: Pictures,
    settings: dict[str, Any],
    *,
    details: bool,
    by: str = "band",
) -> dict[str, Any]:
    """Return the data, the settings and the results of each method, ready for JSON, without absolute paths.

    Args:
        methods: the methods, after `evaluate`.
        data: the name of the pictures' folder or list.
        pictures: the pictures of the evaluation.
        settings: size, seed and so on, as given.
        details: also include one entry per method, picture and mask.
        by: as for `cases`.

    """
    reports = []
    names = names_of(pictures.paths)
    for method in methods:
        digest = None if method.path is None else sha256(method.path)
        pages = {"details": method.details(by)} if details else {}
        reports.append({**method.report(by), "sha256": digest, **pages})
    return {
        "data": {
            "name": data,
            "pictures": len(pictures),
            "bad": [{"name": names[path], "reason": reason} for path, reason in pictures.bad.items()],
        },
        "settings": settings,
        "metrics": METRICS,
        "methods": reports,
    }
