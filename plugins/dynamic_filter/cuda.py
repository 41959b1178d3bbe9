"""The CUDA implementation of the op: kernel.cuh compiled for the GPU at hand when it is first used.

Needs the extra `cuda` (cuda-core: NVIDIA's Python access to its compiler and driver) and a torch built for CUDA.
Importing this file needs neither, nor a GPU; op.py calls it for CUDA tensors. The kernels, what they promise and why:
kernel.cuh.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import warnings
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..shared.errors import EnvironmentMismatch

SOURCE_FOLDER = Path(__file__).parent
THREADS = 256
ACCESS_BYTES = 16
MAX_GRID_X, MAX_GRID_Y = 0x7FFFFFFF, 0xFFFF
MAX_SIDE = 1 << 30
TYPE_NAMES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


class Pass(IntEnum):
    """What is computed, from what: see launch.cuh."""

    FORWARD = 0
    GRAD_TAPS = 1
    GRAD_FEATURES = 2


class Layout(IntEnum):
    """How the tensors of a call lie: N,C,H,W or N,H,W,C."""

    PLANAR = 0
    CHANNELS_LAST = 1


class Shape(ctypes.Structure):
    """misf::Shape of access.cuh, field by field."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            *("batch", "channels", "height", "width", "tap_channels", "kernel_size", "share"),
            *("feature_stride", "tap_stride", "output_stride"),
            *("column_tiles", "row_tiles", "group_bits", "column_bits"),
        )
    ]


@dataclass(frozen=True)
class Plan:
    """Which kernel serves a call, and with which grid."""

    shape: Shape
    kernel: str
    """C++ name of the kernel, with its template arguments."""
    fast: bool
    width: int
    grid: tuple[int, int]


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def _bits_for(count: int, limit: int) -> int:
    """Return the smallest b with 2**b >= count, at most `limit`."""
    return min(limit, max(0, (count - 1).bit_length()))


def _channels_per_thread(which: Pass, element_size: int, share: int, width: int) -> int:
    if width == 1:
        return share // math.gcd(share, 9)
    return ACCESS_BYTES // element_size * (2 if which is Pass.FORWARD and share == 4 else 1)


def call_shape(features: tuple[int, ...], kernel_size: int, share: int) -> Shape:
    """Return the description of a call on dense tensors, from the features' N, C, H, W; without geometry."""
    n, channels, height, width = features
    tap_channels = channels * kernel_size**2 // share
    return Shape(n, channels, height, width, tap_channels, kernel_size, share, channels, tap_channels, channels)


def plan(
    which: Pass, layout: Layout, shape: Shape, dtype: torch.dtype, alignment: int = ACCESS_BYTES, *, naive: bool = False
) -> Plan:
    """Return kernel and grid for a call: the rules of launch.cuh, which a test compares with these.

    Args:
        which: forward or one of the gradients.
        layout: of all three tensors.
        shape: without geometry, see `call_shape`; the plan carries a copy with it.
        dtype: of all three tensors; float32, float16 or bfloat16.
        alignment: bytes to which all three pointers are aligned.
        naive: asks for the referee.

    Raises:
        ValueError: more elements than a grid can hold.

    """
    shape = Shape.from_buffer_copy(shape)
    shape.column_tiles = shape.row_tiles = 1
    shape.group_bits = shape.column_bits = 0
    name = ("forward", "gradTaps", "gradFeatures")[which]
    element_size, type_name = dtype.itemsize, TYPE_NAMES[dtype]
    last = layout is Layout.CHANNELS_LAST
    if last:
        written: int = (shape.output_stride, shape.tap_stride, shape.feature_stride)[which]
    else:
        written = (shape.channels, shape.tap_channels, shape.channels)[which]

    shipped = shape.kernel_size == 3 and shape.share in (1, 4) and max(shape.height, shape.width) <= MAX_SIDE
    if shipped and not naive:
        wide = ACCESS_BYTES // element_size
        if last:
            strides = (shape.feature_stride, shape.tap_stride, shape.output_stride)
            fits = alignment % ACCESS_BYTES == 0 and all(stride % wide == 0 for stride in strides)
            width = wide if fits else 1
            per_thread = _channels_per_thread(which, element_size, shape.share, width)
            groups = _divide_up(written, per_thread * 9 // shape.share if which is Pass.GRAD_TAPS else per_thread)
            shape.group_bits = _bits_for(groups, _bits_for(128 // (per_thread * element_size), 5))
            columns = shape.width
            shape.column_bits = _bits_for(columns, (8 - shape.group_bits) // 2)
            kernel = f"misf::{name}ChannelsLast<{type_name}, 3, {shape.share}, {per_thread}, {width}>"
        else:
            widths = (wide, 4 // element_size, 1)
            width = next(w for w in widths if shape.width % w == 0 and alignment % (w * element_size) == 0)
            groups = shape.channels // _channels_per_thread(which, element_size, shape.share, 1)
            columns = shape.width // width
            shape.column_bits = _bits_for(columns, 5)
            kernel = f"misf::{name}Planar<{type_name}, 3, {shape.share}, {width}>"
        shape.column_tiles = _divide_up(columns, 1 << shape.column_bits)
        shape.row_tiles = _divide_up(shape.height, THREADS >> (shape.group_bits + shape.column_bits))
        grid = (shape.column_tiles * shape.row_tiles * shape.batch, _divide_up(groups, 1 << shape.group_bits))
        if grid[0] <= MAX_GRID_X and grid[1] <= MAX_GRID_Y:
            return Plan(shape, kernel, True, width, grid)

    blocks = _divide_up(shape.batch * shape.height * shape.width * written, THREADS)
    if blocks > MAX_GRID_X:
        raise ValueError(f"the dynamic filter on CUDA takes at most {MAX_GRID_X} blocks of {THREADS}, got {blocks}")
    return Plan(shape, f"misf::{name}Naive<{type_name}, {str(last).lower()}>", False, 1, (blocks, 1))


def _header_folders() -> list[str]:
    """Return the folders that hold our sources and CUDA's headers."""
    from cuda.pathfinder import find_nvidia_header_directory

    found = find_nvidia_header_directory("cudart")
    candidates = [found] if found else [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/include"]
    for folder in candidates:
        if (Path(folder) / "cuda_fp16.h").is_file():
            return [str(SOURCE_FOLDER), str(folder)]
    raise EnvironmentMismatch(
        f"CUDA's headers (cuda_fp16.h) are not in {candidates[0]}: pip install nvidia-cuda-runtime, or set CUDA_HOME"
    )


def compile_kernel(kernel: str, architecture: str) -> Any:
    """Return `kernel` (a C++ name, see `Plan`) compiled for `architecture` ("sm_90") as a cuda.core ObjectCode.

    Needs no GPU. Raises ImportError without the extra `cuda`, EnvironmentMismatch without CUDA's headers.
    """
    from cuda.core import Program, ProgramOptions

    source = '#include "kernel.cuh"\n#include "naive.cuh"\n'
    options = ProgramOptions(arch=architecture, std="c++17", include_path=_header_folders(), name="dynamic_filter.cu")
    return Program(source, "c++", options).compile("cubin", name_expressions=[kernel])


@functools.cache
def _loaded_kernel(kernel: str, architecture: str) -> Any:
    return compile_kernel(kernel, architecture).get_kernel(kernel)


def launch_arguments(pointers: tuple[int, int, int], shape: Shape) -> tuple[Any, Any]:
    """Return the array of pointers that a launch takes, and what must live as long as it does."""
    values = [*(ctypes.c_void_p(pointer) for pointer in pointers), shape]
    return (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values)), values


def run(
    which: Pass, layout: Layout, first: Tensor, second: Tensor, written: Tensor, shape: Shape, *, naive: bool = False
) -> None:
    """Launch one pass on torch's current stream; the tensors are on one GPU and dense in `layout`.

    Args:
        which: the pass; `first`, `second`, `written` are its tensors in the order of launch.cuh.
        layout: of all three tensors.
        first: N, C, H, W: features, or the gradient to the output.
        second: taps (N, M, H, W), or features.
        written: where the result goes.
        shape: see `call_shape`.
        naive: use the referee.

    """
    pointers = (first.data_ptr(), second.data_ptr(), written.data_ptr())
    bits = functools.reduce(int.__or__, pointers, ACCESS_BYTES)
    launch(plan(which, layout, shape, written.dtype, bits & -bits, naive=naive), pointers, written.device)


def launch(call: Plan, pointers: tuple[int, int, int], device: torch.device) -> None:
    """Put a planned call on torch's current stream of `device`. Raises RuntimeError with CUDA's reason."""
    from cuda.bindings import driver

    if 0 in call.grid:
        return
    with torch.cuda.device(device):
        _make_context_current(device)
        major, minor = torch.cuda.get_device_capability()
        kernel = _loaded_kernel(call.kernel, f"sm_{major}{minor}")
        handle = int(getattr(kernel, "handle", None) or kernel._handle)  # the latter in cuda-core 0.5
        arguments, _alive = launch_arguments(pointers, call.shape)
        stream = torch.cuda.current_stream().cuda_stream
        (error,) = driver.cuLaunchKernel(
            handle, *call.grid, 1, THREADS, 1, 1, 0, stream, ctypes.addressof(arguments), 0
        )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"launching {call.kernel} failed: {error.name}")


def _make_context_current(device: torch.device) -> None:
    """Give this thread the device's primary context if it has none yet: autograd's threads may come without.

    torch makes one current at its own first work on a thread, which a launch past torch cannot wait for
    (pytorch issue 124565).
    """
    from cuda.bindings import driver

    error, context = driver.cuCtxGetCurrent()
    if error == driver.CUresult.CUDA_SUCCESS and int(context):
        return
    error, context = driver.cuDevicePrimaryCtxRetain(device.index or 0)
    if error == driver.CUresult.CUDA_SUCCESS:
        (error,) = driver.cuCtxSetCurrent(context)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"no CUDA context for {device}: {error.name}")


_FORMATS = {Layout.PLANAR: torch.contiguous_format, Layout.CHANNELS_LAST: torch.channels_last}


def _layout_of(tensor: Tensor) -> Layout:
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last):
        return Layout.PLANAR
    return Layout.CHANNELS_LAST


def _written_like(tensor: Tensor, layout: Layout) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=_FORMATS[layout])


def _as_promised(result: Tensor, like: Tensor) -> Tensor:
    """Return `result` in the strides that the op's shape function promised: those of empty_like."""
    if result.stride() == torch.empty_like(like, device="meta").stride():
        return result
    return torch.empty_like(like).copy_(result)


def forward(features: Tensor, taps: Tensor, kernel_size: int, share: int, *, naive: bool = False) -> Tensor:
    """Return the filtered features; arguments and result as in op.dynamic_filter, on a CUDA device."""
    layout = _layout_of(features)
    source, weights = (tensor.contiguous(memory_format=_FORMATS[layout]) for tensor in (features, taps))
    output = _written_like(features, layout)
    shape = call_shape(tuple(features.shape), kernel_size, share)
    run(Pass.FORWARD, layout, source, weights, output, shape, naive=naive)
    return _as_promised(output, features)


def backward(
    grad_output: Tensor, features: Tensor, taps: Tensor, kernel_size: int, share: int, *, naive: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the gradients to features and taps, N,C,H,W and N,M,H,W, in the dtype of `features`."""
    layout = _layout_of(features)
    grad, source, weights = (t.contiguous(memory_format=_FORMATS[layout]) for t in (grad_output, features, taps))
    grad_features, grad_taps = _written_like(features, layout), _written_like(taps, layout)
    shape = call_shape(tuple(features.shape), kernel_size, share)
    run(Pass.GRAD_FEATURES, layout, grad, weights, grad_features, shape, naive=naive)
    run(Pass.GRAD_TAPS, layout, grad, source, grad_taps, shape, naive=naive)
    return _as_promised(grad_features, features), _as_promised(grad_taps, taps)


@functools.cache
def available() -> bool:
    """Return whether kernels can be compiled here; where they cannot, say once why the op will be slow."""
    try:
        import cuda.core  # noqa: F401
        from cuda.bindings import driver, nvrtc  # noqa: F401

        nvrtc.nvrtcVersion()
        _header_folders()
    except (ImportError, RuntimeError, EnvironmentMismatch) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(
            "the dynamic filter runs in plain PyTorch on CUDA tensors, several times slower than its CUDA kernels: "
            f"{reason}: pip install 'misf[cuda]'",
            stacklevel=2,
        )
        return False
    return True


def serves(tensor: Tensor) -> bool:
    """Return whether the kernels take tensors like `tensor` on this machine."""
    return tensor.dtype in TYPE_NAMES and available()
