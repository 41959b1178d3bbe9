"""misf-explain: what a network does inside, for one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...plugins.shared.command import command, misf_version, print_json, print_line
from ...plugins.shared.extras import need
from ...plugins.shared.shipped import ModelFile
from ...runtime.mask_options import FITTING, READING, Values, mask_options

if TYPE_CHECKING:
    from ...runtime.pictures.geometry import Mask, Size
    from ...runtime.pictures.masks import MaskSettings
    from .explain import Array, Point

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _pairs(
    context: click.Context, parameter: click.Parameter, value: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], ...]:
    for point in value:
        if len(point) != 2:
            raise click.BadParameter(f"expected X,Y such as 120,80, got {point}", context, parameter)
    return value


@command("misf-explain")
@click.argument("model", type=ModelFile(weights=True))
@click.argument("image", type=FILE)
@click.argument("mask", type=FILE, required=False)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The folder to write: new, empty, or with an earlier result, which is replaced.",
)
@click.option(
    "--at",
    multiple=True,
    type=Values(),
    callback=_pairs,
    metavar="X,Y",
    help="Show the taps of the picture's filter at this pixel of IMAGE; may be repeated.  [default: up to four points "
    "in the hole]",
)
@click.option(
    "--size",
    type=click.IntRange(64, 1024),
    help="A larger picture is shrunk to the area of a square with this side.  [default: the network's working size]",
)
@mask_options(READING, FITTING)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as one JSON document on stdout.")
def main(
    model: Path,
    image: Path,
    mask: Path | None,
    output: Path,
    at: tuple[tuple[int, int], ...],
    size: int | None,
    as_json: bool,
    **masks: Any,
) -> None:
    """Show what MODEL does inside to fill the white parts of MASK in IMAGE, and print the path of the page.

    MODEL is a checkpoint, or misf-small, the network that comes with misf. The page has what both filters do, where
    each pixel's value came from, and how much each part of the network adds to the fill. Its pictures and numbers.json
    lie beside it. The network sees the whole picture, as with misf-run --strategy resize.

    \b
    Example:
      misf-explain misf-small photo.jpg mask.png -o explained
    """
    if mask is None and not masks["mask_from_alpha"]:
        raise click.UsageError("Missing argument 'MASK': give a mask, or pass --mask-from-alpha.")
    need("misf-explain", "export", "torch", "safetensors")

    from ...runtime.pictures.masks import MaskSettings
    from ...training.model.checkpoint import load_model
    from .explain import chosen_points, explain
    from .explain_page import check_folder, write_page

    check_folder(output)
    settings = MaskSettings(
        masks["mask_threshold"],
        masks["invert_mask"],
        masks["mask_from_alpha"],
        masks["mask_values"],
        masks["resize_mask"],
        masks["grow_mask"],
        masks["feather"],
    )
    network = load_model(model)
    pixels, hole, given = _read(image, mask or image, settings, size or network.config.working_size)
    if at and not network.config.image_filter:
        raise click.UsageError(f"--at shows the picture's filter, and {model.name} has none: leave it out")
    points = _points(at, given, hole.shape)
    found = explain(network, pixels, hole)
    if found.picture_filter is not None and not points:
        points = chosen_points(hole, found.picture_filter)
    about = {
        "misf": misf_version(),
        "model": model.name,
        "image": image.name,
        "mask": (mask or image).name,
        "picture": {"width": given[1], "height": given[0]},
    }
    numbers = write_page(output, found, points, about)
    print_json(numbers) if as_json else print_line(str(output / "index.html"))


def _read(image: Path, mask: Path, settings: MaskSettings, working_size: int) -> tuple[Array, Mask, Size]:
    """Return picture and hole as the network sees them, and the size of the picture in the file."""
    from ...runtime.inpainter import reduced_mask
    from ...runtime.pictures.crops import plan_crops
    from ...runtime.pictures.image_io import open_mask, open_picture
    from ...runtime.pictures.masks import check_mask, feathered
    from ...runtime.pictures.settings import CropSettings

    canvas = open_picture(image).canvas
    hole = settings.fitted(settings.hole(open_mask(mask)), canvas.size)
    if not hole.any():
        raise ValueError(f"{mask} marks no hole, so there is nothing to explain: white is hole, see --mask-threshold")
    check_mask(hole, canvas.size)
    if settings.feather:
        hole = feathered(hole, settings.feather) > 0  # the network does not see those pixels either
    [crop] = plan_crops(hole, CropSettings("resize", working_size))
    return canvas.read(crop.box, crop.size), reduced_mask(hole, crop.size), canvas.size


def _points(at: tuple[tuple[int, int], ...], given: Size, seen: Size) -> list[Point]:
    """Return points of the picture in the file as points of the picture as it is seen; a usage error outside of it."""
    from .explain import Point

    height, width = given
    for x, y in at:
        if x >= width or y >= height:
            raise click.UsageError(
                f"--at {x},{y} is outside the picture of {width}x{height} pixels (width x height): expected X up to "
                f"{width - 1} and Y up to {height - 1}"
            )
    return [
        Point(
            x * seen[1] // width,
            y * seen[0] // height,
            "as asked" if given == seen else f"as asked, {x},{y} in the file",
        )
        for x, y in at
    ]
