"""VGG-19, whose features the perceptual and style losses compare, loaded from torchvision's file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..plugins.shared.errors import MisfError

VGG19_SOURCE = "torchvision's vgg19-dcbb9e9d.pth (548 MB; torchvision.models.VGG19_Weights.IMAGENET1K_V1.url)"
VGG19_DIGEST = "dcbb9e9d"
"""The first digits of the file's SHA-256, as in torchvision's name for it."""

# Channels of the 16 3x3 convolutions, in five blocks with max-pools between (Simonyan and Zisserman, table 1, E).
_VGG19_BLOCKS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


class Vgg19(nn.Module):
    """The features of VGG-19 that the perceptual and style losses compare, with frozen weights."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        self.blocks = nn.ModuleList()
        for block in _VGG19_BLOCKS:
            inputs = (channels, *block)
            self.blocks.append(
                nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(inputs, block, strict=False))
            )
            channels = block[-1]
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the features of PERCEPTUAL_LAYERS and STYLE_LAYERS for N,3,H,W in [0,1], at least 16 pixels a side."""
        x = (x - self.mean) / self.std
        kept = {}
        for number, block in enumerate(self.blocks, 1):
            if number > 1:
                x = F.max_pool2d(x, 2)
            assert isinstance(block, nn.ModuleList)
            for layer, conv in enumerate(block, 1):
                x = F.relu(conv(x))
                name = f"relu{number}_{layer}"
                if name in PERCEPTUAL_LAYERS or name in STYLE_LAYERS:
                    kept[name] = x
                if name == STYLE_LAYERS[-1]:
                    break  # nothing deeper is compared
        return kept


PERCEPTUAL_LAYERS = tuple(f"relu{number}_1" for number in range(1, 6))
STYLE_LAYERS = ("relu2_2", "relu3_4", "relu4_4", "relu5_2")


def load_vgg19(path: str | os.PathLike[str]) -> Vgg19:
    """Return VGG-19 with the weights of torchvision's file, whose digest is checked before it is read.

    Raises:
        MisfError: the file does not exist or is another one; the message says where to get it.

    """
    path = Path(path)
    if not path.is_file():
        raise MisfError(f"{path} does not exist: get {VGG19_SOURCE}, or train without --vgg19")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(VGG19_DIGEST):
        raise MisfError(
            f"{path} is damaged or another file: its SHA-256 starts with {digest[:8]}, expected {VGG19_DIGEST}; "
            f"get {VGG19_SOURCE}"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    vgg = Vgg19()
    vgg.load_state_dict(vgg19_weights(state))
    return vgg.eval()


def vgg19_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return torchvision's VGG-19 state_dict under our names, without the classifier.

    Its `features` count every convolution, ReLU and pool: block 2 starts at index 5, block 3 at 10, and so on.
    """
    weights = {}
    index = 0
    for number, block in enumerate(_VGG19_BLOCKS):
        for layer in range(len(block)):
            for kind in ("weight", "bias"):
                weights[f"blocks.{number}.{layer}.{kind}"] = state[f"features.{index}.{kind}"]
            index += 2
        index += 1
    return weights
