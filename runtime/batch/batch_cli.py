"""misf-batch: misf-run on a cluster, on folders of millions of pictures, on object stores."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from ...plugins.shared.command import command, print_line
from ...plugins.shared.errors import BATCH_FAILURES, MisfError
from ...plugins.shared.extras import need
from ...plugins.shared.files import JsonLines
from ...plugins.shared.progress import progress
from ...plugins.shared.shipped import SHIPPED, shipped_model
from ..backends.contract import ENGINES
from ..mask_options import FITTING, READING, mask_options
from ..run_cli import main as misf_run

log = logging.getLogger(__name__)

MODEL_OPTIONS = ("backend", "device", "precision", "strategy", "working_size", "margin")
"""Options of misf-run that are keywords of Inpainter, beside those about masks."""
_SHARED = [parameter for parameter in misf_run.params if parameter.name in (*MODEL_OPTIONS, "force")]


@command("misf-batch", params=_SHARED)
@click.argument("model")
@click.argument("image")
@click.argument("mask", default="")
@mask_options(READING, FITTING)
@click.option("-o", "--output", required=True, help="The folder to write to: a path or URL.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPUs per worker.")
@click.option(
    "--gpus",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="GPUs per worker; 0.25: four share one.",
)
@click.option("--address", help="A Ray cluster, such as ray://head:10001 or auto.  [default: this machine alone]")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Append a line of JSON per picture.")
@click.option(
    "--max-failures", type=click.IntRange(min=0), help="Stop after more failures than this.  [default: never]"
)
def main(
    model: str,
    image: str,
    mask: str,
    output: str,
    threads: int,
    gpus: float,
    address: str | None,
    report: Path | None,
    max_failures: int | None,
    force: bool,
    **options: Any,
) -> int:
    """Fill the pictures of IMAGE on a Ray cluster, and print the path of each result.

    The arguments, and the options about model, crops and masks, are those of misf-run. IMAGE and MASK are folders or
    files, paths or URLs (s3://, gs://, az://); or IMAGE is a list (.jsonl), an object a line with image and perhaps
    mask and output. Pictures whose output exists are left alone, unless --force: the same command continues a run
    that ended for whatever reason.

    \b
    Example:
      misf-batch misf-small s3://photos/in s3://photos/masks -o s3://photos/filled --address auto --report report.jsonl
    """
    if not mask and not options["mask_from_alpha"] and Path(image).suffix.lower() != ".jsonl":
        raise click.UsageError("Missing argument 'MASK': give a mask, or pass --mask-from-alpha.")
    need("misf-batch", "cluster", "ray", "fsspec")
    image, mask, output = (url and _absolute(url) for url in (image, mask, output))
    if options["device"].startswith("cuda") and not gpus:
        raise click.UsageError("--device cuda needs --gpus, the GPUs that each worker takes: 1, or 0.25 to share one")
    path, contents = _model(model)

    from .driver import run
    from .entries import entries

    _connect(address)
    start = _starter(path, contents, {**options, "threads": threads}, force, threads, gpus)
    needs = {"CPU": float(threads), **({"GPU": gpus} if gpus else {})}
    counts: Counter[str] = Counter()
    lines = click.get_current_context().with_resource(JsonLines(report)) if report else None
    begun = time.monotonic()
    try:
        with progress("pictures", lines=True) as step:

            def tell() -> None:
                done = counts.total()
                step(done, text=f"{done / max(time.monotonic() - begun, 1e-3):.1f}/s, {counts['failed']} failed")

            for record in run(entries(image, mask, output), start, needs, tell):
                counts[record["status"]] += 1
                _write(record, lines)
                if max_failures is not None and counts["failed"] > max_failures:
                    raise MisfError(f"{counts['failed']} pictures failed, more than --max-failures {max_failures}")
    finally:
        import ray

        ray.shutdown()
    log.info("%d done, %d there already, %d failed", counts["done"], counts["exists"], counts["failed"])
    return BATCH_FAILURES if counts["failed"] else 0


def _write(record: dict[str, Any], lines: JsonLines | None) -> None:
    if lines:
        lines.append(record)
    if record["status"] == "failed":
        log.error("%s", record["error"])
    elif record["status"] == "done":
        print_line(record["output"])


def _model(name: str) -> tuple[str, dict[str, bytes]]:
    """Return the model's path or name, and its files, for machines that do not have them."""
    if name in SHIPPED:
        return name, {}
    path = shipped_model(name)
    if not path.is_file():
        raise MisfError(f"{path} does not exist: expected a model file, or the name {', '.join(SHIPPED)}")
    files = [path, path.with_name(f"{path.name}.json")] if path.suffix.lower() in ENGINES else [path]
    return str(path.resolve()), {file.name: file.read_bytes() for file in files if file.is_file()}


def _absolute(url: str) -> str:
    """Return a path as an absolute one, a URL as it is; MisfError for a store whose library is not installed."""
    import fsspec

    if "://" not in url:
        return os.path.abspath(url)  # noqa: PTH100 - links stay as they are
    try:
        fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise MisfError(f"{url}: {error} (s3:// needs s3fs, gs:// gcsfs, az:// adlfs)") from error
    return url


def _connect(address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(include_dashboard=False, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise MisfError(f"no Ray cluster at {address or 'this machine'}: {error}") from error


def _starter(
    path: str, contents: dict[str, bytes], options: dict[str, Any], force: bool, cpus: int, gpus: float
) -> Any:
    """Return a function that starts a worker; the model's files travel to each machine once."""
    import ray

    from .worker import Worker

    shared = ray.put(contents)
    actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(Worker)
    return lambda: actor.remote(path, shared, options, force)


if __name__ == "__main__":
    main()
