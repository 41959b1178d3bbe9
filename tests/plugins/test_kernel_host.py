"""The CUDA kernels, executed on the CPU from the very source that ships, against the PyTorch reference in float64.

Also: the geometry that Python computes is that of C++, and nvcc compiles what ships for every GPU without spills.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from misf.plugins.dynamic_filter import cuda
from misf.plugins.dynamic_filter.cuda import Layout, Pass
from misf.plugins.dynamic_filter.op import dynamic_filter

from .cuda_host.walker import SOURCES, Fenced, alignment_of, library, walk

TYPES = [torch.float32, torch.float16, torch.bfloat16]
# One rounding to the storage type, and float32 sums of at most R * K * K products.
RELATIVE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
ABSOLUTE = {torch.float32: 5e-6, torch.float16: 5e-6, torch.bfloat16: 5e-6}

# N, C, H, W, K, R
CASES = [
    (1, 4, 1, 1, 3, 4),  # one pixel: all border
    (2, 8, 5, 7, 3, 4),  # odd
    (1, 20, 3, 16, 3, 4),  # 20 channels: no multiple of the 16 that a channels-last thread makes
    (2, 4, 35, 24, 3, 4),  # more rows than a block
    (1, 4, 2, 264, 3, 4),  # more columns than a block
    (1, 64, 9, 10, 3, 4),  # several blocks of channels; width for 4-byte accesses
    (1, 3, 1, 9, 3, 1),  # the picture: 3 channels, 27 taps; one row
    (3, 3, 18, 8, 3, 1),
    (2, 16, 33, 6, 3, 1),
    (1, 40, 4, 17, 3, 1),
    (2, 3, 6, 5, 5, 1),  # no kernel of its own from here on
    (1, 2, 4, 3, 3, 2),
    (1, 8, 3, 4, 3, 8),
    (2, 5, 2, 3, 1, 5),
    (1, 5, 7, 7, 7, 49),
]


def paddings(layout: Layout, channels: int) -> list[int]:
    """Pixel strides to try: dense, and rounded up to 8 as in TensorRT's HWC8."""
    return sorted({channels, -(-channels // 8) * 8}) if layout is Layout.CHANNELS_LAST else [channels]


def lay(tensor: Tensor, layout: Layout, stride: int, place: str) -> Fenced:
    """Put N,C,H,W values into memory in a layout; padding holds NaN, which must not get into any result."""
    if layout is Layout.PLANAR:
        return Fenced.holding(tensor, place)
    n, channels, height, width = tensor.shape
    padded = torch.full((n, height, width, stride), float("nan"), dtype=tensor.dtype)
    padded[..., :channels] = tensor.permute(0, 2, 3, 1)
    return Fenced.holding(padded, place)


def unlay(data: Tensor, shape: tuple[int, ...], layout: Layout, stride: int) -> Tensor:
    """Take N,C,H,W values out of memory; padding must be zero."""
    n, channels, height, width = shape
    if layout is Layout.PLANAR:
        return data.view(shape)
    padded = data.view(n, height, width, stride)
    assert bool((padded[..., channels:] == 0).all()), "padded channels must be written as zero"
    return padded[..., :channels].permute(0, 3, 1, 2)


class Problem:
    """Random tensors of one case, and the three results that are right."""

    def __init__(self, case: tuple[int, ...], dtype: torch.dtype) -> None:
        n, channels, height, width, self.kernel_size, self.share = case
        generator = torch.Generator().manual_seed(sum(case))
        taps = channels * self.kernel_size**2 // self.share
        self.features = torch.randn(n, channels, height, width, generator=generator).to(dtype)
        self.taps = torch.randn(n, taps, height, width, generator=generator).to(dtype)
        self.grad_output = torch.randn(n, channels, height, width, generator=generator).to(dtype)
        exact_features, exact_taps = (t.double().requires_grad_() for t in (self.features, self.taps))
        exact = dynamic_filter(exact_features, exact_taps, self.kernel_size, self.share)
        grads = torch.autograd.grad(exact, (exact_features, exact_taps), self.grad_output.double())
        self.expected = {Pass.FORWARD: exact.detach(), Pass.GRAD_FEATURES: grads[0], Pass.GRAD_TAPS: grads[1]}

    def inputs(self, which: Pass) -> tuple[Tensor, Tensor]:
        return {
            Pass.FORWARD: (self.features, self.taps),
            Pass.GRAD_TAPS: (self.grad_output, self.features),
            Pass.GRAD_FEATURES: (self.grad_output, self.taps),
        }[which]


def variants(case: tuple[int, ...]) -> Iterator[tuple[Layout, str, int, int]]:
    """Yield layout, place in memory, and the pixel strides of features (and output) and taps."""
    channels, taps = case[1], case[1] * case[4] ** 2 // case[5]
    for layout in Layout:
        for feature_stride in paddings(layout, channels):
            for tap_stride in paddings(layout, taps):
                for place in ("end", "start", "shifted"):
                    yield layout, place, feature_stride, tap_stride


def check(
    walker: ctypes.CDLL,
    problem: Problem,
    which: Pass,
    layout: Layout,
    place: str,
    strides: tuple[int, int],
    naive: bool,
) -> str:
    """Run one pass in one layout; assert every element; return the name of the kernel that ran."""
    feature_stride, tap_stride = strides
    expected = problem.expected[which]
    pair = problem.inputs(which)
    second_stride = tap_stride if pair[1] is problem.taps else feature_stride
    written_stride = tap_stride if which is Pass.GRAD_TAPS else feature_stride
    first, second = lay(pair[0], layout, feature_stride, place), lay(pair[1], layout, second_stride, place)
    n, channels, height, width = expected.shape
    written_channels = written_stride if layout is Layout.CHANNELS_LAST else channels
    written = Fenced(n * height * width * written_channels, problem.features.dtype, place).poison()

    shape = cuda.call_shape(tuple(problem.features.shape), problem.kernel_size, problem.share)
    shape.feature_stride = shape.output_stride = feature_stride
    shape.tap_stride = tap_stride
    tensors = (first.data, second.data, written.data)
    walk(walker, which, layout, tensors, shape, naive=naive)

    result = unlay(written.data, tuple(expected.shape), layout, written_stride).double()
    dtype = problem.features.dtype
    torch.testing.assert_close(result, expected, rtol=RELATIVE[dtype], atol=ABSOLUTE[dtype])
    for buffer in (first, second, written):
        buffer.assert_intact()
    return cuda.plan(which, layout, shape, dtype, alignment_of(*tensors), naive=naive).kernel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("walker")


@pytest.fixture(scope="module", params=TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def walker(request: pytest.FixtureRequest, folder: Path) -> tuple[ctypes.CDLL, torch.dtype]:
    return library(request.param, folder), request.param


def test_every_kernel_agrees_with_the_reference(walker: tuple[ctypes.CDLL, torch.dtype]) -> None:
    """Every pass, layout, padding and alignment of every awkward size; and no kernel that ships is left out."""
    library_, dtype = walker
    ran = set()
    for case in CASES:
        problem = Problem(case, dtype)
        for layout, place, *strides in variants(case):
            for which in Pass:
                ran.add(check(library_, problem, which, layout, place, (strides[0], strides[1]), naive=False))
    name, wide = cuda.TYPE_NAMES[dtype], 16 // dtype.itemsize
    expected = {f"misf::{which}Naive<{name}, {last}>" for which in NAMES for last in ("false", "true")}
    for which in NAMES:
        for share, channels, group in ((4, 2 * wide if which == "forward" else wide, 4), (1, wide, 1)):
            widths = {wide, 4 // dtype.itemsize, 1}
            expected |= {f"misf::{which}Planar<{name}, 3, {share}, {width}>" for width in widths}
            expected |= {f"misf::{which}ChannelsLast<{name}, 3, {share}, {channels}, {wide}>"}
            expected |= {f"misf::{which}ChannelsLast<{name}, 3, {share}, {group}, 1>"}
    assert ran == expected


NAMES = ("forward", "gradTaps", "gradFeatures")


def test_the_referee_agrees_with_the_reference(walker: tuple[ctypes.CDLL, torch.dtype]) -> None:
    """The naive kernels, asked for where a fast one exists."""
    library_, dtype = walker
    for case in CASES[1:3] + CASES[6:8]:
        problem = Problem(case, dtype)
        for layout, place, *strides in variants(case):
            for which in Pass:
                kernel = check(library_, problem, which, layout, place, (strides[0], strides[1]), naive=True)
                assert "Naive" in kernel


@pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.name.lower())
def test_offsets_beyond_32_bits(layout: Layout, folder: Path) -> None:
    """The last block of 3 x 4 x 16384 x 16384 values: 3.2e9 elements, 7.2e9 taps, in memory mostly untouched."""
    dtype, sides, crop = torch.float16, (3, 4, 16384, 16384), (4, 8)
    n, channels, height, width = sides
    taps_channels = 9
    strides = (8, 16) if layout is Layout.CHANNELS_LAST else (channels, taps_channels)
    problem = Problem((1, channels, *crop, 3, 4), dtype)
    expected = problem.expected[Pass.FORWARD]

    def place_last(values: Tensor, stride: int) -> Tensor:
        count = values.shape[1] if layout is Layout.PLANAR else stride
        buffer = Fenced(n * count * height * width, dtype)
        buffers.append(buffer)
        last = (slice(None), slice(height - crop[0], height), slice(width - crop[1], width))
        if layout is Layout.PLANAR:
            buffer.data.view(n, count, height, width)[-1][last] = values[0]
        else:
            buffer.data.view(n, height, width, count)[-1][last[1:]][..., : values.shape[1]] = values[0].permute(1, 2, 0)
        return buffer.data

    buffers: list[Fenced] = []
    features, taps = place_last(problem.features, strides[0]), place_last(problem.taps, strides[1])
    output = place_last(torch.full_like(problem.features, float("nan")), strides[0])
    shape = cuda.call_shape(sides, 3, 4)
    shape.feature_stride = shape.output_stride = strides[0]
    shape.tap_stride = strides[1]
    grid = cuda.plan(Pass.FORWARD, layout, shape, dtype).grid
    last_block = (grid[0] - 1, grid[1] - 1)
    walk(library(dtype, folder), Pass.FORWARD, layout, (features, taps, output), shape, first_block=last_block)
    if layout is Layout.PLANAR:
        result = output.view(sides)[-1:, :, -crop[0] :, -crop[1] :]
    else:
        result = output.view(n, height, width, 8)[-1:, -crop[0] :, -crop[1] :, :channels].permute(0, 3, 1, 2)
    torch.testing.assert_close(result.double(), expected, rtol=RELATIVE[dtype], atol=ABSOLUTE[dtype])


def test_python_and_cpp_plan_alike(folder: Path) -> None:
    """cuda.py launches with the geometry of launch.cuh, for sizes from nothing to too much."""
    walker = library(torch.float32, folder)
    sizes = [case[:4] for case in CASES] + [
        *[(0, 4, 8, 8), (1, 4, 0, 8), (1, 256, 64, 64), (32, 256, 128, 96), (1, 3, 4096, 6144), (1, 300000, 8, 8)],
        *[(70000, 4, 2, 2), (1, 4, 1 << 20, 1 << 19), (1, 4, (1 << 30) + 8, 1), (2, 8, 70001, 70001)],
        (1 << 30, 4, 1 << 20, 1 << 20),
    ]
    compared = 0
    for n, channels, height, width in sizes:
        for kernel_size, share in ((3, 4), (3, 1), (5, 1), (3, 2)):
            if channels * kernel_size**2 % share or channels * kernel_size**2 // share > 2**31 - 1:
                continue
            for padding in (1, 8):
                shape = cuda.call_shape((n, channels, height, width), kernel_size, share)
                for name in ("feature_stride", "tap_stride", "output_stride"):
                    setattr(shape, name, -(-getattr(shape, name) // padding) * padding)
                for which in Pass:
                    for layout in Layout:
                        for dtype in (torch.float32, torch.float16):
                            for alignment in (dtype.itemsize, 4, 16):
                                compare_plans(walker, which, layout, shape, dtype, alignment)
                                compared += 1
    assert compared > 1000


def compare_plans(
    walker: ctypes.CDLL, which: Pass, layout: Layout, shape: cuda.Shape, dtype: torch.dtype, alignment: int
) -> None:
    theirs = cuda.Shape.from_buffer_copy(shape)
    report = (ctypes.c_uint * 4)()
    size, aligned = ctypes.c_int(dtype.itemsize), ctypes.c_ulonglong(alignment)
    walker.misf_plan(int(which), int(layout), ctypes.byref(theirs), size, aligned, 0, report)
    try:
        ours = cuda.plan(which, layout, shape, dtype, alignment)
    except ValueError:
        assert report[2] == 0, "C++ found a grid where Python found none"
        return
    if 0 in ours.grid:
        assert report[2] == 0
        return
    assert (ours.fast, ours.width, *ours.grid) == (bool(report[0]), *report[1:])
    if ours.fast:
        assert bytes(ours.shape) == bytes(theirs)


ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 120)
EVERYTHING = os.environ.get("MISF_ALL_ARCHITECTURES") == "1"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nvcc_compiles_without_spills(tmp_path: Path) -> None:
    """What the plugin ships, for the oldest, a middle and the newest GPU; with MISF_ALL_ARCHITECTURES=1 all for all."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        pytest.skip("NOT PROVED: nvcc did not compile the CUDA kernels, because it is not installed")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {int(arch) for arch in re.findall(r"compute_(\d+)\n", listed)}
    wanted = [arch for arch in (ARCHITECTURES if EVERYTHING else (75, 90, 120)) if arch in known]
    assert {75, 90} <= set(wanted)
    source = Path(__file__).parent / "cuda_host" / "all_kernels.cu" if EVERYTHING else SOURCES / "launch.cu"
    command = [nvcc, "-std=c++17", "-O3", "-c", "-Xptxas", "-v", "-I", str(SOURCES), "--threads", "2"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted]
    result = subprocess.run([*command, str(source), "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", result.stderr)
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert {int(arch) for _name, arch in kernels} == set(wanted)
    assert len(memory) == len(kernels) == len(set(kernels))
    assert len(kernels) == len(wanted) * (102 if EVERYTHING else 17)
    spilling = [kernel for kernel, numbers in zip(kernels, memory, strict=True) if set(numbers) != {"0"}]
    assert spilling == [], "these kernels keep values in local memory"
