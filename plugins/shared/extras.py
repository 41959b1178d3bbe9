"""Optional packages: whether they are installed, and the error that names the extra to install."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .errors import EnvironmentMismatch


def is_installed(module: str) -> bool:
    """Return whether a module can be imported, without importing it.

    A folder without code does not count: uninstalling one of two packages that share a module leaves such a folder.
    """
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def pip_install(extra: str) -> str:
    """Return the command that adds an extra to this installation, from its source folder if it has one.

    pip records that folder (PEP 610). With the bare name pip would search a package index.
    """
    try:
        recorded = json.loads(importlib.metadata.distribution("misf").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        recorded = {}
    folder = Path(unquote(urlsplit(recorded.get("url", "")).path))
    if "dir_info" not in recorded or not (folder / "pyproject.toml").is_file():
        return f"pip install 'misf[{extra}]'"
    return f"pip install {'-e ' if recorded['dir_info'].get('editable') else ''}'{folder}[{extra}]'"


def need(what: str, extra: str, *modules: str) -> None:
    """Raise EnvironmentMismatch, naming the extra to install, unless all modules are installed."""
    for module in modules:
        if not is_installed(module):
            raise EnvironmentMismatch(f"{what} needs {module}, which is not installed: {pip_install(extra)}")


def need_onnx_runtime(what: str) -> None:
    """Raise EnvironmentMismatch, naming the extras to choose from, unless ONNX Runtime is installed."""
    if not is_installed("onnxruntime"):
        raise EnvironmentMismatch(
            f"{what} needs onnxruntime, which is not installed: {pip_install('cpu')}, "
            "or the extra gpu for an NVIDIA GPU"
        )
