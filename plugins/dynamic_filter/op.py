"""The dynamic filter in PyTorch: public function, reference, torch.library op, shape function and gradients.

Every pixel of every channel has its own K x K filter (MISF, arXiv 2203.06304, equations 2 and 5):

    output[n,c,y,x] = sum over i,j in [0,K) of
        features[n, c, y + i - K//2, x + j - K//2] * taps[n, (c*K*K + i*K + j) // share, y, x]

Correlation (no flip), zero border, float32 accumulation. This formula is the contract of every other
implementation (ONNX body, CUDA kernels, TensorRT plugin); they are all tested against this file.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Iterator
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

Region = tuple[EllipsisType, slice, slice]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def dynamic_filter(features: Tensor, taps: Tensor, kernel_size: int = 3, share: int = 1) -> Tensor:
    """Return `features` filtered with one K x K filter per pixel and channel.

    Args:
        features: N, C, H, W; float32, float16 or bfloat16 (float64 for gradient checks); NCHW or channels-last.
        taps: N, M, H, W with M = C * K * K / share; same dtype and device as `features`, any layout.
            Under autocast the dtypes may differ; both are then cast to the autocast dtype.
        kernel_size: K, odd.
        share: number of consecutive taps that use one channel of `taps`; must divide C * K * K.

    Returns:
        N, C, H, W, dtype and memory format of `features`.

    Raises:
        ValueError: the sizes do not fit together; the message names the expected ones.
        TypeError: the dtypes differ or are not supported.

    """
    device = features.device.type
    if features.dtype != taps.dtype and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        features, taps = features.to(dtype), taps.to(dtype)
    _check(features, taps, kernel_size, share)
    output: Tensor = _forward_op(features, taps, kernel_size, share)
    return output


def _check(features: Tensor, taps: Tensor, kernel_size: int, share: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    if share < 1:
        raise ValueError(f"share must be positive, got {share}")
    if features.dim() != 4 or taps.dim() != 4:
        raise ValueError(f"features and taps must be N,C,H,W, got {tuple(features.shape)} and {tuple(taps.shape)}")
    channels, taps_per_channel = features.shape[1], kernel_size**2
    if channels * taps_per_channel % share:
        raise ValueError(
            f"share must divide C*K*K = {channels}*{taps_per_channel} = {channels * taps_per_channel}, got {share}"
        )
    expected = channels * taps_per_channel // share
    if taps.shape[1] != expected:
        raise ValueError(
            f"taps must have C*K*K/share = {channels}*{taps_per_channel}/{share} = {expected} channels, "
            f"got {taps.shape[1]}"
        )
    if features.shape[0] != taps.shape[0] or features.shape[2:] != taps.shape[2:]:
        raise ValueError(
            f"features and taps must agree in N, H and W, got {tuple(features.shape)} and {tuple(taps.shape)}"
        )
    if features.dtype not in _DTYPES:
        raise TypeError(f"features must be float32, float16 or bfloat16, got {features.dtype}")
    if taps.dtype != features.dtype:
        raise TypeError(f"taps must have the dtype of features, {features.dtype}, got {taps.dtype}")
    if taps.device != features.device:
        raise ValueError(f"taps must be on the device of features, {features.device}, got {taps.device}")


def _period(kernel_size: int, share: int) -> int:
    """Return P, the smallest number of channels whose P*K*K taps fill whole channels of `taps`.

    4 for MISF's K = 3 and share = 4: channels 4g..4g+3 use exactly the taps 9g..9g+8.
    """
    return share // math.gcd(share, kernel_size**2)


def _group(tensor: Tensor, size: int) -> Tensor:
    """View N,C,H,W as N,G,size,H,W, whatever the memory format."""
    n, channels, height, width = tensor.shape
    return tensor.view(n, channels // size, size, height, width)


def _span(offset: int, size: int) -> tuple[slice, slice]:
    """Output and input range along one axis for a tap that reads `offset` away, cut at the zero border."""
    start, stop = max(0, -offset), max(0, -offset, min(size, size - offset))
    return slice(start, stop), slice(start + offset, stop + offset)


def _tap_regions(kernel_size: int, share: int, height: int, width: int) -> Iterator[tuple[int, int, Region, Region]]:
    """Yield (channel in its group, tap in its group, output region, input region) for every tap of a group."""
    for channel in range(_period(kernel_size, share)):
        for i in range(kernel_size):
            out_rows, in_rows = _span(i - kernel_size // 2, height)
            for j in range(kernel_size):
                out_columns, in_columns = _span(j - kernel_size // 2, width)
                tap = (channel * kernel_size**2 + i * kernel_size + j) // share
                yield channel, tap, (..., out_rows, out_columns), (..., in_rows, in_columns)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _like(result: Tensor, example: Tensor) -> Tensor:
    """Return `result` in the dtype and memory format of `example`, copied only where they differ."""
    target = torch.empty_like(example)
    if (result.dtype, result.stride()) == (target.dtype, target.stride()):
        return result
    return target.copy_(result)


def _forward_reference(features: Tensor, taps: Tensor, kernel_size: int, share: int) -> Tensor:
    """Shift and accumulate on views of the unexpanded taps, without K*K copies of the features."""
    dtype = _accumulation_dtype(features.dtype)
    # Always NCHW: on CPUs, shifted planes are an order of magnitude faster than strided channels.
    source, taps = features.to(dtype).contiguous(), taps.contiguous()
    output = torch.zeros_like(source)
    period = _period(kernel_size, share)
    f, o, t = _group(source, period), _group(output, period), _group(taps, period * kernel_size**2 // share)
    for channel, tap, to, at in _tap_regions(kernel_size, share, *features.shape[2:]):
        o[:, :, channel][to].addcmul_(f[:, :, channel][at], t[:, :, tap][to].to(dtype))
    return _like(output, features)


_forward_op = torch.library.custom_op("misf::dynamic_filter", _forward_reference, mutates_args=())


@_forward_op.register_fake
def _(features: Tensor, taps: Tensor, kernel_size: int, share: int) -> Tensor:  # noqa: ARG001 - the op's signature
    return torch.empty_like(features)


def _backward_reference(
    grad_output: Tensor, features: Tensor, taps: Tensor, kernel_size: int, share: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of features and taps; only the op's inputs are saved for them."""
    dtype = _accumulation_dtype(features.dtype)
    grad_output, source, planes = grad_output.to(dtype).contiguous(), features.to(dtype).contiguous(), taps.contiguous()
    grad_features, grad_taps = torch.zeros_like(source), torch.zeros_like(planes, dtype=dtype)
    period = _period(kernel_size, share)
    period_taps = period * kernel_size**2 // share
    f, t, g = _group(source, period), _group(planes, period_taps), _group(grad_output, period)
    gf, gt = _group(grad_features, period), _group(grad_taps, period_taps)
    for channel, tap, to, at in _tap_regions(kernel_size, share, *features.shape[2:]):
        gf[:, :, channel][at].addcmul_(g[:, :, channel][to], t[:, :, tap][to].to(dtype))
        gt[:, :, tap][to].addcmul_(g[:, :, channel][to], f[:, :, channel][at])
    return _like(grad_features, features), _like(grad_taps, taps)


_backward_op = torch.library.custom_op("misf::dynamic_filter_backward", _backward_reference, mutates_args=())


@_backward_op.register_fake
def _(
    grad_output: Tensor,  # noqa: ARG001 - the op's signature
    features: Tensor,
    taps: Tensor,
    kernel_size: int,  # noqa: ARG001
    share: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(features), torch.empty_like(taps)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:  # noqa: ARG001
    features, taps, ctx.kernel_size, ctx.share = inputs
    ctx.save_for_backward(features, taps)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
    features, taps = ctx.saved_tensors
    grads = _backward_op(grad_output, features, taps, ctx.kernel_size, ctx.share)
    return grads[0], grads[1], None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


# CUDA tensors go to the Triton kernels. Calls that these do not support (float64, which only gradient checks use, and
# filters with more than 256 products per group) and, without triton, all calls go to the reference.
# This is a custom op and not a torch.library.triton_op: torch.compile would trace the Triton kernels of the latter for
# CPU tensors too, and fail without a GPU (tried with torch 2.13). Either way the op is a single node of the graph.


@functools.cache
def _triton() -> bool:
    """Return whether triton can be imported; if not, warn once that the op will be slow."""
    if importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn(
        "triton is not installed, so the dynamic filter runs in plain PyTorch on CUDA tensors, which is several times "
        "slower: pip install triton (triton-windows on Windows)",
        stacklevel=2,
    )
    return False


@_forward_op.register_kernel("cuda")
def _(features: Tensor, taps: Tensor, kernel_size: int, share: int) -> Tensor:
    if _triton():
        from . import triton_kernels

        if triton_kernels.serves(features, kernel_size, share):
            return triton_kernels.forward(features, taps, kernel_size, share)
    return _forward_reference(features, taps, kernel_size, share)


@_backward_op.register_kernel("cuda")
def _(grad_output: Tensor, features: Tensor, taps: Tensor, kernel_size: int, share: int) -> tuple[Tensor, Tensor]:
    if _triton():
        from . import triton_kernels

        if triton_kernels.serves(features, kernel_size, share):
            return triton_kernels.backward(grad_output, features, taps, kernel_size, share)
    return _backward_reference(grad_output, features, taps, kernel_size, share)
