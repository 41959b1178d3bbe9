"""Packages that not every install has: whether they are there, and the error that names the extra that brings them."""

from __future__ import annotations

import importlib.util

from .errors import EnvironmentMismatch


def is_installed(module: str) -> bool:
    """Return whether a module can be imported; it is not loaded.

    A folder without code is not a module: that is what is left when two packages shared it and one was uninstalled.
    """
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def need(what: str, extra: str, *modules: str) -> None:
    """Raise EnvironmentMismatch, which names the extra that brings it, unless every module is installed."""
    for module in modules:
        if not is_installed(module):
            raise EnvironmentMismatch(f"{what} needs {module}, which is not installed: pip install 'misf[{extra}]'")


def need_onnx_runtime(what: str) -> None:
    """Raise EnvironmentMismatch, which names the two extras that bring it, unless ONNX Runtime is installed."""
    if not is_installed("onnxruntime"):
        raise EnvironmentMismatch(
            f"{what} needs onnxruntime, which is not installed: "
            "pip install 'misf[cpu]', or 'misf[gpu]' where an NVIDIA GPU is"
        )
