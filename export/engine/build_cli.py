"""misf-build: turns an ONNX file into an engine for this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from ...plugins.shared.command import command, print_json, print_line
from ...plugins.shared.errors import MisfError
from ...plugins.shared.extras import need
from ...plugins.shared.shipped import shipped_model
from ...runtime.backends.contract import ENGINES
from .options import document, engine_options, layer_lines, parse_engine_options, summary

log = logging.getLogger(__name__)


@command("misf-build")
@click.argument("onnx_file", metavar="ONNX", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The .plan file.  [default: beside ONNX]")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16"]),
    default=None,
    help="Precision that the engine must have; exit code 3 otherwise.  [default: that of the ONNX file]",
)
@click.option("--fp16", is_flag=True, help="Short for --precision fp16.")
@engine_options
@click.option("--force", is_flag=True, help="Replace an existing file, even one not named by -o.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def main(
    onnx_file: Path,
    output: Path | None,
    precision: str | None,
    fp16: bool,
    force: bool,
    as_json: bool,
    **engine: Any,
) -> None:
    """Build a TensorRT engine for this machine from ONNX, which is a file of misf-export or the name misf-small.

    Writes the plan and PLAN.json, its side-car file, which records what the plan was built for; misf-run compares it
    with the machine before it loads the plan. The engine has the precision of the ONNX file.

    \b
    Example:
        misf-build best_fp16.onnx -o best.plan --max-shape 768x768
    """
    if fp16 and precision == "fp32":
        raise click.UsageError("--fp16 and --precision fp32 contradict each other: give one of them")
    target = engine_path(output) if output else onnx_file.with_suffix(".plan")
    onnx_file = shipped_model(onnx_file)
    if output is None and target.exists() and not force:
        raise MisfError(f"{target} exists: give --force to replace it, or -o to name another file")
    need("misf-build", "build", "onnx")
    options = parse_engine_options(engine, "fp16" if fp16 else precision)
    from .builder import build_engine

    finish(build_engine(onnx_file, target, options), as_json)


def engine_path(output: Path) -> Path:
    """Return the path of an engine; click.BadParameter if it does not have an engine's suffix."""
    if output.suffix.lower() not in ENGINES:
        raise click.BadParameter(f"expected a name that ends in {' '.join(ENGINES)}, got {output.name}")
    return output


def finish(report: Any, as_json: bool) -> None:
    """Log what was built, and print its path or the JSON document."""
    log.info("%s", summary(report))
    for line in layer_lines(report):
        log.debug("%s", line)
    for line in report.commands.values():
        log.info("also: %s", line)
    log.info("check it: misf-verify %s --checkpoint CHECKPOINT", report.path)
    if as_json:
        print_json(document(report))
    else:
        print_line(str(report.path))
