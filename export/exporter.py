"""From a checkpoint to a checked ONNX file, written atomically."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from ..plugins.shared.errors import AccuracyError
from ..plugins.shared.files import sha256, written_whole
from ..runtime.backends.onnx_runtime import OnnxRuntimeBackend
from ..runtime.checks import accuracy
from ..training.model.checkpoint import Checkpoint, build_model
from ..training.model.network import InpaintingNetwork, network_input
from .model_types import float_types
from .onnx_model import complete_model, core_model
from .precision import RANGE_LIMIT, float32_layers, to_float16, value_ranges

log = logging.getLogger(__name__)

CALIBRATION_SIZE = 256


@dataclass(frozen=True)
class ExportReport:
    """The written file and the results of its check."""

    path: Path
    sha256: str
    precision: str
    convolutions: dict[str, int]
    """Number of convolutions by the type of their weights."""
    float32_layers: dict[str, float]
    """Layers kept in float32 because of their range: name -> largest value. Instance norms are always float32."""
    results: Sequence[accuracy.CaseResult]


def export_onnx(
    checkpoint: Checkpoint,
    output: Path,
    precision: str = "fp32",
    photographs: Sequence[NDArray[np.uint8]] | None = None,
    range_limit: float = RANGE_LIMIT,
    inline: bool = False,
) -> ExportReport:
    """Write `output` and return the report of its check against PyTorch.

    Args:
        checkpoint: the checkpoint to export.
        output: the .onnx file; replaced only by a file that has passed its check.
        precision: "fp32" or "fp16".
        photographs: uint8 H,W,3 pictures for calibration and check; the shipped samples by default.
        range_limit: layers with larger values on the photographs stay float32.
        inline: write the dynamic filter as standard nodes instead of function calls, for readers without support for
            functions. TensorRT's plugin replaces the function call, so such a file is not for engines.

    Raises:
        AccuracyError: the file differs from PyTorch by more than its precision allows; nothing is written.
        OSError: `output` cannot be written.
        ValueError: an unknown precision.

    """
    if precision not in ("fp32", "fp16"):
        raise ValueError(f"precision must be fp32 or fp16, got {precision!r}")
    photographs = photographs or accuracy.load_photographs()
    network = build_model(checkpoint)
    with written_whole(output) as temporary:
        log.info("tracing the network (some seconds)")
        core, kept = core_model(network), dict[str, float]()
        if precision == "fp16":
            log.info("calibrating on %d photographs", len(photographs))
            kept = float32_layers(core, value_ranges(core, _calibration_inputs(photographs)), range_limit)
            for name, largest in kept.items():
                log.info("kept in float32: %s (values up to %.3g)", name, largest)
            core = to_float16(core, kept)
        model = complete_model(core, network.config)
        _describe(model, checkpoint, precision, kept)
        if inline:
            model = onnx.inliner.inline_local_functions(model)
        onnx.checker.check_model(model, full_check=True)
        temporary.write_bytes(model.SerializeToString())
        log.info("checking against PyTorch")
        results = check(temporary, network, precision, photographs)
        digest = sha256(temporary)
    return ExportReport(output, digest, precision, float_types(model), kept, results)


def check(
    path: Path, network: InpaintingNetwork, precision: str, photographs: Sequence[NDArray[np.uint8]]
) -> list[accuracy.CaseResult]:
    """Compare the ONNX file with the PyTorch network; AccuracyError if they differ too much."""
    backend = OnnxRuntimeBackend(path, device="cpu")
    reference, tolerance = accuracy.torch_reference(network), accuracy.TOLERANCES[precision]
    results = [accuracy.compare(backend, reference, *case) for case in accuracy.cases(photographs)]
    if faults := [fault for result in results for fault in result.faults(tolerance)]:
        raise AccuracyError(
            f"the {precision} ONNX file differs too much from PyTorch, so it was not written: {'; '.join(faults)}"
            + (": export with --precision fp32, or lower --range-limit" if precision == "fp16" else "")
        )
    return results


def _calibration_inputs(photographs: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    """Return the network's input for each photograph, float32 N,4,H,W."""
    sizes = [(1, CALIBRATION_SIZE, CALIBRATION_SIZE)] * len(photographs)
    return [
        network_input(torch.from_numpy(image), torch.from_numpy(mask)).numpy()
        for image, mask in accuracy.cases(photographs, sizes)
    ]


def _describe(model: ModelProto, checkpoint: Checkpoint, precision: str, kept: dict[str, float]) -> None:
    """Write the metadata that the runtime and readers of the file need."""
    onnx.helper.set_model_props(
        model,
        {
            "misf.config": checkpoint.config.to_json(),
            "misf.precision": precision,
            "misf.float32_layers": json.dumps(sorted(kept)),
            "misf.checkpoint_sha256": checkpoint.sha256,
            "misf.iteration": str(checkpoint.iteration),
            "misf.version": version("misf"),
        },
    )
    model.doc_string = (
        "MISF inpainting. Inputs image (N,3,H,W, RGB in [0,1]) and mask (N,1,H,W, 1 = hole); "
        "output (N,3,H,W): the finished picture."
    )
