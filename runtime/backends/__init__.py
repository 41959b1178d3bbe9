"""Backends: one callable per way of running a model. `open_backend` picks the one that fits the file and the machine.

    model                      backend       where
    .onnx                      onnxruntime   CPU, NVIDIA GPU with onnxruntime-gpu
    .onnx                      openvino      CPU (extra `openvino`); bfloat16 where the processor has it
    .safetensors .pt .pth      pytorch       CPU, NVIDIA GPU (extra `export`): the reference
    .plan .engine .trt         tensorrt      NVIDIA GPU: an engine of misf-build, on TensorRT or TensorRT for RTX

For an ONNX file `auto` takes the GPU where ONNX Runtime has one, else OpenVINO where installed, else ONNX Runtime. A
precision that only one of them has (fp16: ONNX Runtime, bf16: OpenVINO) decides.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...plugins.shared.errors import EnvironmentMismatch, MisfError

log = logging.getLogger(__name__)

BACKENDS = ("auto", "onnxruntime", "openvino", "pytorch", "tensorrt")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
CHECKPOINTS = (".safetensors", ".pt", ".pth")
ENGINES = (".plan", ".engine", ".trt")
Tensor = NDArray[np.float32]


class Backend(Protocol):
    """A model, loaded and ready."""

    name: str  # "onnxruntime", "openvino", "pytorch", "tensorrt" or "tensorrt-rtx"
    device: str  # "cpu" or "cuda:N": where it really runs
    precision: str  # "fp32", "fp16" or "bf16": what it really computes in
    multiple: int  # the sides of a picture must be multiples of this
    config: dict[str, Any]  # the network's config, from the model file

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the finished picture, known pixels equal to the input's: float32 N,3,H,W in [0,1].

        image: float32 N,3,H,W RGB in [0,1]. mask: float32 N,1,H,W, 1 = hole.
        """


def open_backend(
    model: str | os.PathLike[str],
    backend: str = "auto",
    device: str | None = None,
    precision: str = "auto",
    threads: int | None = None,
) -> Backend:
    """Return a model file loaded on a backend and a device.

    device: "auto", "cpu", "cuda" or "cuda:N"; None: MISF_DEVICE, or else "auto". precision: what to compute in; "auto":
    what the file or, on OpenVINO, the processor offers. Raises ValueError or MisfError for a file that is no such
    model, EnvironmentMismatch for a library or a GPU that was asked for and is not there.
    """
    path = Path(model)
    device = parse_device(device or os.environ.get("MISF_DEVICE") or "auto")
    for what, value, known in (("backend", backend, BACKENDS), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}: expected one of {', '.join(known)}")
    _check_file(path)
    suffix = path.suffix.lower()
    if suffix in ENGINES:
        if backend not in ("auto", "tensorrt"):
            raise ValueError(f"{path} is a TensorRT engine, which {backend} cannot run: give the .onnx file instead")
        from .tensorrt import TensorRtBackend

        opened: Backend = TensorRtBackend(path, device, precision)
    elif backend == "tensorrt":
        raise ValueError(f"{path} is no engine: build one of an .onnx file with misf-build, and run that")
    elif suffix in CHECKPOINTS:
        if backend not in ("auto", "pytorch"):
            raise ValueError(f"{path} is a checkpoint, which {backend} cannot run: export it with misf-export first")
        opened = _open_pytorch(path, device, precision, threads)
    elif suffix == ".onnx":
        if backend == "pytorch":
            raise ValueError(f"{path} is an ONNX file, which pytorch cannot run: give the checkpoint instead")
        opened = _open_onnx(path, backend, device, precision, threads)
    else:
        known_suffixes = " ".join((".onnx", *CHECKPOINTS, *ENGINES))
        raise ValueError(f"{path} is no model that we know by its name: expected one of {known_suffixes}")
    log.info("%s runs on %s, %s, %s", path.name, opened.name, opened.device, opened.precision)
    return opened


def parse_device(device: str) -> str:
    """Return "auto", "cpu" or "cuda:N"; ValueError for anything else."""
    if device in ("auto", "cpu"):
        return device
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if not match:
        raise ValueError(f"unknown device {device!r}: expected auto, cpu, cuda or cuda:N")
    return f"cuda:{int(match[1] or 0)}"


def device_index(device: str) -> int:
    """Return N of "cuda:N"."""
    return int(device.partition(":")[2])


def check_onnx(
    path: Path, inputs: Mapping[str, Sequence[Any]], outputs: Sequence[str], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Return the network's config of an ONNX file, after checking that it is one of ours.

    inputs: name to shape, anything but an int for a dynamic dimension. Raises ValueError that names what was expected.
    """
    found = ", ".join(f"{name} {_shape(shape)}" for name, shape in inputs.items())
    right = {"image": 3, "mask": 1}
    fits = set(inputs) == set(right) and "output" in outputs
    fits = fits and all(len(inputs[name]) == 4 and inputs[name][1] == channels for name, channels in right.items())
    if not fits:
        raise ValueError(
            f"{path} is not one of our ONNX files: expected the inputs image [N, 3, H, W] and mask [N, 1, H, W] and an "
            f"output named output; found {found or 'no inputs'} and {', '.join(outputs) or 'no outputs'}"
        )
    fixed = [name for name, shape in inputs.items() if any(isinstance(shape[axis], int) for axis in (0, 2, 3))]
    if fixed:
        raise ValueError(f"{path} is of fixed size: expected dynamic N, H and W; found {found}")
    try:
        config = json.loads(metadata["misf.config"])
    except KeyError:
        raise ValueError(f"{path} was not written by misf-export: it has no metadata misf.config") from None
    except ValueError as error:
        raise ValueError(f"{path} has damaged metadata misf.config: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} has damaged metadata misf.config: expected a JSON object, found {config!r:.40}")
    file_precision(path, metadata)
    return config


def file_precision(path: Path, metadata: Mapping[str, str]) -> str:
    """Return what precision an ONNX file was exported in, by its metadata: fp32 or fp16; ValueError for another."""
    precision = metadata.get("misf.precision", "fp32")
    if precision not in ("fp32", "fp16"):
        raise ValueError(f"{path} has metadata misf.precision {precision!r:.40}: expected fp32 or fp16")
    return precision


def _shape(shape: Sequence[Any]) -> str:
    return "[" + ", ".join(str(side) for side in shape) + "]"


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: expected a model file")
    if not path.exists():
        raise ValueError(f"{path} does not exist: expected a model file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: expected a model file")


def _open_pytorch(path: Path, device: str, precision: str, threads: int | None) -> Backend:
    _need("torch", f"{path.name} is a checkpoint, which runs on PyTorch", "export")
    from .pytorch import PyTorchBackend

    return PyTorchBackend(path, device, precision, threads)


def _open_onnx(path: Path, backend: str, device: str, precision: str, threads: int | None) -> Backend:
    def openvino() -> Backend:
        from .open_vino import OpenVinoBackend

        return OpenVinoBackend(path, device, precision, threads)

    def onnxruntime() -> Backend:
        from .onnx_runtime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(path, device, precision, threads)

    only_openvino = precision == "bf16" and backend == "auto" and not device.startswith("cuda")
    if backend == "openvino" or only_openvino:
        for module in ("openvino", "onnx"):
            _need(module, "precision bf16" if only_openvino else "backend openvino", "openvino")
        return openvino()
    if backend == "onnxruntime" or device.startswith("cuda") or precision == "fp16":  # OpenVINO has no fp16 on CPUs
        return onnxruntime()
    return _open_best(path, device, openvino, onnxruntime)


def _open_best(path: Path, device: str, openvino: Callable[[], Backend], onnxruntime: Callable[[], Backend]) -> Backend:
    from .onnx_runtime import has_cuda

    if device == "auto" and has_cuda():
        return onnxruntime()
    if all(importlib.util.find_spec(name) for name in ("openvino", "onnx")):
        try:
            return openvino()
        except MisfError as error:
            log.warning("OpenVINO cannot run %s, ONNX Runtime does instead: %s", path.name, error)
    return onnxruntime()


def _need(module: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise EnvironmentMismatch(f"{what} needs {module}, which is not installed: pip install 'misf[{extra}]'")
