"""The effect of the dynamic filters: the network with and without them, trained and measured alike, in one table.

    python benchmarks/ablations.py --data photographs/ --val held-out/ --runs runs/ablations

The variants are the paper's ablations (arXiv 2203.06304, table 4): no filter, the image filter only, the feature filter
only at three levels, and both. Every variant sees the same crops and masks in the same order; several seeds show how
much of a difference is chance. The runs of misf-train are in separate folders under --runs; an existing run is resumed
or, if it is finished, only measured, so that this program can be interrupted at any moment.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click

from misf.plugins.shared.command import command
from misf.plugins.shared.errors import MisfError
from misf.plugins.shared.files import written_whole
from misf.training.dataset import Pictures, picture_paths
from misf.training.judging.evaluate import Method, cases, evaluate, model_fill
from misf.training.mask_drawing import BANDS, band_name
from misf.training.model.checkpoint import load_checkpoint
from misf.training.model.config import PRESETS
from misf.training.recipe import ABLATIONS, RECIPES
from misf.training.run_files import RunFolder

log = logging.getLogger("misf.benchmarks")

FOLDER = click.Path(exists=True, path_type=Path)
TITLES = {
    "none": "no filter",
    "image": "picture only",
    "semantic-1": "features only, level 1",
    "semantic-2": "features only, level 2",
    "semantic-3": "features only, level 3",
    "both": "both (level 3)",
}


@command("ablations.py")
@click.option("--data", required=True, type=FOLDER, help="Folder or list of photographs to train on.")
@click.option("--val", required=True, type=FOLDER, help="Folder or list of photographs for the evaluation.")
@click.option("--runs", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for the runs.")
@click.option("--filters", multiple=True, type=click.Choice(list(ABLATIONS)), help="Variants.  [default: all six]")
@click.option("--config", type=click.Choice(list(PRESETS)), default="misf-small", show_default=True)
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="fidelity", show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=500, show_default=True, help="Steps of each run.")
@click.option("--crop", type=click.IntRange(min=8), default=144, show_default=True, help="Side of the crops.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Crops per step.")
@click.option("--seeds", type=click.IntRange(min=1), default=2, show_default=True, help="Runs of each variant.")
@click.option("--device", default="auto", show_default=True, help="As in misf-train.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent / "results",
    help="Folder for ablations.md and .json.  [default: benchmarks/results]",
)
def main(
    data: Path, val: Path, runs: Path, filters: tuple[str, ...], seeds: int, output: Path, **settings: Any
) -> None:
    """Train every variant, measure all, write ablations.md and ablations.json, and print the table.

    \b
    Example:
        python benchmarks/ablations.py --data photographs/ --val held-out/ --runs runs/ablations
    """
    names = [name for name in ABLATIONS if name in (filters or ABLATIONS)]
    for seed in range(seeds):
        for name in names:
            train(runs / f"{name}-{seed}", name, seed, data, settings)
    pictures = Pictures(picture_paths(val))
    rows = []
    for name in names:
        weights = [RunFolder(runs / f"{name}-{seed}").weights for seed in range(seeds)]
        rows.append({"filters": name, **measure(weights, pictures, settings["device"])})
    report = {"data": data.name, "val": val.name, "pictures": len(pictures), "seeds": seeds, **settings, "rows": rows}
    table = markdown(report)
    output.mkdir(parents=True, exist_ok=True)
    for path, text in (("ablations.json", json.dumps(report, indent=2) + "\n"), ("ablations.md", table)):
        with written_whole(output / path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    click.echo(table)
    log.info("wrote %s", output / "ablations.{md,json}")


def train(folder: Path, name: str, seed: int, data: Path, settings: dict[str, Any]) -> None:
    """Start or resume a run, and finish it."""
    run = RunFolder(folder)
    state = run.read_state()
    if state:
        _check_same(run, name, seed, data, settings)
        if state["step"] == settings["steps"]:
            return
    options = ["--data", data, "--filters", name, "--seed", seed, "--save-every", 100]
    for option in ("config", "recipe", "steps", "crop", "batch"):
        options += [f"--{option}", settings[option]]
    if state:
        options = ["--resume"]
    else:
        run.settings.unlink(missing_ok=True)  # it stopped before its first saved state, so it starts again
    options += ["--output", folder, "--device", settings["device"]]
    log.info("%s", folder)
    done = subprocess.run(
        [sys.executable, "-m", "misf.training.train_cli", *map(str, options)], stdout=subprocess.DEVNULL
    )
    if done.returncode:
        raise MisfError(f"the run in {folder} failed, see above: misf-train ended with exit code {done.returncode}")


def _check_same(run: RunFolder, name: str, seed: int, data: Path, settings: dict[str, Any]) -> None:
    """Raise MisfError unless an existing run has the requested settings, which the table reports."""
    recipe = RECIPES[settings["recipe"]]
    recipe = recipe.without_vgg() if recipe.needs_vgg else recipe
    network = replace(PRESETS[settings["config"]], **ABLATIONS[name])
    sizes = {key: settings[key] for key in ("steps", "crop", "batch")}
    wanted = replace(recipe, network=network, seed=seed, **sizes)
    there = run.read_settings()
    if (there["recipe"], there["data"]) != (json.loads(wanted.to_json()), str(data.resolve())):
        raise MisfError(f"{run.path} holds a run of another recipe, size, length or data: give another --runs")


def measure(weights: list[Path], pictures: Pictures, device: str) -> dict[str, Any]:
    """Return the network's size, mean PSNR and SSIM of the runs per band, and each run's overall PSNR."""
    reports = []
    for path in weights:
        method = Method(path.parent.name, model_fill(path, device=device)[0])
        for _ in evaluate([method], cases(pictures)):
            pass
        reports.append(method.report())
    bands = {
        band: {key: mean(report["bands"][band][key] for report in reports) for key in ("psnr_db", "ssim")}
        for band in map(band_name, BANDS)
    }
    parameters = sum(tensor.numel() for tensor in load_checkpoint(weights[0]).weights.values())
    return {"parameters": parameters, "bands": bands, "psnr_db": [report["all"]["psnr_db"] for report in reports]}


def markdown(report: dict[str, Any]) -> str:
    """Return the table in Markdown, with the settings."""
    bands = [band_name(band) for band in BANDS]
    head = ["filters", "parameters", *(f"{band} {metric}" for band in bands for metric in ("PSNR", "SSIM"))]
    head += ["all, PSNR", "seeds differ by"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in report["rows"]:
        cells = [
            f"{row['bands'][band][key]:{form}}" for band in bands for key, form in (("psnr_db", ".2f"), ("ssim", ".4f"))
        ]
        spread = f"{stdev(row['psnr_db']):.3f}" if len(row["psnr_db"]) > 1 else "-"
        cells = [
            TITLES[row["filters"]],
            f"{row['parameters'] / 1e6:.2f} M",
            *cells,
            f"{mean(row['psnr_db']):.3f}",
            spread,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{report['config']}, recipe {report['recipe']}, {report['steps']} steps of {report['batch']} crops of "
        f"{report['crop']}, means of {report['seeds']} seeds (the last column: their standard deviation), on "
        f"{report['pictures']} photographs ({report['val']}), centre crops of 256x256, masks of seed 0. PSNR in dB.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
