"""The backend interface, the names and devices shared by all backends, and the signature of our ONNX files.

A new backend needs a class that implements `Backend`, a line in BACKENDS, and a branch in `open_backend`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # commands look up the names below before they load NumPy
    import numpy as np
    from numpy.typing import NDArray

    from ..engines.side_car import Limits

    Tensor = NDArray[np.float32]

BACKENDS = ("auto", "onnxruntime", "openvino", "pytorch", "tensorrt")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
CHECKPOINTS = (".safetensors", ".pt", ".pth", ".ckpt")
ENGINES = (".plan", ".engine", ".trt")


class Backend(Protocol):
    """A model, loaded and ready."""

    name: str  # "onnxruntime", "openvino", "pytorch", "tensorrt" or "tensorrt-rtx"
    device: str  # the device in use, "cpu" or "cuda:N"
    precision: str  # the precision of the computation, "fp32", "fp16" or "bf16"
    multiple: int  # the sides of a picture must be multiples of this
    file_precision: str  # the precision of the model file, "fp32", "fp16" or "bf16"
    config: dict[str, Any]  # the network's config, from the model file
    checkpoint_sha256: str  # of the checkpoint that the model file was made from; "" if the file does not say

    @property
    def limits(self) -> Limits | None:
        """The shapes that an engine supports; None for any shape."""

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the finished picture, float32 N,3,H,W in [0,1]; known pixels are those of the input.

        Args:
            image: float32 N,3,H,W RGB in [0,1].
            mask: float32 N,1,H,W, 1 = hole.

        Raises:
            ValueError: the backend does not support this size, type or device.
            MisfError: the computation failed.
            MemoryError: there is not enough memory for a picture of this size.

        """


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
    """Return the network's config in an ONNX file, after checking that the file is one of ours.

    `inputs` maps names to shapes, in which anything but an int is a dynamic dimension.

    Raises:
        ValueError: the file is not one of ours; the message says what was expected.

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
    """Return the precision in an ONNX file's metadata, fp32 or fp16; ValueError for anything else."""
    precision = metadata.get("misf.precision", "fp32")
    if precision not in ("fp32", "fp16"):
        raise ValueError(f"{path} has metadata misf.precision {precision!r:.40}: expected fp32 or fp16")
    return precision


def _shape(shape: Sequence[Any]) -> str:
    return "[" + ", ".join(str(side) for side in shape) + "]"
