"""What this machine has: memory, so that runs that cannot fit are refused (Linux would kill the process), and cores."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pictures.geometry import Size  # which brings NumPy; --help is quick without it

# Full-resolution channels alive at once, in units of the network's width. Measured on the full-size network at
# 1024x1024: 12 with ONNX Runtime, 6 with OpenVINO. A lower bound, so that nothing is refused that would have run.
LEAST_WIDTHS = 6
CGROUP = Path("/sys/fs/cgroup")
LIMITS = (
    ("memory.max", "memory.current", "memory.stat", ""),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
)
"""A container's limit, what is used of it, its counters and their prefix, in cgroups of version 2 and 1."""


def least_bytes(config: Mapping[str, Any], precision: str, size: Size) -> int:
    """Return how many bytes a run on H,W pixels needs at the very least; 0 if the config does not tell the width."""
    width = max((config.get(name, 0) for name in ("width", "prediction_width")), default=0)
    return size[0] * size[1] * width * LEAST_WIDTHS * (4 if precision == "fp32" else 2)


def available_bytes() -> int | None:
    """Return how much memory is free for us on Linux, within what is left of the container's; None elsewhere."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    for limit, used, counters, prefix in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            left = int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text())
            found.append(max(0, left + _cached_files(CGROUP / counters, prefix)))
    return min(found, default=None)


def usable_cores() -> int:
    """Return how many cores this process may use, or its container's quota of processor time is worth."""
    return quota_cores() or _allowed_cores()


def quota_cores() -> int | None:
    """Return how many cores, rounded up, the container's quota of processor time is worth; None if it is worth all.

    Libraries that compute on many cores count those of the machine. With more threads than the quota is worth, Linux
    stops all of them for most of every tenth of a second.
    """
    for read in (_quota, _quota_of_version_1):
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            quota, period = read()
            if quota > 0 and (cores := math.ceil(quota / period)) < _allowed_cores():
                return cores
    return None


def _allowed_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota() -> tuple[int, int]:
    quota, period = (CGROUP / "cpu.max").read_text().split()
    return int(quota), int(period)


def _quota_of_version_1() -> tuple[int, int]:
    quota, period = (int((CGROUP / f"cpu/cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    return quota, period


def _cached_files(counters: Path, prefix: str) -> int:
    """Return how many of the bytes in use are cached files, which Linux frees before it kills a process."""
    values = dict(line.split() for line in counters.read_text().splitlines())
    return sum(int(values.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
