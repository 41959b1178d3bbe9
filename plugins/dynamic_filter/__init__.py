"""The dynamic filter: one op, from its definition to its CUDA kernels.

`dynamic_filter` needs torch; `misf.plugins.dynamic_filter.onnx_op` needs onnx. Importing this package needs neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .op import dynamic_filter

__all__ = ["dynamic_filter"]


def __getattr__(name: str) -> object:
    if name == "dynamic_filter":
        from .op import dynamic_filter

        return dynamic_filter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
