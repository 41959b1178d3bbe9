"""misf-run: fill the holes of a picture or of a folder of pictures."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..plugins.shared.command import command, log_about, one_line, print_json
from ..plugins.shared.errors import BATCH_FAILURES, MisfError
from ..plugins.shared.progress import progress
from ..plugins.shared.shipped import ModelFile
from .backends.contract import BACKENDS, PRECISIONS
from .pictures.settings import STRATEGIES

if TYPE_CHECKING:
    from .fill_file import FileFiller
    from .jobs import Job

log = logging.getLogger(__name__)

EXISTING = click.Path(exists=True, path_type=Path)


@dataclass
class _Results:
    """What became of the pictures."""

    skipped: list[Path]  # files of the folder that are no pictures
    finished: list[Job]  # by an earlier run
    done: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[Job, Exception]] = field(default_factory=list)
    interrupted: bool = False  # the run ended before its last picture

    def to_dict(self) -> dict[str, Any]:
        """Return what --json tells of them."""
        return {
            "images": self.done,
            "failures": [{"input": str(job.image), "error": one_line(error)} for job, error in self.failures],
            "finished_before": [str(job.output) for job in self.finished],
            "skipped": [str(path) for path in self.skipped],
            "interrupted": self.interrupted,
        }


def _device(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    from .backends.contract import parse_device

    try:
        return parse_device(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


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
@click.option(
    "--mask-threshold",
    type=click.IntRange(0, 254),
    default=127,
    show_default=True,
    help="Mask values above this (0-254) are holes.",
)
@click.option("--invert-mask", is_flag=True, help="Black marks the hole instead of white.")
@click.option("--resize-mask", is_flag=True, help="Accept a mask of another size and resize it to the picture.")
@click.option(
    "--grow-mask",
    type=click.IntRange(min=0),
    default=0,
    metavar="PIXELS",
    help="Grow the hole by this many pixels, to cover the soft edge of an object.",
)
@click.option(
    "--mask-from-alpha",
    is_flag=True,
    help="Transparent pixels are the hole: those of MASK, or of IMAGE if no MASK is given.",
)
@click.option("--concat", is_flag=True, help="Also write OUTPUT_concat.png: before, holes in red, after.")
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@click.option(
    "--skip-existing", is_flag=True, help="Skip pictures whose output exists, to continue an interrupted run."
)
@click.option("--no-follow-links", is_flag=True, help="Do not follow links to folders.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def main(
    model: Path,
    image: Path,
    mask: Path | None,
    output: Path | None,
    backend: str,
    device: str,
    precision: str,
    strategy: str,
    working_size: int | None,
    margin: int | None,
    threads: int | None,
    mask_threshold: int,
    invert_mask: bool,
    resize_mask: bool,
    grow_mask: int,
    mask_from_alpha: bool,
    concat: bool,
    force: bool,
    skip_existing: bool,
    no_follow_links: bool,
    as_json: bool,
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
    if mask is None and not mask_from_alpha:
        raise click.UsageError("Missing argument 'MASK': give a mask, or pass --mask-from-alpha.")
    if force and skip_existing:
        raise click.UsageError("--force and --skip-existing contradict each other: give one of them")
    jobs, results = _planned(
        image, mask, output, skip_existing, not no_follow_links
    )  # before the model is loaded, so that a wrong path fails at once

    from .fill_file import FileFiller, MaskSettings
    from .inpainter import Inpainter

    inpainter = Inpainter(
        model,
        backend=backend,
        device=device,
        strategy=strategy,
        working_size=working_size,
        margin=margin,
        precision=precision,
        threads=threads,
    )
    masks = MaskSettings(mask_threshold, invert_mask, resize_mask, mask_from_alpha, grow_mask)
    chosen = inpainter.backend
    try:
        _run(FileFiller(inpainter, mask, masks, concat, force), jobs, results, image.is_dir(), print_paths=not as_json)
    except BaseException:
        results.interrupted = True
        raise
    finally:
        if as_json:
            settings = {
                "model": str(model),
                "backend": chosen.name,
                "device": chosen.device,
                "precision": chosen.precision,
                "strategy": strategy,
                "working_size": inpainter.settings.working_size,
            }
            print_json(settings | results.to_dict())
    if results.failures and not image.is_dir():
        raise results.failures[0][1]
    if results.failures:
        log.error("%d of %d pictures failed", len(results.failures), len(jobs))
    return BATCH_FAILURES if results.failures else 0


def _planned(
    image: Path, mask: Path | None, output: Path | None, skip_existing: bool, follow_links: bool
) -> tuple[list[Job], _Results]:
    """Return the jobs to do, and the results with what is not to do."""
    from .jobs import plan_jobs
    from .pictures.image_io import output_format

    if output is not None and not image.is_dir() and not output.is_dir():
        try:
            output_format(output)
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
    return [job for job in jobs if job in waiting], _Results([image / path for path in skipped], finished)


def _run(filler: FileFiller, jobs: list[Job], results: _Results, folder: bool, print_paths: bool) -> None:
    """Run the jobs; what becomes of each is added to the results at once."""
    with progress("pictures" if folder else "crops") as step:
        for number, job in enumerate(jobs, start=1):
            try:
                with log_about(f"{job.relative}: " if folder else ""):
                    record = filler.run(job, progress=None if folder else step)
            except (MisfError, ValueError, OSError, MemoryError) as error:
                results.failures.append((job, error))
                if folder:
                    text = one_line(error)
                    log.error("%s", text if str(job.image) in text else f"{job.relative}: {text}")
                    log.debug("the failure in full:", exc_info=True)
            else:
                results.done.append(record)
                if print_paths:
                    print(record["output"], flush=True)
                log.info(
                    "%s: %dx%d, %s, %d crops, %.2f s",
                    job.relative,
                    record["width"],
                    record["height"],
                    record["strategy"],
                    record["crops"],
                    record["seconds"],
                )
            if folder:
                step(number, len(jobs))
