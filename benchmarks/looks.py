"""Measures how fills look: detail, grid artefacts and feature distance in addition to PSNR and SSIM, per mask band.

The values are means over the pictures of a band:

- PSNR and SSIM of the composite, as in `misf-eval`.
- Lite2: the feature distance of EfficientNet-Lite2, as in `misf-eval --feature-distance`.
- gradient: the sum of absolute differences of neighbouring pixels in the hole, over the band's pictures, as a fraction
  of the truth's.
- grid: the fraction of the fill's high frequencies, and of the variations of their strength, that depends on the
  pixel's position modulo 2, 4, 8 and 16 (the largest of the eight), minus that of the truth; near 0 without a grid.
"""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, gaussian_filter

from misf.plugins.shared.command import command
from misf.training.dataset import Pictures, picture_paths
from misf.training.efficientnet import load_feature_distance
from misf.training.judging.baselines import PEERS
from misf.training.judging.evaluate import GROUPS, Case, Method, Picture, cases, distance_of, model_fill
from misf.training.mask_drawing import Mask

log = logging.getLogger("misf.benchmarks")

PERIODS = (2, 4, 8, 16)
TILE = 64  # pixels
KINDS = ("detail", "strength")
Plane = NDArray[np.float64]


@command("looks.py")
@click.option(
    "--model",
    "models",
    multiple=True,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Checkpoint or model file; may be repeated. The others are compared with the first one.",
)
@click.option(
    "--peers", is_flag=True, help="Also measure OpenCV's Telea and Navier-Stokes and scikit-image's biharmonic."
)
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path), help="Folder or list of pictures.")
@click.option(
    "--backbone",
    default="lite2",
    show_default=True,
    help="EfficientNet of the feature distance, or the file of its weights.",
)
@click.option(
    "--per-band", type=click.IntRange(min=1), help="Number of pictures, spread evenly over the data.  [default: all]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
def main(models: tuple[Path, ...], peers: bool, data: Path, backbone: str, per_band: int | None, as_json: bool) -> None:
    """Print the table for centre crops of 256x256 and seeded masks.

    \b
    Example:
        python benchmarks/looks.py --model old.safetensors --model new.safetensors --peers --data held-out/
    """
    methods = [Method(path.parent.name + "/" + path.name, model_fill(path)[0]) for path in models]
    methods += [Method(name, fill) for name, fill in PEERS.items()] if peers else []
    network = load_feature_distance(backbone)
    distances = {network.variant: distance_of(network)}
    detail: list[list[dict[str, float]]] = [[] for _ in methods]
    for case in cases(Pictures(picture_paths(data), cache_bytes=0), per_band=per_band):
        for method, rows in zip(methods, detail, strict=True):
            rows.append(_detail(case, method.measure(case, distances)))
    reports = [_report(method, network.variant, rows) for method, rows in zip(methods, detail, strict=True)]
    click.echo(json.dumps(reports, indent=2) if as_json else markdown(reports, network.variant))


def _detail(case: Case, result: Picture) -> dict[str, float]:
    """Return the sums from which gradient energy and grid shares are computed."""
    found = {}
    for name, picture in (("fill", result), ("truth", case.truth)):
        grey = picture.astype(np.float64).mean(axis=2)
        found[f"gradient_{name}"] = gradient_sum(grey, case.hole)
        for period in PERIODS:
            shares = grid_shares(grey, case.hole, period)
            found |= {f"{kind}{period}_{name}": share for kind, share in zip(KINDS, shares, strict=True)}
    return found


def gradient_sum(grey: Plane, hole: Mask) -> float:
    """Return the sum of absolute differences of horizontal and vertical neighbours in the hole."""
    down, across = np.abs(np.diff(grey, axis=0)), np.abs(np.diff(grey, axis=1))
    return float((down * (hole[1:] & hole[:-1])).sum() + (across * (hole[:, 1:] & hole[:, :-1])).sum())


def grid_shares(grey: Plane, hole: Mask, period: int) -> tuple[float, float]:
    """Return the fraction of the energy that is in the means by position modulo `period`, of the two KINDS.

    They are computed in tiles of TILE pixels that are mostly inside the hole, away from its edges; NaN if there are
    none. By chance alone they are about period^2 / TILE^2, also for the truth.

    detail: what a blur of sigma 2 takes away. Its sign may change from tile to tile.
    strength: the variations of its absolute value, what a blur of sigma 6 takes away; strokes in a grid have it,
        whatever their signs.
    """
    inside = binary_erosion(hole, iterations=4)
    detail = grey - gaussian_filter(grey, 2.0)
    strength = np.where(inside, np.abs(detail), 0.0)
    around = gaussian_filter(strength, 6.0) / np.maximum(gaussian_filter(inside.astype(np.float64), 6.0), 1e-3)
    return _grid_share(detail, inside, period), _grid_share(strength - around, inside, period)


def _grid_share(fine: Plane, inside: Mask, period: int) -> float:
    energy = explained = 0.0
    for top in range(0, fine.shape[0] - TILE + 1, TILE // 2):
        for left in range(0, fine.shape[1] - TILE + 1, TILE // 2):
            where = inside[top : top + TILE, left : left + TILE]
            if where.mean() < 0.5:
                continue
            tile = np.where(where, fine[top : top + TILE, left : left + TILE], 0.0)
            sums, counts = _by_place(tile, period), _by_place(where.astype(np.float64), period)
            energy += float((tile**2).sum())
            explained += float((sums**2 / np.maximum(counts, 1)).sum() - tile.sum() ** 2 / where.sum())
    return explained / energy if energy else float("nan")


def _by_place(tile: Plane, period: int) -> Plane:
    folded: Plane = tile.reshape(TILE // period, period, TILE // period, period).sum(axis=(0, 2))
    return folded


def _report(method: Method, variant: str, rows: list[dict[str, float]]) -> dict[str, Any]:
    bands = {}
    means = method.report()["bands"]
    for band in GROUPS["band"]:
        chosen = [index for index, (_, of) in enumerate(method.labels) if of == band]
        sums = {key: sum(rows[i][key] for i in chosen) for key in ("gradient_fill", "gradient_truth")}
        excess = {
            f"{kind}{period}": float(
                np.nanmean([rows[i][f"{kind}{period}_fill"] - rows[i][f"{kind}{period}_truth"] for i in chosen])
            )
            for kind, period in itertools.product(KINDS, PERIODS)
        }
        bands[band] = {
            **{key: means[band][key] for key in ("psnr_db", "ssim", variant)},
            "gradient": sums["gradient_fill"] / sums["gradient_truth"],
            "grid": max(excess.values()),
            "grids": excess,
        }
    return {"name": method.name, "bands": bands}


def markdown(reports: list[dict[str, Any]], variant: str) -> str:
    """Return the table; distances are also given as the change from the first method in percent."""
    head = f"| hole | | PSNR dB | SSIM | {variant.capitalize()} | change | gradient | grid |"
    lines = [head, "| --- | --- " + "| ---: " * 6 + "|"]
    for band in GROUPS["band"]:
        first = reports[0]["bands"][band]
        for report in reports:
            row = report["bands"][band]
            change = 100 * (row[variant] / first[variant] - 1)
            lines.append(
                f"| {band} | {report['name']} | {row['psnr_db']:.2f} | {row['ssim']:.4f} | {row[variant]:.4f} "
                f"| {change:+.1f} % | {row['gradient']:.2f} | {row['grid']:+.3f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
