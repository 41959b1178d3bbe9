"""Compiles walk.cpp and calls it on buffers that catch all accesses outside of them."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import os
import shutil
import subprocess
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import pytest
import torch
from torch import Tensor

from misf.plugins import dynamic_filter

HERE = Path(__file__).parent
SOURCES = Path(dynamic_filter.__file__).parent / "kernels"
TYPE_NAMES = {torch.float32: "float", torch.float16: "__half"}
PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)


def cuda_headers() -> list[Path]:
    """Return the include folders of the machine's or pip's CUDA toolkit, or skip with a reason if there is none."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    spec = importlib.util.find_spec("nvidia")
    for location in spec.submodule_search_locations or () if spec else ():
        folders += sorted(Path(location).glob("*/include"))
    for folder in folders:
        # A host compiler also needs crt/ and nv/target, which is in cccl/ since CUDA 13.
        found = [folder, folder / "cccl"]
        wanted = ("cuda_fp16.h", "crt/host_defines.h", "nv/target")
        if all(any((place / name).is_file() for place in found) for name in wanted):
            return found
    pytest.skip(
        "NOT PROVED: the CUDA kernels were not executed, because no CUDA headers were found: "
        "set CUDA_HOME, or pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
    )


@functools.cache
def library(dtype: torch.dtype, folder: Path) -> ctypes.CDLL:
    """Return walk.cpp compiled for one storage type. Undefined behaviour, such as a misaligned access, aborts it."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("NOT PROVED: the CUDA kernels were not executed, because there is no C++ compiler")
    name = TYPE_NAMES[dtype]
    target = folder / f"walk{name}.so"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-fsanitize=undefined", "-fno-sanitize-recover=all", f"-DMISF_TYPE={name}"]
    command += [f"-isystem{place}" for place in cuda_headers()]
    command += [f"-I{SOURCES}", str(HERE / "walk.cpp"), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[:4000]
    return ctypes.CDLL(str(target))


class Fenced:
    """A tensor in separate memory between two protected pages, which cause a crash on access.

    The rest of the memory is NaN, and `assert_intact` checks that none of it was written. `place` is 'end' (flush with
    the page behind, which catches reads past the end), 'start', or 'shifted' (aligned to an element only).
    """

    def __init__(self, elements: int, dtype: torch.dtype, place: str = "end") -> None:
        size = max(1, elements) * dtype.itemsize
        body = -(-(size + 64) // PAGE) * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE: huge and sparse is fine
        self._memory = mmap.mmap(-1, body + 2 * PAGE, flags=flags)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for fence in (base, base + PAGE + body):
            if _LIBC.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(PAGE), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        start = {"end": body - size, "start": 0, "shifted": body - size - (body - size) % 16 - 16 + dtype.itemsize}[
            place
        ]
        self.data = torch.frombuffer(self._memory, dtype=dtype, count=elements, offset=PAGE + start)
        self._before = torch.frombuffer(self._memory, dtype=torch.uint8, count=start, offset=PAGE) if start else None
        end = start + size
        self._after = (
            torch.frombuffer(self._memory, dtype=torch.uint8, count=body - end, offset=PAGE + end)
            if body > end
            else None
        )

    def poison(self) -> Fenced:
        """Fill the tensor and the memory around it with NaN (all bits set); return self."""
        for part in (self._before, self.data.view(torch.uint8), self._after):
            if part is not None:
                part.fill_(255)
        return self

    def assert_intact(self) -> None:
        for part in (self._before, self._after):
            assert part is None or bool((part == 255).all()), "a kernel wrote outside its output"

    @classmethod
    def holding(cls, values: Tensor, place: str) -> Fenced:
        fenced = cls(values.numel(), values.dtype, place).poison()
        fenced.data.copy_(values.reshape(-1))
        return fenced


class Layout(IntEnum):
    """misf::Layout of launch.cuh."""

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

    @classmethod
    def of(cls, features: tuple[int, ...], kernel_size: int, share: int, padding: int = 1) -> Shape:
        """Describe a call by the features' N, C, H, W; channels-last pixels are padded to a multiple of `padding`."""
        taps = features[1] * kernel_size**2 // share
        stride, tap_stride = (-(-channels // padding) * padding for channels in (features[1], taps))
        return cls(*features, taps, kernel_size, share, stride, tap_stride, stride)


@dataclass(frozen=True)
class Plan:
    """The result of misf::plan."""

    fast: bool
    width: int
    grid: tuple[int, int]


def alignment_of(*tensors: Tensor) -> int:
    bits = functools.reduce(int.__or__, (tensor.data_ptr() for tensor in tensors), 16)
    return bits & -bits


def plan(walker: ctypes.CDLL, layout: Layout, shape: Shape, alignment: int = 16, *, naive: bool = False) -> Plan:
    """Return kernel and grid for a call, and fill in the geometry of `shape`."""
    report = (ctypes.c_uint * 4)()
    walker.misf_plan(int(layout), ctypes.byref(shape), ctypes.c_ulonglong(alignment), int(naive), report)
    return Plan(bool(report[0]), report[1], (report[2], report[3]))


def walk(
    walker: ctypes.CDLL,
    layout: Layout,
    tensors: tuple[Tensor, Tensor, Tensor],
    shape: Shape,
    *,
    naive: bool = False,
    first_block: tuple[int, int] = (0, 0),
) -> None:
    """Run the kernel of a call on the CPU: features, taps, output."""
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
    alignment = ctypes.c_ulonglong(alignment_of(*tensors))
    walker.misf_walk(
        int(layout), *pointers, ctypes.byref(shape), alignment, int(naive), *map(ctypes.c_uint, first_block)
    )
