"""EfficientNet-Lite as its packages store it, with random weights, and features by separate layers as the referee."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Blocks = list[tuple[int, int, int, int, int]]

# Kernel size, stride, input, expanded and output channels of the first blocks in the package's files.
LITE0: Blocks = [
    (3, 1, 32, 32, 16),
    (3, 2, 16, 96, 24),
    (3, 1, 24, 144, 24),
    (5, 2, 24, 144, 40),
    (5, 1, 40, 240, 40),
    (3, 2, 40, 240, 80),
    *[(3, 1, 80, 480, 80)] * 2,
    (5, 1, 80, 480, 112),
    *[(5, 1, 112, 672, 112)] * 2,
    (5, 2, 112, 672, 192),
    *[(5, 1, 192, 1152, 192)] * 3,
]
LITE2: Blocks = [
    (3, 1, 32, 32, 16),
    (3, 2, 16, 96, 24),
    *[(3, 1, 24, 144, 24)] * 2,
    (5, 2, 24, 144, 48),
    *[(5, 1, 48, 288, 48)] * 2,
    (3, 2, 48, 288, 88),
    *[(3, 1, 88, 528, 88)] * 3,
    (5, 1, 88, 528, 120),
    *[(5, 1, 120, 720, 120)] * 3,
    (5, 2, 120, 720, 208),
    *[(5, 1, 208, 1248, 208)] * 4,
]


def random_weights(blocks: Blocks, seed: int = 0) -> dict[str, Tensor]:
    """Return random weights under the package's names."""
    random = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def conv(name: str, norm: str, outputs: int, inputs: int, size: int) -> None:
        scale = (2 / (inputs * size**2)) ** 0.5
        state[f"{name}.weight"] = scale * torch.randn(outputs, inputs, size, size, generator=random)
        for kind in ("weight", "bias", "running_mean", "running_var"):
            drawn = torch.rand(outputs, generator=random)
            state[f"{norm}.{kind}"] = drawn + 0.5 if kind in ("weight", "running_var") else 0.2 * drawn
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    conv("_conv_stem", "_bn0", 32, 3, 3)
    for number, (size, _, inputs, wide, outputs) in enumerate(blocks):
        block = f"_blocks.{number}"
        if number:
            conv(f"{block}._expand_conv", f"{block}._bn0", wide, inputs, 1)
        conv(f"{block}._depthwise_conv", f"{block}._bn1", wide, 1, size)
        conv(f"{block}._project_conv", f"{block}._bn2", outputs, wide, 1)
    state["_fc.weight"] = torch.zeros(1000, 1280)  # the package's file has a classifier, too
    return state


def reference_features(state: dict[str, Tensor], blocks: Blocks, x: Tensor) -> list[Tensor]:
    """Return the last features at each resolution from 1/4 on, with separate convolutions and batch norms.

    The padding is TensorFlow's SAME.
    """

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        size = weight.shape[2]
        borders = [max((-(-side // stride) - 1) * stride + size - side, 0) for side in x.shape[2:]]
        (top, left), (below, right) = [b // 2 for b in borders], [b - b // 2 for b in borders]
        y = F.conv2d(F.pad(x, (left, right, top, below)), weight, stride=stride, groups=groups)
        mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return F.batch_norm(y, mean, variance, state[f"{norm}.weight"], state[f"{norm}.bias"], eps=1e-3)

    x = layer((x * 255 - 127) / 128, "_conv_stem", "_bn0", 2).clamp(0, 6)
    found = []
    for number, (_, stride, inputs, wide, outputs) in enumerate(blocks):
        block, y = f"_blocks.{number}", x
        if number:
            y = layer(y, f"{block}._expand_conv", f"{block}._bn0").clamp(0, 6)
        y = layer(y, f"{block}._depthwise_conv", f"{block}._bn1", stride, wide).clamp(0, 6)
        y = layer(y, f"{block}._project_conv", f"{block}._bn2")
        x = x + y if stride == 1 and inputs == outputs else y
        if number + 1 == len(blocks) or blocks[number + 1][1] == 2:
            found.append(x)
    return found[1:]


def reference_distance(state: dict[str, Tensor], blocks: Blocks, truth: Tensor, result: Tensor) -> np.ndarray:
    """Return the mean of the squared differences of unit vectors, summed over channels and resolutions; float64 N."""
    total = np.zeros(len(truth))
    for pair in zip(*(reference_features(state, blocks, x) for x in (truth, result)), strict=True):
        a, b = (feature.double().numpy() for feature in pair)
        a, b = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (a, b))
        total += ((a - b) ** 2).sum(axis=1).mean(axis=(1, 2))
    return total
