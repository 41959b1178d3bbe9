"""misf-verify: compares a model with the PyTorch reference."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...plugins.shared.command import HxW, command, print_json
from ...plugins.shared.errors import AccuracyError, MisfError
from ...plugins.shared.extras import need
from ...plugins.shared.shipped import ModelFile
from ...training.model.options import config_option, official_option
from ..backends.contract import BACKENDS, PRECISIONS

if TYPE_CHECKING:
    from ...training.model.checkpoint import Checkpoint
    from ...training.model.config import NetworkConfig
    from .accuracy import CaseResult, Tolerance
    from .layer_errors import LayerResult

log = logging.getLogger(__name__)


@command("misf-verify")
@click.argument("model", type=ModelFile())
@click.option(
    "--checkpoint", required=True, type=ModelFile(weights=True), help="The weights that the model was made from."
)
@config_option
@official_option
@click.option(
    "--size",
    "sizes",
    type=HxW(with_batch=True),
    multiple=True,
    help="Size to compare at; may be repeated.",
)
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of photographs to compare on.  [default: four shipped ones]",
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="The library that runs the model.",
)
@click.option("--device", help="auto, cpu, cuda or cuda:N.  [default: MISF_DEVICE, or auto]")
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True, help="Precision to compute in."
)
@click.option("--max-abs", type=click.FloatRange(min=0), help="Largest difference allowed.  [default: fp32: 1e-4]")
@click.option("--min-psnr", type=float, help="Smallest PSNR allowed in the hole, dB.  [default: fp16: 50, bf16: 45]")
@click.option(
    "--layers", is_flag=True, help="Also compare every convolution and filter, to find the layer that is off."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def main(
    model: Path,
    checkpoint: Path,
    config: NetworkConfig | None,
    sizes: tuple[tuple[int, int, int], ...],
    images: Path | None,
    backend: str,
    device: str | None,
    precision: str,
    max_abs: float | None,
    min_psnr: float | None,
    layers: bool,
    as_json: bool,
) -> None:
    """Compare MODEL with the PyTorch reference on photographs; exit code 3 if they differ too much.

    The sizes include one that is not square, one that must be padded, and a batch of two. --max-abs and --min-psnr
    change one limit each and leave the other at its default. --layers adds a table of every convolution and filter at
    the size with the largest difference, for .onnx files and, on a GPU, for .plan files.

    \b
    Examples:
        misf-verify best_fp16.onnx --checkpoint best.pt
        misf-verify best.plan --checkpoint best.pt --layers
    """
    need("misf-verify", "export", "torch")
    from ...training.model.checkpoint import build_model
    from ..backends import open_backend
    from . import accuracy

    if layers:
        backend = _check_layers(model, backend)
    inpaint = open_backend(model, backend=backend, device=device, precision=precision)
    tolerance = accuracy.tolerance(inpaint.precision, inpaint.file_precision)
    if max_abs is not None or min_psnr is not None:
        tolerance = accuracy.Tolerance(
            tolerance.max_abs if max_abs is None else max_abs,
            tolerance.min_psnr_db if min_psnr is None else min_psnr,
        )
    photographs = accuracy.load_photographs(images) if images else accuracy.load_photographs()
    network = build_model(_load(inpaint, checkpoint, config))
    reference = accuracy.torch_reference(network)
    cases = list(accuracy.cases(photographs, sizes or accuracy.default_sizes(inpaint.limits)))
    results = [accuracy.compare(inpaint, reference, *case) for case in cases]
    faults = [fault for result in results for fault in result.faults(tolerance)]
    inside, trouble = None, None
    if layers:
        try:
            inside = _compare_layers(model, network, inpaint.device, *cases[furthest(results, tolerance)])
        except MisfError as error:
            trouble = error
    _report(results, inside, faults, tolerance, model, inpaint, as_json)
    if faults and trouble:
        log.warning("%s", trouble)  # only a warning: the missed tolerance is the more important message
    elif trouble:
        raise trouble
    if faults:
        raise AccuracyError(
            f"{model} differs too much from {checkpoint}: {'; '.join(faults)}; --max-abs and --min-psnr set the limits"
        )


def _check_layers(model: Path, backend: str) -> str:
    """Return the backend for --layers, after checking that the model supports it."""
    from ..backends.contract import ENGINES

    if model.suffix.lower() not in (".onnx", *ENGINES):
        raise click.UsageError(f"--layers works with .onnx and .plan files, and {model.name} is neither")
    if backend == "openvino":
        raise click.UsageError("--layers runs .onnx files on ONNX Runtime: give --backend onnxruntime, or leave it out")
    need("--layers", "export", "polygraphy", "onnx")
    from .layer_errors import source_of

    source_of(model)
    return "onnxruntime" if backend == "auto" and model.suffix.lower() == ".onnx" else backend


def furthest(results: list[CaseResult], tolerance: Tolerance) -> int:
    """Return the index of the worst case: not finite first, then out of tolerance, then by PSNR."""

    def badness(index: int) -> tuple[bool, bool, float]:
        result = results[index]
        return not result.finite, bool(result.faults(tolerance)), -result.psnr_hole_db if result.finite else 0.0

    return max(range(len(results)), key=badness)


def _load(inpaint: Any, checkpoint: Path, config: NetworkConfig | None) -> Checkpoint:
    from ...training.model.checkpoint import load_checkpoint

    loaded = load_checkpoint(checkpoint, config=config)
    made_of = inpaint.checkpoint_sha256
    if made_of and made_of != loaded.sha256:
        log.warning("the model was exported from another checkpoint (sha256 %s...), not %s", made_of[:12], checkpoint)
    return loaded


def _compare_layers(model: Path, network: Any, device: str, image: Any, mask: Any) -> list[LayerResult]:
    from . import layer_errors as layers

    found, graph = layers.model_layers(model, device, image, mask)
    nodes = layers.layer_nodes(graph)
    ops = {name: node.op_type for name, node in nodes.items()}
    wanted = layers.reference_layers(network, image, mask)
    return layers.compare_layers(wanted, found, layers.feeding_layers(graph), ops)


def _report(
    results: list[CaseResult],
    inside: list[LayerResult] | None,
    faults: list[str],
    tolerance: Tolerance,
    model: Path,
    inpaint: Any,
    as_json: bool,
) -> None:
    from . import accuracy

    allowed = {"max_abs": tolerance.max_abs, "min_psnr_db": tolerance.min_psnr_db}
    if as_json:
        print_json(
            {
                "model": str(model),
                "backend": inpaint.name,
                "device": inpaint.device,
                "precision": inpaint.precision,
                "tolerance": allowed,
                "passed": not faults,
                "faults": faults,
                "cases": [result.to_dict() for result in results],
                **_inside_document(inside),
            }
        )
        return
    from rich.console import Console

    title = f"{model.name} ({inpaint.precision}, {inpaint.name}, {inpaint.device}) against PyTorch float32"
    Console().print(accuracy.results_table(results, title))
    if inside is not None:
        from . import layer_errors as layers

        Console().print(layers.layers_table(inside))
        most = layers.worst(inside)
        click.echo(f"worst layer: {most.name} ({most.op}) adds {most.added:.1e} to the relative error")
    asked = ", ".join(f"{name} {value:g}" for name, value in allowed.items() if value is not None)
    click.echo(f"{'FAILED' if faults else 'passed'} ({asked or 'finite values, known pixels equal'})")


def _inside_document(inside: list[LayerResult] | None) -> dict[str, Any]:
    if inside is None:
        return {}
    from .layer_errors import layers_document

    return layers_document(inside)
