"""misf-eval: how well any model and the classical methods fill holes, per band or kind of mask."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...plugins.shared.command import command, misf_version, print_json
from ...plugins.shared.errors import BATCH_FAILURES, MisfError
from ...plugins.shared.extras import need
from ...plugins.shared.progress import progress
from ...plugins.shared.shipped import ModelFile
from ...runtime.backends.contract import BACKENDS, PRECISIONS
from ...runtime.mask_options import READING, mask_options
from ..model.options import official_option

if TYPE_CHECKING:
    from ...runtime.pictures.masks import MaskSettings
    from ..dataset import Pictures
    from ..mask_drawing import MaskFolder
    from .evaluate import Distance, Method

log = logging.getLogger(__name__)

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@command("misf-eval")
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    type=ModelFile(weights=True),
    help="Checkpoint to measure; may be repeated.",
)
@click.option(
    "--model", "models", multiple=True, type=ModelFile(), help="Model file to measure (.onnx, ...); may be repeated."
)
@official_option
@click.option(
    "--peers", is_flag=True, help="Also measure OpenCV's Telea and Navier-Stokes and scikit-image's biharmonic."
)
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path), help="Folder or list of pictures.")
@click.option("--masks", default="random", show_default=True, help="random, or a folder or list of mask files.")
@mask_options(READING)
@click.option("--size", type=click.IntRange(min=32), default=256, show_default=True, help="Side of the centre crop.")
@click.option(
    "--resize",
    is_flag=True,
    help="Shrink the whole middle square to --size, as the official evaluation does, instead of cropping.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random masks.")
@click.option(
    "--per-band",
    type=click.IntRange(min=1),
    help="Number of pictures to measure, spread evenly over the data.  [default: all]",
)
@click.option(
    "--by",
    type=click.Choice(["band", "kind"]),
    default="band",
    show_default=True,
    help="Group the results by the hole's share of the picture, or by the shape of random masks: strokes, boxes, a "
    "centre box, outlines.",
)
@click.option("--lpips", "backbone", type=FILE, help="torchvision's AlexNet weights, for LPIPS.")
@click.option(
    "--feature-distance",
    metavar="NAME|FILE",
    help="EfficientNet for the feature distance: lite2 (extra `looks`), or a file of its weights.",
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="The library that runs the model files.",
)
@click.option("--device", envvar="MISF_DEVICE", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="auto",
    show_default=True,
    help="Precision of the computation.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document, with every picture's numbers, on stdout."
)
def main(
    checkpoints: tuple[Path, ...],
    models: tuple[Path, ...],
    peers: bool,
    data: Path,
    masks: str,
    invert_mask: bool,
    mask_threshold: int,
    mask_values: tuple[int, ...] | None,
    size: int,
    resize: bool,
    seed: int,
    per_band: int | None,
    by: str,
    backbone: Path | None,
    feature_distance: str | None,
    backend: str,
    device: str,
    precision: str,
    as_json: bool,
) -> int:
    """Measure how well models fill holes: each picture's centre crop, once per mask band (0-20, 20-40, 40-60 %).

    With --by kind, once per kind of mask instead, each with a hole of about a quarter of the picture.

    The masks depend only on --seed, so that all models and all runs see the same ones. Pixels outside the hole are
    those of the picture. Exit code 5: some pictures could not be read and were skipped.

    \b
    Example:
        misf-eval --checkpoint best.safetensors --peers --data photographs/
    """
    if not (checkpoints or models or peers):
        raise click.UsageError("nothing to measure: give --checkpoint, --model or --peers")
    if masks == "random" and (invert_mask or mask_values):
        raise click.UsageError("--invert-mask and --mask-value are for mask files: give --masks FOLDER")
    if masks != "random" and by == "kind":
        raise click.UsageError("--by kind is for random masks, as the kind of a mask file is not known: omit --masks")
    _check_installed()
    from ...runtime.pictures.masks import MaskSettings

    pictures, mask_files = _data(data, masks, MaskSettings(mask_threshold, invert_mask, values=mask_values))
    distances = _distances(backbone, feature_distance)
    methods = _methods(checkpoints, models, peers, {"backend": backend, "device": device, "precision": precision})

    from .evaluate import GROUPS, cases, document, evaluate

    taken = len(pictures) if per_band is None else min(per_band, len(pictures))
    chosen = cases(pictures, size=size, seed=seed, per_band=per_band, masks=mask_files, resize=resize, by=by)
    with progress("pictures", len(GROUPS[by]) * taken, lines=True) as step:
        for done, _ in enumerate(evaluate(methods, chosen, distances), start=1):
            step(done)
    if not methods[0].rows:
        reason = next(iter(pictures.bad.values()), "no mask has a hole of 0 to 60 % of its area")
        raise MisfError(f"nothing was measured: {reason}")
    settings = {
        "size": size,
        "resize": resize,
        "seed": seed,
        "per_band": per_band,
        "masks": masks if masks == "random" else Path(masks).resolve().name,
        "by": by,
    }
    if as_json:
        report = document(methods, data.resolve().name, pictures, settings, details=True, by=by)
        print_json({"misf": misf_version(), **report})
    else:
        _print_table(methods, by, list(distances))
    return BATCH_FAILURES if pictures.bad else 0


def _check_installed() -> None:
    need("misf-eval", "train", "torch", "cv2", "skimage")


def _data(data: Path, masks: str, settings: MaskSettings) -> tuple[Pictures, MaskFolder | None]:
    from ..dataset import Pictures, picture_paths
    from ..mask_drawing import MaskFolder

    pictures = Pictures(picture_paths(data), cache_bytes=0)
    if masks == "random":
        return pictures, None
    return pictures, MaskFolder(picture_paths(masks), settings)


def _methods(
    checkpoints: tuple[Path, ...], models: tuple[Path, ...], peers: bool, settings: dict[str, str]
) -> list[Method]:
    from .baselines import PEERS
    from .evaluate import Method, model_fill

    methods = []
    names = [path.name for path in (*checkpoints, *models)]
    for path in (*checkpoints, *models):
        # --backend chooses for model files; a checkpoint runs on PyTorch.
        chosen = {**settings, "backend": "auto"} if path in checkpoints else settings
        fill, where = model_fill(path, **chosen)
        name = path.name if names.count(path.name) == 1 else str(path)
        methods.append(Method(name, fill, path=path, where=where))
    if peers:
        methods += [Method(name, fill, where="cpu") for name, fill in PEERS.items()]
    return methods


def _distances(backbone: Path | None, feature_distance: str | None) -> dict[str, Distance]:
    """Return the distances to measure, by their names in the results: lpips, and the EfficientNet's variant."""
    from .evaluate import distance_of

    found = {}
    if backbone:
        from .lpips import load_lpips

        found["lpips"] = distance_of(load_lpips(backbone))
    if feature_distance:
        from ..efficientnet import JUDGE, load_feature_distance

        network = load_feature_distance(feature_distance)
        if network.variant != JUDGE:
            log.warning(
                "--feature-distance %s is EfficientNet-%s, with which misf-train trains: it flatters the networks that "
                "it trained; %s does not",
                feature_distance,
                network.variant,
                JUDGE,
            )
        found[network.variant] = distance_of(network)
    return found


def _print_table(methods: list[Method], by: str, distances: list[str]) -> None:
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from .evaluate import GROUPS

    digits = {"psnr_db": 2, "hole_psnr_db": 2, "ssim": 4, "l1_percent": 2, **dict.fromkeys(distances, 4)}
    titles = ["LPIPS" if name == "lpips" else name.capitalize() for name in distances]
    table = Table(box=box.SIMPLE, caption="whole composite; 'in hole' counts only the pixels of the hole")
    for heading in ("hole", "method", "PSNR dB", "in hole", "SSIM", "L1 %", *titles, "ms"):
        table.add_column(heading, justify="left" if heading in ("hole", "method") else "right")
    reports = [method.report(by) for method in methods]
    for group in GROUPS[by]:
        for number, report in enumerate(reports):
            means: dict[str, float] = report[f"{by}s"][group]
            if means["pictures"]:
                numbers = [f"{means[name]:.{places}f}" for name, places in digits.items()]
                first = f"{group} ({means['pictures']})" if number == 0 else ""
                table.add_row(first, report["name"], *numbers, f"{report['median_fill_ms']:.1f}")
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 120).print(table)  # wide enough for the names when piped
