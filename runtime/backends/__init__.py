"""Backends: one callable per way of running a model. `open_backend` picks the one that fits the file and the machine.

    model                      backend       where
    .onnx                      onnxruntime   CPU (extra `cpu`), NVIDIA GPU (extra `gpu`)
    .onnx                      openvino      CPU (extra `openvino`); bfloat16 where the processor has it
    .safetensors .pt .pth      pytorch       CPU, NVIDIA GPU (extra `export`): the reference
    .plan .engine .trt         tensorrt      NVIDIA GPU: an engine of misf-build, on TensorRT or TensorRT for RTX

For an ONNX file `auto` uses the GPU if ONNX Runtime has one, else OpenVINO if it is installed (but not for networks
like misf-small, see `_is_light`), else ONNX Runtime. A precision that only one of them supports (fp16: ONNX Runtime,
bf16: OpenVINO) decides.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from ...plugins.shared.errors import MisfError
from ...plugins.shared.extras import is_installed, need, need_onnx_runtime
from ...plugins.shared.shipped import SHIPPED, shipped_checkpoint, shipped_model
from ..memory import quota_cores
from .contract import BACKENDS, CHECKPOINTS, ENGINES, PRECISIONS, Backend, parse_device

log = logging.getLogger(__name__)


def open_backend(
    model: str | os.PathLike[str],
    backend: str = "auto",
    device: str | None = None,
    precision: str = "auto",
    threads: int | None = None,
) -> Backend:
    """Return a model file loaded on a backend and a device.

    Args:
        model: an .onnx file, a checkpoint, an engine, or the name of a shipped network.
        backend: one of BACKENDS, or "auto".
        device: "auto", "cpu", "cuda" or "cuda:N"; None: MISF_DEVICE, or else "auto".
        precision: precision of the computation; "auto": that of the file or, on OpenVINO, the processor's best.
        threads: number of CPU threads; None: the library's default, or what a container's quota is worth.

    Raises:
        ValueError, MisfError: the file is not a model that the backend can run.
        EnvironmentMismatch: a requested library or GPU is missing.

    """
    threads = threads or quota_cores()
    path = shipped_checkpoint(model) if backend == "pytorch" else shipped_model(model)
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
        raise ValueError(f"{path} is not an engine: build one from an .onnx file with misf-build")
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
        raise ValueError(f"{path} has no suffix of a model file: expected one of {known_suffixes}")
    log.info("%s runs on %s, %s, %s", path.name, opened.name, opened.device, opened.precision)
    return opened


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: expected a model file")
    if not path.exists():
        raise ValueError(f"{path} does not exist: expected a model file, or the name {', '.join(SHIPPED)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: expected a model file")


def _open_pytorch(path: Path, device: str, precision: str, threads: int | None) -> Backend:
    need(f"{path.name}, a checkpoint,", "export", "torch")
    from .pytorch import PyTorchBackend

    return PyTorchBackend(path, device, precision, threads)


def _open_onnx(path: Path, backend: str, device: str, precision: str, threads: int | None) -> Backend:
    def openvino() -> Backend:
        from .open_vino import OpenVinoBackend

        return OpenVinoBackend(path, device, precision, threads)

    def onnxruntime() -> Backend:
        need_onnx_runtime(path.name)
        from .onnx_runtime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(path, device, precision, threads)

    only_openvino = precision == "bf16" and backend == "auto" and not device.startswith("cuda")
    if backend == "openvino" or only_openvino:
        need("precision bf16" if only_openvino else "backend openvino", "openvino", "openvino", "onnx")
        return openvino()
    if backend == "onnxruntime" or device.startswith("cuda") or precision == "fp16":  # OpenVINO has no fp16 on CPUs
        return onnxruntime()
    return _open_best(path, device, openvino, onnxruntime)


def _is_light(path: Path) -> bool:
    """Return whether an ONNX file's network adds detail to a smooth fill, as misf-small does.

    Such a network has little to compute in each layer, and ONNX Runtime was faster: OpenVINO took 1.2 times as long
    (512x512 and 256x256, two cores with AVX-512; with AVX2 both took the same). Networks of the published kind are
    mostly large convolutions.
    """
    try:
        import onnx

        metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        return bool(json.loads(metadata["misf.config"])["detail"])
    except Exception:  # onnx is missing or the file is not ours: the backend that opens it next reports that
        return False


def _open_best(path: Path, device: str, openvino: Callable[[], Backend], onnxruntime: Callable[[], Backend]) -> Backend:
    has_onnx_runtime = is_installed("onnxruntime")
    if device == "auto" and has_onnx_runtime:
        from .onnx_runtime import has_cuda

        if has_cuda():
            return onnxruntime()
    if has_onnx_runtime and _is_light(path):
        return onnxruntime()
    if is_installed("openvino") and is_installed("onnx"):
        try:
            return openvino()
        except MisfError as error:
            if not has_onnx_runtime:
                raise
            log.warning("OpenVINO cannot run %s, using ONNX Runtime instead: %s", path.name, error)
    return onnxruntime()
