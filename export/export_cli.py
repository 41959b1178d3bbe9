"""misf-export: turns a checkpoint into an ONNX file, an engine, or a page that fills pictures in the browser."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..plugins.shared.command import command, print_json, print_line
from ..plugins.shared.errors import MisfError
from ..plugins.shared.extras import need, need_onnx_runtime
from ..plugins.shared.files import sha256, written_whole
from ..plugins.shared.shipped import ModelFile, shipped_checkpoint
from ..runtime.backends.contract import ENGINES
from ..training.model.options import config_option, official_option
from .engine.build_cli import finish
from .engine.options import engine_options, given, parse_engine_options
from .triton import BACKENDS as TRITON_BACKENDS

if TYPE_CHECKING:
    from ..training.model.config import NetworkConfig
    from .exporter import ExportReport

log = logging.getLogger(__name__)


@command("misf-export")
@click.option(
    "--checkpoint",
    type=ModelFile(weights=True),
    help="Weights: a .safetensors, .pt or .pth file, including the authors' files; or the name misf-small.",
)
@config_option
@official_option
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16"]),
    default=None,
    help="Precision of the network's layers. Input and output are always float32.  [default: fp32]",
)
@click.option("--fp16", is_flag=True, help="Short for --precision fp16.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The .onnx file, or the .plan of an engine.  [default: .onnx beside the checkpoint, NAME_fp16.onnx for fp16]",
)
@click.option(
    "--calibration",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of pictures like yours, used to find layers that overflow float16 and for the final check."
    "  [default: four shipped photographs]",
)
@click.option(
    "--range-limit",
    type=click.FloatRange(min=1, max=65504),
    default=8192.0,
    show_default=True,
    help="Layers that reach larger values than this on the calibration pictures stay float32.",
)
@click.option(
    "--inline-functions",
    is_flag=True,
    help="Write the dynamic filter as standard nodes, for readers without support for ONNX functions, such as "
    "OpenVINO's. Not for engines.",
)
@click.option(
    "--web",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write a web page that fills pictures in the visitor's browser, for any file server (docs/browser.md).",
)
@click.option(
    "--onnx", type=ModelFile(), help="For --web: an ONNX file or the name misf-small, instead of --checkpoint."
)
@click.option(
    "--onnxruntime-web",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="For --web: the unpacked npm package onnxruntime-web.  [default: fetched with npm]",
)
@click.option(
    "--triton",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write a model repository for NVIDIA Triton into this folder.",
)
@click.option(
    "--triton-backend",
    type=click.Choice(TRITON_BACKENDS),
    default="auto",
    show_default=True,
    help="Triton backend for the network: auto depends on the file; python is misf's runtime.",
)
@engine_options
@click.option("--force", is_flag=True, help="Replace existing files, not only those named by -o.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@click.pass_context
def main(
    ctx: click.Context,
    /,
    checkpoint: Path | None,
    config: NetworkConfig | None,
    precision: str | None,
    fp16: bool,
    output: Path | None,
    calibration: Path | None,
    range_limit: float,
    inline_functions: bool,
    web: Path | None,
    onnx: Path | None,
    onnxruntime_web: Path | None,
    triton: Path | None,
    triton_backend: str,
    force: bool,
    as_json: bool,
    **engine: Any,
) -> None:
    """Turn a checkpoint into an ONNX file for any batch, height and width, or with -o X.plan into an engine.

    The file is compared with PyTorch on photographs at several sizes before it is put in place. If it differs too much
    (fp32: 1e-4 anywhere; fp16: under 50 dB in the hole), nothing is written and the exit code is 3.

    With -o X.plan, the ONNX file is kept beside the engine: building on another machine and misf-verify --layers need
    it. The options from --backend to --device apply to engines only.

    \b
    Example:
        misf-export --checkpoint best.pt --fp16
        misf-export --checkpoint best.pt --fp16 -o best.plan
        misf-export --checkpoint best.pt --web site
    """
    if fp16 and precision == "fp32":
        raise click.UsageError("--fp16 and --precision fp32 contradict each other: give one of them")
    if web is None and (onnx or onnxruntime_web):
        raise click.UsageError("--onnx and --onnxruntime-web are for --web FOLDER")
    if (checkpoint is None) == (onnx is None):
        raise click.UsageError("give --checkpoint or, with --web, either --checkpoint or --onnx")
    if triton is None and triton_backend != "auto":
        raise click.UsageError("--triton-backend is for --triton FOLDER")
    if web is not None:
        others = {"--output": output, "--triton": triton, "--inline-functions": inline_functions}
        if flags := [*given(ctx), *(flag for flag, value in others.items() if value)]:
            raise click.UsageError(f"{', '.join(flags)} cannot be combined with --web, which writes its own folder")
        if onnx and (fp16 or precision or config):
            raise click.UsageError("--precision, --fp16 and --config are for --checkpoint; --onnx is used unchanged")
        limit_given = ctx.get_parameter_source("range_limit") is ParameterSource.COMMANDLINE
        if onnx and (calibration or limit_given):
            raise click.UsageError("--calibration and --range-limit are for --checkpoint; --onnx is used unchanged")
        chosen = "fp16" if fp16 else precision or "fp16"
        if onnx is None:
            _need_export()  # before anything is fetched
        _web(
            web,
            force,
            as_json,
            onnxruntime_web,
            lambda scratch: (
                onnx or _export(checkpoint, config, scratch / "network.onnx", chosen, calibration, range_limit).path
            ),
        )
        return
    assert checkpoint is not None
    precision = "fp16" if fp16 else precision or "fp32"
    if output is None:
        folder = Path() if checkpoint == shipped_checkpoint(checkpoint.stem) else checkpoint.parent
        output = folder / (checkpoint.stem + ("_fp16" if precision == "fp16" else "") + ".onnx")
        if output.exists() and not force:
            raise MisfError(f"{output} exists: give --force to replace it, or -o to name another file")
    elif output.suffix.lower() in ENGINES:
        if inline_functions:
            raise click.UsageError(
                "--inline-functions is for an .onnx file: the plugin of an engine needs the function"
            )
        options = parse_engine_options(engine, precision)
        from ..runtime.engines.flavors import load_flavor

        load_flavor(options.backend)  # without TensorRT this fails before the export, which takes a while
        onnx_file = output.with_suffix(".onnx")
        _put(onnx_file, force, lambda path: _export(checkpoint, config, path, precision, calibration, range_limit))
        from .engine.builder import build_engine

        finish(build_engine(onnx_file, output, options), as_json)
        if triton:
            _triton(triton, output, triton_backend)
        return
    elif output.suffix.lower() != ".onnx":
        known = ", ".join((".onnx", *ENGINES))
        raise click.BadParameter(f"expected a name that ends in {known}, got {output.name}", param_hint="--output")
    if flags := given(ctx):
        raise click.UsageError(
            f"{', '.join(flags)}: only for engines, and {output.name} is not one: name the engine with -o X.plan"
        )
    if output.resolve() == checkpoint.resolve():
        raise click.BadParameter("this is the checkpoint: name another file", param_hint="--output")
    report = _export(checkpoint, config, output, precision, calibration, range_limit, inline_functions)
    if triton:
        _triton(triton, output, triton_backend)
    if as_json:
        print_json(
            {
                "onnx": str(report.path),
                "sha256": report.sha256,
                "precision": report.precision,
                "convolutions": report.convolutions,
                "float32_layers": report.float32_layers,
                "check": [result.to_dict() for result in report.results],
            }
        )
        return
    from rich.console import Console

    from ..runtime.checks.accuracy import results_table

    Console().print(results_table(report.results, f"{report.path.name} ({precision}) against PyTorch float32"))
    log.info("run it: misf-run %s image.png mask.png", report.path)
    print_line(str(report.path))


def _triton(folder: Path, model: Path, backend: str) -> None:
    from .triton import write_repository

    write_repository(folder, model, backend)
    log.info("start it: tritonserver --model-repository=%s", folder.resolve())


def _export(
    checkpoint: Path | None,
    config: NetworkConfig | None,
    output: Path,
    precision: str,
    calibration: Path | None,
    range_limit: float,
    inline: bool = False,
) -> ExportReport:
    assert checkpoint is not None
    _need_export()
    from ..runtime.checks.accuracy import load_photographs
    from ..training.model.checkpoint import load_checkpoint
    from .exporter import export_onnx

    photographs = load_photographs(calibration) if calibration else None
    loaded = load_checkpoint(checkpoint, config=config)
    return export_onnx(loaded, output, precision, photographs, range_limit, inline)


def _need_export() -> None:
    need("misf-export", "export", "torch", "onnx", "onnx_graphsurgeon", "onnxscript")
    need_onnx_runtime("misf-export")


def _web(folder: Path, force: bool, as_json: bool, package: Path | None, network: Callable[[Path], Path]) -> None:
    need_onnx_runtime("misf-export --web")
    from .web import write_web

    report = write_web(folder, network, package, force)
    if as_json:
        print_json(
            {
                "web": str(report.folder),
                "network": report.network,
                "bytes": report.bytes,
                "visit_bytes": report.visit_bytes,
            }
        )
        return
    log.info("a visitor downloads %.1f MB, once", report.visit_bytes / 1e6)
    log.info("try it: python -m http.server --bind 127.0.0.1 --directory %s", report.folder)
    print_line(str(report.folder))


def _put(onnx_file: Path, force: bool, export: Callable[[Path], Any]) -> None:
    """Write the ONNX file from which an engine is built; MisfError if the file exists and is another model."""
    with tempfile.TemporaryDirectory(prefix="misf-export-") as folder:
        fresh = Path(folder) / onnx_file.name
        export(fresh)
        if onnx_file.is_file() and not force and sha256(onnx_file) != sha256(fresh):
            raise MisfError(
                f"{onnx_file}, from which the engine is built, exists and is another model: give --force to replace "
                "it, or -o to name another engine"
            )
        with written_whole(onnx_file) as temporary:
            shutil.copyfile(fresh, temporary)
