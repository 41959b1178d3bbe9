"""misf-run: fill the holes of a picture or of a folder of pictures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..plugins.shared.command import command, one_line, print_json, print_line
from ..plugins.shared.errors import BATCH_FAILURES
from ..plugins.shared.files import JsonLines
from ..plugins.shared.progress import progress
from ..plugins.shared.shipped import ModelFile
from .backends.contract import BACKENDS, PRECISIONS
from .folder_run import Results, run_folder, run_one
from .mask_options import FITTING, READING, mask_options
from .pictures.settings import STRATEGIES

if TYPE_CHECKING:
    from .estimate import Estimate
    from .fill_file import FileFiller
    from .jobs import Job

log = logging.getLogger(__name__)

EXISTING = click.Path(exists=True, path_type=Path)


def _device(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    from .backends.contract import parse_device

    try:
        return parse_device(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _max_pixels(_context: click.Context, _parameter: click.Parameter, value: int | None) -> None:
    if value is not None:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = -(-value // 2)  # Pillow warns from this on, and refuses from twice this on


@command("misf-run")
@click.argument("model", type=ModelFile())
@click.argument("image", type=EXISTING)
@click.argument("mask", type=EXISTING, required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The file or folder to write.  [default: NAME_inpainted.EXT beside IMAGE]",
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="The library that runs the model; auto takes the fastest one installed and logs which.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    envvar="MISF_DEVICE",
    show_envvar=True,
    callback=_device,
    help="auto, cpu, cuda or cuda:N. Asking for a GPU that is missing is an error.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="auto",
    show_default=True,
    help="Precision of the computation. auto: the file's; on OpenVINO bf16 where the processor has it.",
)
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    default="auto",
    show_default=True,
    help="What the model sees: a crop around each hole, the whole picture resized, or the picture as it is. auto: "
    "the whole picture if it is about as large as the working size, else crops.",
)
@click.option(
    "--working-size",
    type=click.IntRange(min=64),
    help="Side of the square that the model sees at a time, in pixels; larger takes more memory and time."
    "  [default: the network's own, 256 for the published one, 512 for misf-small]",
)
@click.option(
    "--margin", type=click.IntRange(min=0), help="Pixels of context around a hole.  [default: a quarter of the hole]"
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: one per core]")
@mask_options(READING, FITTING)
@click.option("--concat", is_flag=True, help="Also write OUTPUT_concat.png: before, holes in red, after.")
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@click.option(
    "--skip-existing",
    is_flag=True,
    help="Skip pictures whose output exists, to continue an interrupted run; runs at the same time share the work.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    callback=_max_pixels,
    expose_value=False,
    help="Refuse pictures of more pixels than this, as bombs.  [default: Pillow's limit, 179 million]",
)
@click.option("--no-follow-links", is_flag=True, help="Do not follow links to folders.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Pictures of a folder to work on at a time.",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append a line of JSON for each file as it is done: status done, exists, failed or skipped (no picture).",
)
@click.option(
    "--dry-run", is_flag=True, help="Write nothing; count pictures and crops and estimate the time they take."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def main(
    model: Path,
    image: Path,
    mask: Path | None,
    output: Path | None,
    concat: bool,
    force: bool,
    skip_existing: bool,
    no_follow_links: bool,
    jobs: int,
    report: Path | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Fill the white parts of MASK in IMAGE with MODEL, and print the path of the result.

    MODEL is an .onnx file, an engine (.plan), a checkpoint, or misf-small, the network that comes with misf.

    IMAGE is a picture, or a folder of pictures; then MASK is one mask for all of them, or a folder of masks with the
    pictures' names (x.png or x_mask001.png). Format, profile, EXIF, alpha and every pixel outside the holes are kept.
    Nothing is overwritten without --force, except a file named by -o.

    \b
    Example:
      misf-run misf-small photo.jpg mask.png -o filled.jpg
    """
    if mask is None and not options["mask_from_alpha"]:
        raise click.UsageError("Missing argument 'MASK': give a mask, or pass --mask-from-alpha.")
    if force and skip_existing:
        raise click.UsageError("--force and --skip-existing contradict each other: give one of them")
    # Before the model is loaded, so that a wrong path fails at once.
    planned, finished, skipped = _planned(image, mask, output, skip_existing, not no_follow_links)
    lines = click.get_current_context().with_resource(JsonLines(report)) if report and not dry_run else None

    from .fill_file import FileFiller
    from .inpainter import Inpainter
    from .memory import usable_cores

    at_once = min(jobs, max(1, len(planned)))
    if options["threads"] is None and at_once > 1:
        options["threads"] = max(1, usable_cores() // at_once)
    inpainter = Inpainter(model, **options)
    chosen = inpainter.backend
    settings = {
        "model": str(model),
        "backend": chosen.name,
        "device": chosen.device,
        "precision": chosen.precision,
        "strategy": inpainter.settings.strategy,
        "working_size": inpainter.settings.working_size,
    }
    filler = FileFiller(inpainter, mask, concat, force)
    if dry_run:
        found = _estimate(filler, planned, at_once)
        left = {"finished_before": len(finished), "skipped": len(skipped)}
        where = f"{chosen.name}, {chosen.device}, {chosen.precision}"
        print_json(settings | found.to_dict() | left) if as_json else print_line(found.text(where))
        return _exit_code(found.failures, image.is_dir())
    results = Results(skipped, finished, lines, print_paths=not as_json)
    try:
        if image.is_dir():
            run_folder(filler, planned, results, at_once, share=skip_existing)
        else:
            run_one(filler, planned, results)
    except BaseException:
        results.interrupted = True
        raise
    finally:
        if as_json:
            print_json(settings | results.to_dict())
    if results.failures and image.is_dir():
        log.error("%d of %d pictures failed", len(results.failures), len(planned))
    return _exit_code(results.failures, image.is_dir())


def _exit_code(failures: list[tuple[Job, Exception]], folder: bool) -> int:
    """Return the exit code of a folder's run; raise what a single picture failed of."""
    if failures and not folder:
        raise failures[0][1]
    return BATCH_FAILURES if failures else 0


def _estimate(filler: FileFiller, planned: list[Job], at_once: int) -> Estimate:
    """Return what a run would do; the pictures that are known to fail are named in the log."""
    from .estimate import estimate

    with progress("masks", lines=True) as step:
        found = estimate(filler, planned, at_once, step)
    for job, error in found.failures:
        log.error("%s: %s", job.relative, one_line(error))
    return found


def _planned(
    image: Path, mask: Path | None, output: Path | None, skip_existing: bool, follow_links: bool
) -> tuple[list[Job], list[Job], list[Path]]:
    """Return the jobs to do, those whose output is there, and the files that are no pictures."""
    from .jobs import plan_jobs
    from .pictures.image_io import written_format

    if output is not None and not image.is_dir() and not output.is_dir():
        try:
            written_format(output, image)
        except ValueError as error:
            raise click.BadParameter(f"{error}, or a folder that exists", param_hint="--output") from error
    jobs, skipped = plan_jobs(image, mask, output, follow_links)
    if skipped:
        names = ", ".join(map(str, skipped[:3])) + (", ..." if len(skipped) > 3 else "")
        log.warning("%d files in %s are skipped, not pictures we read, or links: %s", len(skipped), image, names)
    finished = [job for job in jobs if skip_existing and job.finished]
    if finished:
        log.info("%d of %d pictures are finished and left alone", len(finished), len(jobs))
    waiting = set(jobs) - set(finished)
    return [job for job in jobs if job in waiting], finished, [image / path for path in skipped]
