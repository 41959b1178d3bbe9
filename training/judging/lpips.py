"""LPIPS (Zhang et al., CVPR 2018, version 0.1) on AlexNet, whose weights the user has to provide.

The backbone is torchvision's `alexnet-owt-7be5be79.pth`, read from a path; the linear heads come with torchmetrics.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...plugins.shared.errors import MisfError
from ...plugins.shared.extras import need
from ...plugins.shared.files import sha256

BACKBONE_FILE = "alexnet-owt-7be5be79.pth"
BACKBONE_DIGEST = "7be5be79"  # start of the file's SHA-256, as in torchvision's name for it

# input channels, output channels, kernel size, stride, padding; max-pool 3/2 before the second and the third
_CONVOLUTIONS = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
_KEYS = (0, 3, 6, 8, 10)  # their indices in torchvision's `features`
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Perceptual distance: (truth, result) N,3,H,W float32 in [0,1] -> N; 0 for equal pictures."""

    def __init__(self, backbone: Mapping[str, Tensor], heads: Sequence[Tensor]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(*sizes) for sizes in _CONVOLUTIONS])
        for convolution, place in zip(self.convolutions, _KEYS, strict=True):
            weights = {name: backbone[f"features.{place}.{name}"] for name in ("weight", "bias")}
            convolution.load_state_dict(weights)
        for level, head in enumerate(heads):
            self.register_buffer(f"head{level}", head.reshape(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, truth: Tensor, result: Tensor) -> Tensor:
        """Return the distance of each pair, float32 N."""
        x, y = ((2 * picture - 1 - self.shift) / self.scale for picture in (truth, result))  # type: ignore[operator]
        total = torch.zeros(len(truth), device=truth.device)
        for level, convolution in enumerate(self.convolutions):
            if level in (1, 2):
                x, y = F.max_pool2d(x, 3, 2), F.max_pool2d(y, 3, 2)
            x, y = F.relu(convolution(x)), F.relu(convolution(y))
            difference = (_unit(x) - _unit(y)) ** 2
            total = total + (difference * self.get_buffer(f"head{level}")).sum(dim=1).mean(dim=(1, 2))
        return total


def _unit(x: Tensor) -> Tensor:
    return x / torch.sqrt(1e-8 + (x**2).sum(dim=1, keepdim=True))


def load_lpips(path: str | os.PathLike[str]) -> Lpips:
    """Return LPIPS with torchvision's AlexNet weights from `path`.

    Raises:
        MisfError: the file's digest is not that of torchvision's file, or torchmetrics lacks the heads.
        EnvironmentMismatch: torchmetrics is not installed.

    """
    digest = sha256(path)
    if not digest.startswith(BACKBONE_DIGEST):
        raise MisfError(
            f"{path}: expected torchvision's {BACKBONE_FILE} (SHA-256 {BACKBONE_DIGEST}...), found {digest[:8]}...; "
            "torchvision.models.alexnet(weights='DEFAULT') downloads it into the torch hub folder"
        )
    return Lpips(torch.load(path, map_location="cpu", weights_only=True), published_heads())


def published_heads() -> list[Tensor]:
    """Return the five linear heads of LPIPS 0.1 for AlexNet, each 1,C,1,1, from a file in torchmetrics.

    torchmetrics itself is not imported.

    Raises:
        EnvironmentMismatch: torchmetrics is not installed.
        MisfError: torchmetrics has no such file.

    """
    need("LPIPS", "lpips", "torchmetrics")
    package = distribution("torchmetrics")
    path = Path(str(package.locate_file("torchmetrics/functional/image/lpips_models/alex.pth")))
    if not path.is_file():
        raise MisfError(f"torchmetrics {package.version} has no {path.name} with the LPIPS heads: install 1.9")
    heads = torch.load(path, map_location="cpu", weights_only=True)
    return [heads[f"lin{level}.model.1.weight"] for level in range(5)]
