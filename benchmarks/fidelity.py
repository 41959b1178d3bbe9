"""Fidelity of a model and of the classical methods, as a table (Markdown, JSON) and a grid of pictures.

    python benchmarks/fidelity.py --model best.onnx --data photographs/

The table is measured on --data or, without it, on the few photographs that come with scikit-image. The grid shows only
the latter, which may be published.
"""

from __future__ import annotations

import itertools
import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from misf.plugins.shared.command import command, misf_version
from misf.plugins.shared.files import written_whole
from misf.training.dataset import Pictures, picture_paths
from misf.training.judging.baselines import PEERS
from misf.training.judging.evaluate import Case, Method, cases, centre_crop, document, evaluate, model_fill
from misf.training.mask_drawing import BANDS, band_name, random_mask

log = logging.getLogger("misf.benchmarks")

SHOWN = ("astronaut", "chelsea", "coffee", "rocket")
SIZE = 256
GAP, HEAD = 6, 26  # pixels between the pictures of the grid, and above its columns


@command("fidelity.py")
@click.option(
    "--model", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Model file."
)
@click.option("--name", help="Name of the model in the results.  [default: its file's name]")
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), help="Folder or list of photographs for the evaluation."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the masks.")
@click.option(
    "--per-band", type=click.IntRange(min=1), help="Number of pictures, spread evenly over the data.  [default: all]"
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent / "results",
    help="Folder for fidelity.md, .json and .jpg.  [default: benchmarks/results]",
)
def main(model: Path, name: str | None, data: Path | None, seed: int, per_band: int | None, output: Path) -> None:
    """Write fidelity.md, fidelity.json and fidelity.jpg, and print the table.

    \b
    Example:
        python benchmarks/fidelity.py --model best.onnx --data photographs/
    """
    fill, where = model_fill(model)
    ours = Method(name or model.name, fill, path=model, where=where)
    methods = [ours, *(Method(peer, fill, where="cpu") for peer, fill in PEERS.items())]
    pictures = Pictures(picture_paths(data) if data else _skimage_files(), cache_bytes=0)
    for number, (case, _) in enumerate(evaluate(methods, cases(pictures, size=SIZE, seed=seed, per_band=per_band)), 1):
        log.debug("%d: %s", number, case.name)
    settings = {"size": SIZE, "seed": seed, "per_band": per_band}
    label = data.name if data else "scikit-image's " + ", ".join(SHOWN)
    report = {
        "misf": misf_version(),
        "versions": {package: version(package) for package in ("numpy", "scikit-image", "opencv-python-headless")},
        **document(methods, label, pictures, settings, details=False),
    }
    report["ours_over_best_peer"] = margins(report["methods"])
    table = markdown(report)
    output.mkdir(parents=True, exist_ok=True)
    _write(output / "fidelity.json", json.dumps(report, indent=2) + "\n")
    _write(output / "fidelity.md", table)
    with written_whole(output / "fidelity.jpg") as temporary:
        grid([shown for shown in methods if shown is ours or shown.name == "telea"], seed).save(
            temporary, quality=92, subsampling=0
        )
    click.echo(table)
    log.info("wrote %s", output / "fidelity.{md,json,jpg}")


def margins(reports: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, per band, the margins in PSNR (dB) and SSIM of the first method over the best of the others."""
    result = {}
    for band in map(band_name, BANDS):
        ours, *peers = (report["bands"][band] for report in reports)
        result[band] = {key: round(ours[key] - max(peer[key] for peer in peers), 4) for key in ("psnr_db", "ssim")}
    return result


def markdown(report: dict[str, Any]) -> str:
    """Return the table in Markdown, with the data and settings."""
    bands = [band_name(band) for band in BANDS]
    head = ["", *(f"{band} {metric}" for band in bands for metric in ("PSNR", "SSIM"))]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for method in report["methods"]:
        cells = [f"{method['bands'][b]['psnr_db']:.2f} | {method['bands'][b]['ssim']:.4f}" for b in bands]
        lines.append(f"| {method['name']} | " + " | ".join(cells) + " |")
    over = report["ours_over_best_peer"]
    cells = [f"{over[b]['psnr_db']:+.2f} | {over[b]['ssim']:+.4f}" for b in bands]
    lines.append("| *first, over the best other* | " + " | ".join(cells) + " |")
    data, settings = report["data"], report["settings"]
    count = report["methods"][0]["bands"][bands[0]]["pictures"]
    lines += [
        "",
        f"On {count} photographs ({data['name']}), centre crops of {settings['size']}x{settings['size']} pixels, "
        f"random masks of seed {settings['seed']}. Measured: {report['metrics']}.",
    ]
    return "\n".join(lines) + "\n"


def grid(methods: list[Method], seed: int) -> Image.Image:
    """Return a grid of the publishable photographs in every band: the hole, the methods' results and the truth.

    The methods' measurements do not change.
    """
    rows = list(itertools.product(zip(SHOWN, _skimage_files(), strict=True), BANDS))
    columns = ["hole", *(method.name for method in reversed(methods)), "truth"]
    step = SIZE + GAP
    sheet = Image.new("RGB", (len(columns) * step - GAP, HEAD + len(rows) * step - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        draw.text((column * step + SIZE / 2, HEAD / 2), title, "black", ImageFont.load_default(16), anchor="mm")
    for row, ((name, path), band) in enumerate(rows):
        picture = Pictures([path], short_side=SIZE).get(0)
        if picture is None:
            raise ValueError(f"scikit-image's {name} cannot be read")
        hole = random_mask(np.random.default_rng([seed, row]), SIZE, SIZE, band)
        case = Case(name, band_name(band), centre_crop(picture, SIZE), hole)
        filled = [Method(method.name, method.fill).measure(case) for method in reversed(methods)]
        white = np.where(hole[:, :, None], np.uint8(255), case.truth)
        for column, image in enumerate([white, *filled, case.truth]):
            sheet.paste(Image.fromarray(np.asarray(image, np.uint8)), (column * step, HEAD + row * step))
    return sheet


def _skimage_files() -> list[Path]:
    """Return the files of the photographs in scikit-image's package."""
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    return [next(folder.glob(f"{name}.*g")) for name in SHOWN]


def _write(path: Path, text: str) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
