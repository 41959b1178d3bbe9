"""The C library's heap between the stages of a network: what is free goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_heap_small(stages: Iterable[nn.Module]) -> None:
    """Trim the heap whenever one of `stages` ends its forward pass and begins its backward pass.

    Blocks of one stage's size are of little use to the next: kept, they add up to a third of the peak. Given back one
    by one, as glibc does with the largest, the system clears new pages all the time: for a quarter of the step. So
    within a stage all stay in the heap.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        library.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    for stage in stages:
        stage.register_forward_hook(_trim_after)


def trim_heap(*_: object) -> None:
    """Give the heap's free pages back to the system, with glibc; with others do nothing."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _trim_after(_module: nn.Module, _inputs: Any, result: Tensor) -> None:
    trim_heap()
    if result.requires_grad:
        result.register_hook(trim_heap)  # type: ignore[no-untyped-call]
