"""The dynamic filter for torch's CUDA tensors, in Triton's language: forward and both gradients.

What is computed is op.py's formula, for any strides, with sums in float32. Needs the package triton, which torch's
CUDA builds for Linux bring along. With TRITON_INTERPRET=1 the same text runs on a CPU, as the tests have it.

R consecutive taps use one channel of `taps`, so P = R / gcd(R, K*K) channels of features form a group that uses whole
channels of taps. A program makes a tile of pixels and groups. For each pair it goes through the group's P*K*K products
in the order of the taps, and so reads each tap once. Every element is written by one program (the gradients gather):
no atomics, and results do not change from run to run.
"""

# triton reads the kernels' annotations: no `from __future__ import annotations` here.
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGE = 1 << 22
"""Elements of features from which on block sizes are tuned; below that, the launch is most of the time."""
MOST_PRODUCTS = 256
"""P*K*K at most: the kernels are unrolled over them."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _tile(groups, pixels, width, block: tl.constexpr, block_groups: tl.constexpr, index: tl.constexpr):
    """Return image, rows, columns and groups of this program's tile, and which of its pairs exist.

    What is contiguous in memory comes last: groups where the tensors lie as N,H,W,C; else pixels, of one group.
    """
    tiles = tl.cdiv(pixels, block // block_groups)
    group_tiles = tl.cdiv(groups, block_groups)
    program = tl.program_id(0)
    image = (program // (tiles * group_tiles)).to(tl.int64)
    if block_groups == 1:
        pixel = program % tiles * block + tl.arange(0, block)[None, :]
        group = program // tiles % group_tiles + tl.zeros([1, 1], tl.int32)
    else:
        pixel = program // group_tiles % tiles * (block // block_groups)
        pixel = pixel + tl.arange(0, block // block_groups)[:, None]
        group = program % group_tiles * block_groups + tl.arange(0, block_groups)[None, :]
    exists = (pixel < pixels) & (group < groups)
    return image, (pixel // width).to(index), (pixel % width).to(index), group.to(index), exists


@triton.jit
def _read(tensor, stride, channel, row, column, mask):
    place = channel * stride[1] + row * stride[2] + column * stride[3]
    return tl.load(tensor + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(tensor, stride, channel, row, column, mask, value):
    place = channel * stride[1] + row * stride[2] + column * stride[3]
    tl.store(tensor + place, value.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def _inside(row, column, height, width):
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def misf_forward(
    features,
    taps,
    output,
    features_stride,
    taps_stride,
    output_stride,
    groups,
    pixels,
    height,
    width,
    kernel_size: tl.constexpr,
    share: tl.constexpr,
    period: tl.constexpr,
    index: tl.constexpr,
    block_groups: tl.constexpr,
    block: tl.constexpr,
):
    """`output` from `features` and `taps`."""
    area: tl.constexpr = kernel_size * kernel_size
    image, row, column, group, exists = _tile(groups, pixels, width, block, block_groups, index)
    features += image * features_stride[0]
    taps += image * taps_stride[0]
    output += image * output_stride[0]
    tap = tl.zeros(exists.shape, tl.float32)
    for p in tl.static_range(period):
        total = tl.zeros(exists.shape, tl.float32)
        for t in tl.static_range(area):
            if (p * area + t) % share == 0:
                channel = group * (period * area // share) + (p * area + t) // share
                tap = _read(taps, taps_stride, channel, row, column, exists)
            y = row + (t // kernel_size - kernel_size // 2)
            x = column + (t % kernel_size - kernel_size // 2)
            mask = exists & _inside(y, x, height, width)
            total += tap * _read(features, features_stride, group * period + p, y, x, mask)
        _write(output, output_stride, group * period + p, row, column, exists, total)


@triton.jit
def misf_grad_taps(
    grad_output,
    features,
    grad_taps,
    grad_output_stride,
    features_stride,
    grad_taps_stride,
    groups,
    pixels,
    height,
    width,
    kernel_size: tl.constexpr,
    share: tl.constexpr,
    period: tl.constexpr,
    index: tl.constexpr,
    block_groups: tl.constexpr,
    block: tl.constexpr,
):
    """Sum, for each channel of taps, over the R products that it is in; the order of (c, i, j) is the order of taps."""
    area: tl.constexpr = kernel_size * kernel_size
    image, row, column, group, exists = _tile(groups, pixels, width, block, block_groups, index)
    grad_output += image * grad_output_stride[0]
    features += image * features_stride[0]
    grad_taps += image * grad_taps_stride[0]
    total = tl.zeros(exists.shape, tl.float32)
    for p in tl.static_range(period):
        grad = _read(grad_output, grad_output_stride, group * period + p, row, column, exists)
        for t in tl.static_range(area):
            y = row + (t // kernel_size - kernel_size // 2)
            x = column + (t % kernel_size - kernel_size // 2)
            mask = exists & _inside(y, x, height, width)
            total += grad * _read(features, features_stride, group * period + p, y, x, mask)
            if (p * area + t) % share == share - 1:
                channel = group * (period * area // share) + (p * area + t) // share
                _write(grad_taps, grad_taps_stride, channel, row, column, exists, total)
                total = tl.zeros(exists.shape, tl.float32)


@triton.jit
def misf_grad_features(
    grad_output,
    taps,
    grad_features,
    grad_output_stride,
    taps_stride,
    grad_features_stride,
    groups,
    pixels,
    height,
    width,
    kernel_size: tl.constexpr,
    share: tl.constexpr,
    period: tl.constexpr,
    index: tl.constexpr,
    block_groups: tl.constexpr,
    block: tl.constexpr,
):
    """Sum, for each feature, over the K*K products that it is in: they are the outputs around it."""
    area: tl.constexpr = kernel_size * kernel_size
    image, row, column, group, exists = _tile(groups, pixels, width, block, block_groups, index)
    grad_output += image * grad_output_stride[0]
    taps += image * taps_stride[0]
    grad_features += image * grad_features_stride[0]
    for p in tl.static_range(period):
        total = tl.zeros(exists.shape, tl.float32)
        for t in tl.static_range(area):
            y = row - (t // kernel_size - kernel_size // 2)
            x = column - (t % kernel_size - kernel_size // 2)
            mask = exists & _inside(y, x, height, width)
            channel = group * (period * area // share) + (p * area + t) // share
            grad = _read(grad_output, grad_output_stride, group * period + p, y, x, mask)
            total += grad * _read(taps, taps_stride, channel, y, x, mask)
        _write(grad_features, grad_features_stride, group * period + p, row, column, exists, total)


CONFIGS = [triton.Config({"block": block}, num_warps=4) for block in (128, 256, 512, 1024)]


@functools.cache
def _tuned(kernel):
    """Return the kernel tuned once per dtype, K, R and layout; what is found is kept beside triton's compiled code."""
    return triton.autotune(CONFIGS, key=["kernel_size", "share", "block_groups"], cache_results=True)(kernel)


def _run(kernel, first: Tensor, second: Tensor, written: Tensor, channels: int, kernel_size: int, share: int) -> None:
    period = share // math.gcd(share, kernel_size**2)
    n, _, height, width = written.shape
    groups = channels // period
    if written.numel() == 0:
        return
    # Where channels are neighbours, a warp takes up to 32 groups of them; else one group at neighbouring pixels.
    channels_last = written.stride(1) == 1 and written.stride(3) != 1
    block_groups = min(32, triton.next_power_of_2(groups)) if channels_last else 1
    tensors = (first, second, written)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (n * triton.cdiv(groups, block_groups) * triton.cdiv(height * width, meta["block"] // block_groups),)

    arguments = (*tensors, *(tensor.stride() for tensor in tensors), groups, height * width, height, width)
    constants = {
        "kernel_size": kernel_size,
        "share": share,
        "period": period,
        "index": tl.int32 if max(map(_extent, tensors)) < 2**31 else tl.int64,
        "block_groups": block_groups,
    }
    with torch.cuda.device_of(first):
        if n * channels * height * width < LARGE:
            kernel[grid](*arguments, **constants, block=128, num_warps=4)
        else:
            _tuned(kernel)[grid](*arguments, **constants)


def _extent(tensor: Tensor) -> int:
    """Return the offset of the last element of one image."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


def forward(features: Tensor, taps: Tensor, kernel_size: int, share: int) -> Tensor:
    """Return the filtered features; arguments and result as in op.dynamic_filter, on a CUDA device."""
    output = torch.empty_like(features)
    _run(misf_forward, features, taps, output, features.shape[1], kernel_size, share)
    return output


def backward(
    grad_output: Tensor, features: Tensor, taps: Tensor, kernel_size: int, share: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients to features and taps, in their shapes, dtypes and memory formats."""
    grad_features, grad_taps = torch.empty_like(features), torch.empty_like(taps)
    _run(misf_grad_features, grad_output, taps, grad_features, features.shape[1], kernel_size, share)
    _run(misf_grad_taps, grad_output, features, grad_taps, features.shape[1], kernel_size, share)
    return grad_features, grad_taps


def serves(features: Tensor, kernel_size: int, share: int) -> bool:
    """Return whether the kernels take such a call; the reference takes the rest."""
    products = share // math.gcd(share, kernel_size**2) * kernel_size**2
    return features.dtype in DTYPES and products <= MOST_PRODUCTS
