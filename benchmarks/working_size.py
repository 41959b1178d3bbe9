"""Finds the best working size: PSNR in the hole and time, for holes of several sizes in full-size photographs.

    python benchmarks/working_size.py misf-small --data photographs/

Every picture gets one elliptic hole of each size at a seeded position, and each hole is filled at each working size
with the strategy `crop`, as misf-run does. NetworkConfig.working_size is chosen by this table.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np

from misf.plugins.shared.command import command
from misf.plugins.shared.shipped import ModelFile
from misf.runtime import Inpainter
from misf.runtime.pictures.image_io import read_rgb
from misf.training.dataset import picture_paths


def ellipse(shape: tuple[int, int], side: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mask bool H,W with an ellipse of about `side` pixels at a random position."""
    height, width = side, max(8, int(side * rng.uniform(0.6, 1.0)))
    top, left = rng.integers(0, shape[0] - height), rng.integers(0, shape[1] - width)
    y, x = np.ogrid[: shape[0], : shape[1]]
    return ((y - top - height / 2) / (height / 2)) ** 2 + ((x - left - width / 2) / (width / 2)) ** 2 <= 1


@command("working_size")
@click.argument("model", type=ModelFile())
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path), help="Folder or list of pictures.")
@click.option(
    "--side", "sides", type=int, multiple=True, default=(48, 128, 320), show_default=True, help="Size of the holes."
)
@click.option("--working-size", "sizes", type=int, multiple=True, default=(192, 256, 384, 512, 768), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(model: Path, data: Path, sides: tuple[int, ...], sizes: tuple[int, ...], seed: int) -> None:
    """Print a table of PSNR in the hole (dB, mean over the pictures) and seconds per hole, by hole and working size."""
    inpainters = {size: Inpainter(model, strategy="crop", working_size=size) for size in sizes}
    print("| hole, pixels | " + " | ".join(f"working size {size}" for size in sizes) + " |")
    print("| ---: |" + " ---: |" * len(sizes))
    for side in sides:
        decibels: dict[int, list[float]] = {size: [] for size in sizes}
        seconds = dict.fromkeys(sizes, 0.0)
        for number, path in enumerate(picture_paths(data)):
            picture = read_rgb(path)
            if min(picture.shape[:2]) <= side:
                continue
            hole = ellipse(picture.shape[:2], side, np.random.default_rng((seed, side, number)))
            for size, inpaint in inpainters.items():
                started = time.perf_counter()
                filled = inpaint(np.where(hole[..., None], 0, picture).astype(np.uint8), hole)
                seconds[size] += time.perf_counter() - started
                error = (filled[hole].astype(float) - picture[hole]) / 255
                decibels[size].append(-10 * np.log10(max(float(np.mean(error**2)), 1e-8)))
        cells = (f"{np.mean(decibels[size]):.2f}, {seconds[size] / len(decibels[size]):.2f} s" for size in sizes)
        print(f"| {side} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
