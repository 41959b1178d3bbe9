"""ONNX files on OpenVINO, the fastest for the published network on CPUs; in bfloat16 if the processor has it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx.inliner
import openvino

from ...plugins.shared.command import one_line
from ...plugins.shared.errors import EnvironmentMismatch, MisfError
from .contract import check_onnx, file_precision

HINTS = {"fp32": "f32", "bf16": "bf16"}
if TYPE_CHECKING:
    from .contract import Tensor

LARGE = 400_000  # pixels, above which compiling for the exact size saves memory: 2.2 instead of 3.4 GB at 1024x1024


class OpenVinoBackend:
    """An ONNX file of ours compiled by OpenVINO for the CPU. See `Backend` for the call, which threads may share."""

    name = "openvino"
    device = "cpu"
    limits = None
    multiple = 1  # the graph pads pictures itself

    def __init__(self, path: Path, device: str = "auto", precision: str = "auto", threads: int | None = None):
        if device not in ("auto", "cpu"):
            raise EnvironmentMismatch(f"device {device} was requested but OpenVINO runs on CPUs: use onnxruntime")
        model = _read(path)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.config = check_onnx(
            path,
            {entry.name: _shape(entry) for entry in model.graph.input},
            [entry.name for entry in model.graph.output],
            metadata,
        )
        self.file_precision = file_precision(path, metadata)
        self.checkpoint_sha256 = metadata.get("misf.checkpoint_sha256", "")
        core = openvino.Core()
        self.precision = _precision(precision, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        self._settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[self.precision],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        try:
            # OpenVINO does not read model-local functions, so misf::DynamicFilter is inlined first.
            inlined = onnx.inliner.inline_local_functions(model).SerializeToString()
            self._model = core.read_model(inlined, b"")
        except Exception as error:
            raise MisfError(f"{path} cannot be read by OpenVINO: {one_line(error)}") from error
        self._core = core
        self._any_size: Any = None
        self._one_size: Any = None
        self._size: tuple[int, ...] = ()
        self._compiling = threading.Lock()

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the finished picture."""
        with self._compiling:
            request = self._compiled(image.shape).create_infer_request()  # one per call: its memory holds the result
        results = request.infer({"image": image, "mask": mask}, share_inputs=True, share_outputs=True)
        output: Tensor = results["output"].copy()
        return output

    def _compiled(self, shape: tuple[int, ...]) -> Any:
        """Return the model compiled for any size or, for a large picture, for its size (the last one is kept)."""
        batch, _, height, width = shape
        if batch * height * width < LARGE:
            if self._any_size is None:
                self._any_size = self._core.compile_model(self._model, "CPU", self._settings)
            return self._any_size
        if self._size != shape:
            self._one_size = None  # free its memory before the next one takes some
            model = self._model.clone()
            model.reshape({"image": [batch, 3, height, width], "mask": [batch, 1, height, width]})
            self._one_size, self._size = self._core.compile_model(model, "CPU", self._settings), shape
        return self._one_size


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's own exceptions, which we do not import
        raise ValueError(f"{path} is not an ONNX file, or a damaged one: {one_line(error)}") from error


def _shape(entry: onnx.ValueInfoProto) -> list[int | str]:
    return [side.dim_value or side.dim_param or "?" for side in entry.type.tensor_type.shape.dim]


def _precision(asked: str, capabilities: list[str]) -> str:
    """Return the precision to compute in: the requested one, if this processor supports it."""
    has_bf16 = "BF16" in capabilities
    if asked == "auto":
        return "bf16" if has_bf16 else "fp32"
    if asked == "bf16" and not has_bf16:
        raise EnvironmentMismatch("precision bf16 was requested but this processor does not compute in it: use fp32")
    if asked not in HINTS:
        raise ValueError(f"{asked} was requested but OpenVINO computes in fp32 or bf16 on CPUs")
    return asked
