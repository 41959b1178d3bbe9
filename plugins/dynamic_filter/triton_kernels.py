"""The dynamic filter for torch's CUDA tensors, in Triton's language: forward and both gradients.

Computes op.py's formula, for any strides, with sums in float32. Needs the package triton, which torch's CUDA builds
for Linux include. With TRITON_INTERPRET=1 the same code runs on a CPU, as in the tests.

R consecutive taps use one channel of `taps`, so P = R / gcd(R, K*K) channels of features form a group that uses whole
channels of taps. A program computes a tile of pixels and groups. For each pair it goes through the group's P*K*K
products in the order of the taps. Every element is written by one program (the gradients gather), so there are no
atomics, and results do not change from run to run.
"""

# There is no `from __future__ import annotations` here because triton reads the kernels' annotations.
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_PRODUCTS = 256
"""Maximum of P*K*K, over which the kernels are unrolled."""
LARGE = 1 << 22
"""Block sizes are tuned from this number of elements of features on; below it, the launch takes most of the time."""
CONFIGS = [triton.Config({"block": block}, num_warps=4) for block in (128, 256, 512, 1024)]


@triton.jit
def _tile(groups, pixels, width, block: tl.constexpr, block_groups: tl.constexpr, index: tl.constexpr):
    """Return image, rows, columns and groups of this program's tile, and which of its pairs exist.

    The dimension that is contiguous in memory comes last: groups for N,H,W,C tensors, otherwise pixels of one group.
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
def _neighbour(row, column, height, width, exists, t: tl.constexpr, kernel_size: tl.constexpr, sign: tl.constexpr):
    """Return row and column of the pixel that tap `t` reads (or, for sign -1, that uses it), and whether it exists."""
    y = row + sign * (t // kernel_size - kernel_size // 2)
    x = column + sign * (t % kernel_size - kernel_size // 2)
    return y, x, exists & (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def misf_filter(
    source,
    taps,
    output,
    source_stride,
    taps_stride,
    output_stride,
    groups,
    pixels,
    height,
    width,
    kernel_size: tl.constexpr,
    share: tl.constexpr,
    period: tl.constexpr,
    gradient: tl.constexpr,
    index: tl.constexpr,
    block_groups: tl.constexpr,
    block: tl.constexpr,
):
    """Filter the features or, with `gradient`, compute the gradient of the features from that of the output.

    The gradient is a similar sum, over the outputs around a feature with the taps of their pixels.
    """
    area: tl.constexpr = kernel_size * kernel_size
    image, row, column, group, exists = _tile(groups, pixels, width, block, block_groups, index)
    source += image * source_stride[0]
    taps += image * taps_stride[0]
    output += image * output_stride[0]
    tap = tl.zeros(exists.shape, tl.float32)
    for p in tl.static_range(period):
        total = tl.zeros(exists.shape, tl.float32)
        for t in tl.static_range(area):
            channel = group * (period * area // share) + (p * area + t) // share
            if gradient:
                y, x, inside = _neighbour(row, column, height, width, exists, t, kernel_size, -1)
                tap = _read(taps, taps_stride, channel, y, x, inside)
            else:
                y, x, inside = _neighbour(row, column, height, width, exists, t, kernel_size, 1)
                if (p * area + t) % share == 0:
                    tap = _read(taps, taps_stride, channel, row, column, exists)
            total += tap * _read(source, source_stride, group * period + p, y, x, inside)
        _write(output, output_stride, group * period + p, row, column, exists, total)


@triton.jit
def misf_filter_fours(
    source,
    taps,
    output,
    source_stride,
    taps_stride,
    output_stride,
    groups,
    pixels,
    height,
    width,
    kernel_size: tl.constexpr,
    share: tl.constexpr,
    period: tl.constexpr,  # noqa: ARG001 - 4
    gradient: tl.constexpr,
    index: tl.constexpr,
    block_groups: tl.constexpr,
    block: tl.constexpr,
):
    """Like misf_filter, for groups of four channels adjacent in memory, which are read and written together.

    The compiler merges repeated reads of taps by the four products at one position.
    """
    area: tl.constexpr = kernel_size * kernel_size
    image, row, column, group, exists = _tile(groups, pixels, width, block, block_groups, index)
    source += image * source_stride[0]
    taps += image * taps_stride[0]
    output += image * output_stride[0]
    channel = group[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    first = group * (4 * area // share)
    total = tl.zeros([block // block_groups, block_groups, 4], tl.float32)
    for t in tl.static_range(area):
        if gradient:
            y, x, inside = _neighbour(row, column, height, width, exists, t, kernel_size, -1)
            at_y, at_x, known = y, x, inside
        else:
            y, x, inside = _neighbour(row, column, height, width, exists, t, kernel_size, 1)
            at_y, at_x, known = row, column, exists
        tap0 = _read(taps, taps_stride, first + t // share, at_y, at_x, known)
        tap1 = _read(taps, taps_stride, first + (area + t) // share, at_y, at_x, known)
        tap2 = _read(taps, taps_stride, first + (2 * area + t) // share, at_y, at_x, known)
        tap3 = _read(taps, taps_stride, first + (3 * area + t) // share, at_y, at_x, known)
        four_taps = tl.join(tl.join(tap0, tap2), tl.join(tap1, tap3)).reshape(total.shape)
        total += four_taps * _read(source, source_stride, channel, y[:, :, None], x[:, :, None], inside[:, :, None])
    _write(output, output_stride, channel, row[:, :, None], column[:, :, None], exists[:, :, None], total)


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
    gradient: tl.constexpr,  # noqa: ARG001 - always true here
    index: tl.constexpr,
    block_groups: tl.constexpr,
    block: tl.constexpr,
):
    """Sum the R products of each channel of taps, in the order of the feature channels."""
    area: tl.constexpr = kernel_size * kernel_size
    image, row, column, group, exists = _tile(groups, pixels, width, block, block_groups, index)
    grad_output += image * grad_output_stride[0]
    features += image * features_stride[0]
    grad_taps += image * grad_taps_stride[0]
    total = tl.zeros(exists.shape, tl.float32)
    for p in tl.static_range(period):
        grad = _read(grad_output, grad_output_stride, group * period + p, row, column, exists)
        for t in tl.static_range(area):
            y, x, inside = _neighbour(row, column, height, width, exists, t, kernel_size, 1)
            total += grad * _read(features, features_stride, group * period + p, y, x, inside)
            if (p * area + t) % share == share - 1:
                channel = group * (period * area // share) + (p * area + t) // share
                _write(grad_taps, grad_taps_stride, channel, row, column, exists, total)
                total = tl.zeros(exists.shape, tl.float32)


@functools.cache
def _tuned(kernel):
    """Return the kernel, tuned once per dtype, K, R and layout; the result is cached beside triton's compiled code."""
    return triton.autotune(CONFIGS, key=["kernel_size", "share", "block_groups", "gradient"], cache_results=True)(
        kernel
    )


def _period(kernel_size: int, share: int) -> int:
    return share // math.gcd(share, kernel_size**2)


def _extent(tensor: Tensor) -> int:
    """Return the offset of the last element of one image."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


def _run(kernel, tensors: tuple[Tensor, Tensor, Tensor], kernel_size: int, share: int, *, gradient: bool) -> None:
    """Launch a kernel on three tensors, the first of which has the channels of the features."""
    n, channels, height, width = tensors[0].shape
    period = _period(kernel_size, share)
    groups = channels // period
    if tensors[2].numel() == 0:
        return
    # If channels are adjacent in memory, a warp handles up to 32 groups of them; else one group at adjacent pixels.
    channels_last = tensors[2].stride(1) == 1 and tensors[2].stride(3) != 1
    block_groups = min(32, triton.next_power_of_2(groups)) if channels_last else 1
    if kernel is misf_filter and period == 4 and block_groups > 1:
        kernel = misf_filter_fours

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (n * triton.cdiv(groups, block_groups) * triton.cdiv(height * width, meta["block"] // block_groups),)

    arguments = (*tensors, *(tensor.stride() for tensor in tensors), groups, height * width, height, width)
    constants = {
        "kernel_size": kernel_size,
        "share": share,
        "period": period,
        "gradient": gradient,
        "index": tl.int32 if max(map(_extent, tensors)) < 2**31 else tl.int64,
        "block_groups": block_groups,
    }
    with torch.cuda.device_of(tensors[0]):
        if n * channels * height * width < LARGE:
            kernel[grid](*arguments, **constants, block=128, num_warps=4)
        else:
            _tuned(kernel)[grid](*arguments, **constants)


def forward(features: Tensor, taps: Tensor, kernel_size: int, share: int) -> Tensor:
    """Return the filtered features; arguments and result as for op.dynamic_filter, on a CUDA device."""
    output = torch.empty_like(features)
    _run(misf_filter, (features, taps, output), kernel_size, share, gradient=False)
    return output


def backward(
    grad_output: Tensor, features: Tensor, taps: Tensor, kernel_size: int, share: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of features and taps, in the shapes, dtypes and memory formats of these."""
    grad_features, grad_taps = torch.empty_like(features), torch.empty_like(taps)
    _run(misf_filter, (grad_output, taps, grad_features), kernel_size, share, gradient=True)
    _run(misf_grad_taps, (grad_output, features, grad_taps), kernel_size, share, gradient=True)
    return grad_features, grad_taps


def serves(features: Tensor, kernel_size: int, share: int) -> bool:
    """Return whether the kernels support such a call; the reference handles the others."""
    return features.dtype in DTYPES and _period(kernel_size, share) * kernel_size**2 <= MOST_PRODUCTS
