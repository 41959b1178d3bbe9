"""ONNX files on ONNX Runtime: CPU and CUDA."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from ...plugins.shared.command import one_line
from ...plugins.shared.errors import EnvironmentMismatch
from ...plugins.shared.extras import pip_install
from .contract import check_onnx, device_index, file_precision

if TYPE_CHECKING:
    from .contract import Tensor

log = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
FATAL = 4  # level of ONNX Runtime's log on stderr, because its errors also come as exceptions


def has_cuda() -> bool:
    """Return whether this ONNX Runtime was built for NVIDIA GPUs (not whether there is one)."""
    return CUDA in onnxruntime.get_available_providers()


def load_cuda_libraries() -> None:
    """Load CUDA and cuDNN from pip packages, where the CUDA provider does not search, if they are installed."""
    with contextlib.suppress(AttributeError):  # before ONNX Runtime 1.21
        onnxruntime.preload_dlls()


class OnnxRuntimeBackend:
    """An ONNX file of ours in an ONNX Runtime session. See `Backend` for the call.

    On a GPU it also accepts torch tensors, which stay there; this has not been run on a GPU yet (docs/gpu-status.md).
    """

    name = "onnxruntime"
    limits = None
    multiple = 1  # the graph pads pictures itself

    def __init__(self, path: Path, device: str = "auto", precision: str = "auto", threads: int | None = None):
        onnxruntime.set_default_logger_severity(FATAL)
        self._session, self.device = _open_session(path, device, threads)
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.config = check_onnx(
            path,
            {entry.name: entry.shape for entry in self._session.get_inputs()},
            [entry.name for entry in self._session.get_outputs()],
            metadata,
        )
        self.precision = self.file_precision = file_precision(path, metadata)
        self.checkpoint_sha256 = metadata.get("misf.checkpoint_sha256", "")
        if precision not in ("auto", self.precision):
            exported = f"export it with --precision {precision}"
            advice = "use precision auto, or OpenVINO" if precision == "bf16" else exported
            raise ValueError(
                f"{path} is {self.precision}, but {precision} was requested: "
                f"ONNX Runtime computes in the file's precision, so {advice}"
            )

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the finished picture, on the device and of the type of `image`."""
        if hasattr(image, "__cuda_array_interface__"):
            output: Tensor = self._on_gpu(image, mask)
        else:
            output = self._session.run(["output"], {"image": image, "mask": mask})[0]
        return output

    def _on_gpu(self, image: Any, mask: Any) -> Any:
        """Return the finished picture for torch tensors on the session's device, without copying them."""
        import torch

        kind, _, index = self.device.partition(":")
        output = image.new_empty(image.shape)
        binding = self._session.io_binding()
        for name, tensor in (("image", image), ("mask", mask), ("output", output)):
            fits = isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and tensor.is_contiguous()
            if not fits or str(tensor.device) != self.device:
                found = f"{getattr(tensor, 'dtype', type(tensor))} on {getattr(tensor, 'device', 'an unknown device')}"
                raise ValueError(f"{name} must be a contiguous float32 torch tensor on {self.device}, got {found}")
            bind = binding.bind_output if name == "output" else binding.bind_input
            bind(name, kind, int(index or 0), np.float32, tuple(tensor.shape), tensor.data_ptr())
        torch.cuda.current_stream(image.device).synchronize()  # ONNX Runtime uses another stream
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return output


def _open_session(path: Path, device: str, threads: int | None) -> tuple[Any, str]:
    """Return a session and the device that it runs on."""
    asked = device.startswith("cuda")
    if asked and not has_cuda():
        raise EnvironmentMismatch(
            f"device {device} was requested but this ONNX Runtime has no CUDA provider "
            f"(only {', '.join(onnxruntime.get_available_providers())}): "
            f"pip uninstall onnxruntime, then {pip_install('gpu')}, or use the device cpu"
        )
    if not asked and (device == "cpu" or not has_cuda()):
        return _session(path, [CPU], threads), "cpu"
    index = device_index(device) if asked else 0
    load_cuda_libraries()
    with contextlib.suppress(ValueError):
        session = _session(path, [(CUDA, _cuda_options(index)), CPU], threads)
        if CUDA in session.get_providers():
            return session, f"cuda:{index}"
    session = _session(path, [CPU], threads)  # raises if the file is damaged
    reason = "ONNX Runtime cannot start its CUDA provider: no such GPU, or CUDA or cuDNN is missing or does not match"
    if asked:
        raise EnvironmentMismatch(f"device {device} was requested but is not usable. {reason}")
    log.warning("%s; running on the CPU", reason)
    return session, "cpu"


def _session(path: Path, providers: list[Any], threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    # Memory patterns are kept for every picture size: gigabytes at 1024x1024, without any gain.
    options.enable_mem_pattern = False
    if threads:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # its exceptions share no base class
        raise ValueError(f"{path} is not an ONNX file, or a damaged one: {one_line(error)}") from error


def _cuda_options(index: int) -> dict[str, Any]:
    return {
        "device_id": index,
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": 0,  # on by default, but with 10 bits of mantissa it is not fp32
    }
