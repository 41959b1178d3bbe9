"""The plugin's CUDA kernels, executed on the CPU from the shipped source, against the reference in float64.

Also checks that nvcc compiles them for every GPU without spills.
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

from misf.plugins.dynamic_filter.op import dynamic_filter

from .cuda_host.walker import SOURCES, Fenced, Layout, Plan, Shape, alignment_of, library, plan, walk

TYPES = [torch.float32, torch.float16]
# One rounding to the storage type, and float32 sums of at most R * K * K products.
RELATIVE = {torch.float32: 2e-6, torch.float16: 2**-10}
ABSOLUTE = 5e-6

# N, C, H, W, K, R
CASES = [
    (1, 4, 1, 1, 3, 4),  # one pixel: all border
    (2, 8, 5, 7, 3, 4),  # odd
    (1, 20, 3, 16, 3, 4),  # 20 channels, not a multiple of the 16 that a channels-last thread computes
    (2, 4, 35, 24, 3, 4),  # more rows than a block
    (1, 4, 2, 264, 3, 4),  # more columns than a block
    (1, 64, 9, 10, 3, 4),  # several blocks of channels; width for 4-byte accesses
    (1, 3, 1, 9, 3, 1),  # the picture: 3 channels, 27 taps; one row
    (3, 3, 18, 8, 3, 1),
    (2, 16, 33, 6, 3, 1),
    (1, 40, 4, 17, 3, 1),
    (2, 3, 6, 5, 5, 1),  # from here on without a specialised kernel
    (1, 2, 4, 3, 3, 2),
    (1, 8, 3, 4, 3, 8),
    (2, 5, 2, 3, 1, 5),
    (1, 5, 7, 7, 7, 49),
]


def paddings(layout: Layout, channels: int) -> list[int]:
    """Pixel strides to try: dense, and rounded up to 8 as in TensorRT's HWC8."""
    return sorted({channels, -(-channels // 8) * 8}) if layout is Layout.CHANNELS_LAST else [channels]


def lay(tensor: Tensor, layout: Layout, stride: int, place: str) -> Fenced:
    """Put N,C,H,W values into memory in a layout; padding is NaN, which must not reach any result."""
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
    """Random tensors of one case, and the correct result."""

    def __init__(self, case: tuple[int, ...], dtype: torch.dtype) -> None:
        n, channels, height, width, self.kernel_size, self.share = case
        generator = torch.Generator().manual_seed(sum(case))
        taps = channels * self.kernel_size**2 // self.share
        self.features = torch.randn(n, channels, height, width, generator=generator).to(dtype)
        self.taps = torch.randn(n, taps, height, width, generator=generator).to(dtype)
        self.expected = dynamic_filter(self.features.double(), self.taps.double(), self.kernel_size, self.share)


def variants(case: tuple[int, ...]) -> Iterator[tuple[Layout, str, int, int]]:
    """Yield layout, alignment in memory, and the pixel strides of features (and output) and taps."""
    channels, taps = case[1], case[1] * case[4] ** 2 // case[5]
    for layout in Layout:
        for feature_stride in paddings(layout, channels):
            for tap_stride in paddings(layout, taps):
                for place in ("end", "start", "shifted"):
                    yield layout, place, feature_stride, tap_stride


def check(
    walker: ctypes.CDLL, problem: Problem, layout: Layout, place: str, strides: tuple[int, int], naive: bool
) -> Plan:
    """Run one call in one layout, check every element, and return the kernel that ran."""
    feature_stride, tap_stride = strides
    features = lay(problem.features, layout, feature_stride, place)
    taps = lay(problem.taps, layout, tap_stride, place)
    n, channels, height, width = problem.expected.shape
    written_channels = feature_stride if layout is Layout.CHANNELS_LAST else channels
    written = Fenced(n * height * width * written_channels, problem.features.dtype, place).poison()

    shape = Shape.of(tuple(problem.features.shape), problem.kernel_size, problem.share)
    shape.feature_stride = shape.output_stride = feature_stride
    shape.tap_stride = tap_stride
    tensors = (features.data, taps.data, written.data)
    walk(walker, layout, tensors, shape, naive=naive)

    result = unlay(written.data, tuple(problem.expected.shape), layout, feature_stride).double()
    rtol = RELATIVE[problem.features.dtype]
    torch.testing.assert_close(result, problem.expected, rtol=rtol, atol=ABSOLUTE)
    for buffer in (features, taps, written):
        buffer.assert_intact()
    return plan(walker, layout, shape, alignment_of(*tensors), naive=naive)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("walker")


@pytest.fixture(scope="module", params=TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def walker(request: pytest.FixtureRequest, folder: Path) -> tuple[ctypes.CDLL, torch.dtype]:
    return library(request.param, folder), request.param


def test_every_kernel_agrees_with_the_reference(walker: tuple[ctypes.CDLL, torch.dtype]) -> None:
    """Every layout, padding and alignment of every awkward size, so that every shipped kernel runs."""
    library_, dtype = walker
    ran = set()
    for case in CASES:
        problem = Problem(case, dtype)
        for layout, place, *strides in variants(case):
            ours = check(library_, problem, layout, place, (strides[0], strides[1]), naive=False)
            ran.add((layout, case[5], ours.width) if ours.fast else (layout, "naive"))
    wide = 16 // dtype.itemsize
    expected: set[tuple[object, ...]] = {(layout, "naive") for layout in Layout}
    for share in (4, 1):
        expected |= {(Layout.PLANAR, share, width) for width in (wide, 4 // dtype.itemsize, 1)}
        expected |= {(Layout.CHANNELS_LAST, share, width) for width in (wide, 1)}
    assert ran == expected


def test_the_referee_agrees_with_the_reference(walker: tuple[ctypes.CDLL, torch.dtype]) -> None:
    """The naive kernels, in cases for which there is a fast one."""
    library_, dtype = walker
    for case in CASES[1:3] + CASES[6:8]:
        problem = Problem(case, dtype)
        for layout, place, *strides in variants(case):
            assert not check(library_, problem, layout, place, (strides[0], strides[1]), naive=True).fast


@pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.name.lower())
def test_offsets_beyond_32_bits(layout: Layout, folder: Path) -> None:
    """The last block of 3 x 4 x 16384 x 16384 values: 3.2e9 elements and 7.2e9 taps, in mostly unused memory."""
    dtype, sides, crop = torch.float16, (3, 4, 16384, 16384), (4, 8)
    n, channels, height, width = sides
    taps_channels = 9
    strides = (8, 16) if layout is Layout.CHANNELS_LAST else (channels, taps_channels)
    problem = Problem((1, channels, *crop, 3, 4), dtype)

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
    shape = Shape.of(sides, 3, 4, padding=8 if layout is Layout.CHANNELS_LAST else 1)
    walker = library(dtype, folder)
    grid = plan(walker, layout, Shape.from_buffer_copy(shape)).grid
    walk(walker, layout, (features, taps, output), shape, first_block=(grid[0] - 1, grid[1] - 1))
    if layout is Layout.PLANAR:
        result = output.view(sides)[-1:, :, -crop[0] :, -crop[1] :]
    else:
        result = output.view(n, height, width, 8)[-1:, -crop[0] :, -crop[1] :, :channels].permute(0, 3, 1, 2)
    torch.testing.assert_close(result.double(), problem.expected, rtol=RELATIVE[dtype], atol=ABSOLUTE)


def test_plans_cover_the_output(folder: Path) -> None:
    """For sizes from zero to too large, the blocks of a grid cover the output, or there is no grid."""
    walker = library(torch.float16, folder)
    for sides in [(0, 4, 8, 8), (1, 4, 0, 8)]:
        assert plan(walker, Layout.PLANAR, Shape.of(sides, 3, 4)).grid == (0, 0)
    for sides in [(1, 256, 64, 64), (32, 256, 128, 96), (1, 4, 4096, 6144), (70000, 4, 2, 2), (1, 3000, 8, 8)]:
        n, channels, height, width = sides
        for layout in Layout:
            shape = Shape.of(sides, 3, 4, padding=8)
            found = plan(walker, layout, shape)
            groups, columns, rows = 1 << shape.group_bits, 1 << shape.column_bits, 256 >> shape.group_bits
            per_thread = 4 if layout is Layout.PLANAR else 16
            wide = found.width if layout is Layout.PLANAR else 1
            assert found.fast
            assert found.grid[0] == shape.column_tiles * shape.row_tiles * n
            assert shape.column_tiles * columns * wide >= width
            assert shape.row_tiles * (rows >> shape.column_bits) >= height
            assert found.grid[1] * groups * per_thread >= channels
    # More groups than a grid has rows: one thread per element. More elements than a grid can hold: no grid.
    assert plan(walker, Layout.PLANAR, Shape.of((1, 300000, 8, 8), 3, 4)) == Plan(False, 1, (300000 * 64 // 256, 1))
    assert plan(walker, Layout.PLANAR, Shape.of((1 << 30, 4, 1 << 20, 1 << 19), 3, 1)).grid == (0, 0)


ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 120)
EVERYTHING = os.environ.get("MISF_ALL_ARCHITECTURES") == "1"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nvcc_compiles_without_spills(tmp_path: Path) -> None:
    """The shipped source, for the oldest, a middle and the newest GPU; for all with MISF_ALL_ARCHITECTURES=1."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        pytest.skip("NOT PROVED: nvcc did not compile the CUDA kernels, because it is not installed")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {int(arch) for arch in re.findall(r"compute_(\d+)\n", listed)}
    wanted = [arch for arch in (ARCHITECTURES if EVERYTHING else (75, 90, 120)) if arch in known]
    assert {75, 90} <= set(wanted)
    command = [nvcc, "-std=c++17", "-O3", "-c", "-Xptxas", "-v", "-I", str(SOURCES), "--threads", "2"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted]
    result = subprocess.run(
        [*command, str(SOURCES / "launch.cu"), "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", result.stderr)
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert {int(arch) for _name, arch in kernels} == set(wanted)
    assert len(memory) == len(kernels) == len(set(kernels))
    assert len(kernels) == len(wanted) * 17
    spilling = [kernel for kernel, numbers in zip(kernels, memory, strict=True) if set(numbers) != {"0"}]
    assert spilling == [], "these kernels keep values in local memory"
