"""Packages that not every install has: whether they are there, and the error that names the extra that brings them."""

from __future__ import annotations

import importlib.util

from .errors import EnvironmentMismatch


def is_installed(module: str) -> bool:
    """Return whether a module can be imported; it is not loaded."""
    return importlib.util.find_spec(module) is not None


def need(what: str, extra: str, *modules: str) -> None:
    """Raise EnvironmentMismatch, which names the extra that brings it, unless every module is installed."""
    for module in modules:
        if not is_installed(module):
            raise EnvironmentMismatch(f"{what} needs {module}, which is not installed: pip install 'misf[{extra}]'")
