"""Checkpoints on PyTorch, the reference for all other backends."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...plugins.shared.errors import EnvironmentMismatch
from ...training.model.checkpoint import load_model
from ...training.model.network import composite

if TYPE_CHECKING:
    from .contract import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class PyTorchBackend:
    """A checkpoint as a PyTorch module. See `Backend` for the call."""

    name = "pytorch"
    file_precision = "fp32"
    checkpoint_sha256 = ""
    limits = None
    multiple = 1  # the module pads pictures itself

    def __init__(self, path: Path, device: str = "auto", precision: str = "auto", threads: int | None = None):
        self.device = _device(device)
        self.precision = "fp32" if precision == "auto" else precision
        if self.precision == "fp16" and self.device == "cpu":
            raise ValueError("fp16 was requested but PyTorch computes in fp32 or bf16 on CPUs")
        if threads:
            torch.set_num_threads(threads)
        self._model = load_model(path).to(self.device)
        self.config = dataclasses.asdict(self._model.config)

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the finished picture."""
        picture, hole = torch.from_numpy(image).to(self.device), torch.from_numpy(mask).to(self.device)
        with torch.inference_mode(), self._arithmetic():
            prediction = self._model(picture, hole).float()
            output: Tensor = composite(picture, prediction, hole).cpu().numpy()
        return output

    def _arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        return torch.autocast(self.device.partition(":")[0], DTYPES[self.precision])


def _device(asked: str) -> str:
    if asked == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(asked.partition(":")[2]) >= count:
            raise EnvironmentMismatch(f"device {asked} was requested but PyTorch sees {count} GPUs: use --device cpu")
    return asked
