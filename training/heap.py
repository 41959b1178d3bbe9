"""The C library's heap, for training on a CPU: where the system would clear new memory all the time, or keep too much.

Thresholds and trimming are for glibc; with another C library nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Leave what is freed in the heap for the next who asks, but for blocks beyond 32 MB; until `trim_heap`."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        library.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def prefer_huge_pages() -> None:
    """Let PyTorch ask for huge pages, which the system clears in half the time; call before the first tensor is made.

    A variable of the environment says otherwise, if it is set: THP_MEM_ALLOC_ENABLE=0.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_heap_small(stages: Iterable[nn.Module]) -> None:
    """Trim the heap whenever one of `stages` has ended its forward pass, and before it begins its backward pass.

    Blocks of one stage's size are of little use to the next: kept, they add up to a third of the peak.
    """
    for stage in stages:
        stage.register_forward_hook(_trim_after)


_most_in_use = 0
_SLACK = 40 << 20  # bytes


def trim_heap(*_: object) -> None:
    """Give the heap's free memory back to the system, if the process holds much more than it ever needed right here.

    That is what was left by the trims so far, at most, and some slack: after a step or two, only the stages near the
    peak are trimmed.
    """
    global _most_in_use
    with contextlib.suppress(OSError, AttributeError, TypeError):
        if resident() > _most_in_use + _SLACK:
            ctypes.CDLL(None).malloc_trim(0)
            _most_in_use = max(_most_in_use, resident())


def resident() -> int:
    """Return the bytes of memory that this process occupies now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _trim_after(_module: nn.Module, _inputs: Any, result: Tensor) -> None:
    trim_heap()
    if result.requires_grad:
        result.register_hook(trim_heap)  # type: ignore[no-untyped-call]
