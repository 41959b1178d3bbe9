"""TensorRT and TensorRT for RTX: which one is installed, its version, its log, and our plugin in its registry.

Both have the same Python interface, in the modules `tensorrt` and `tensorrt_rtx`, which only this file imports.
TensorRT for RTX has no plugins and uses the function body of the dynamic filter in the ONNX file.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...plugins.dynamic_filter.tensorrt import library
from ...plugins.shared.errors import EnvironmentMismatch
from ...plugins.shared.extras import is_installed, pip_install

log = logging.getLogger(__name__)

FLAVORS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Name of a flavor, as in --backend and in side-cars -> Python module."""
TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
OLDEST, BEYOND = (10, 3), (12, 0)
"""Versions of TensorRT that the plugin and the builder support."""

KEPT_ERRORS = 20

# Logged for every node of our function body that the parser imports a second time; harmless.
_NOISE = re.compile(r"A node named .* already exists")


@dataclass(frozen=True)
class Flavor:
    """TensorRT or TensorRT for RTX, imported."""

    name: str
    module: Any
    version: str

    @property
    def title(self) -> str:
        """Name and version, such as 'TensorRT 10.3.0'."""
        return f"{TITLES[self.name]} {self.version}"

    @property
    def has_plugins(self) -> bool:
        """Whether it supports our plugin."""
        return self.name == "tensorrt"

    @property
    def major(self) -> int:
        """Major version."""
        return int(self.version.split(".")[0])


def installed(name: str) -> bool:
    """Return whether the Python module of a flavor is installed."""
    return is_installed(FLAVORS[name])


def load_flavor(name: str = "auto") -> Flavor:
    """Return a flavor by name; "auto" is TensorRT if it is installed, else TensorRT for RTX.

    Raises:
        EnvironmentMismatch: it is not installed, does not start, or has an unsupported version.

    """
    if name == "auto":
        found = [candidate for candidate in FLAVORS if installed(candidate)]
        if not found:
            raise EnvironmentMismatch(
                "neither TensorRT nor TensorRT for RTX is installed: "
                f"{pip_install('trt10')}, or the extra rtx (JetPack brings TensorRT: docs/jetson.md)"
            )
        name = found[0]
    try:
        module = importlib.import_module(FLAVORS[name])
        flavor = Flavor(name, module, str(module.__version__))
    except Exception as error:  # a missing shared library is an OSError, a missing module an ImportError, ...
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not start ({error})"
        hint = pip_install("rtx") if name == "tensorrt-rtx" else f"{pip_install('trt10')}, or JetPack"
        raise EnvironmentMismatch(f"{TITLES[name]} {reason}: {hint}") from error
    numbers = tuple(int(part) for part in re.findall(r"\d+", flavor.version)[:2])
    if name == "tensorrt" and not OLDEST <= numbers < BEYOND:
        raise EnvironmentMismatch(f"{flavor.title} is not supported: expected 10.3 to 11.x")
    return flavor


def logger_of(flavor: Flavor) -> Any:
    """Return a TensorRT logger that writes to our log and keeps its last errors in the list `errors`.

    There is one per flavor, because TensorRT uses the first logger that it gets for everything.
    """
    return _logger(flavor.module.ILogger, flavor.name)


@functools.cache
def _logger(base: Any, name: str) -> Any:
    levels = {
        base.Severity.INTERNAL_ERROR: logging.DEBUG,  # the caller reports these as one line (`reason`)
        base.Severity.ERROR: logging.DEBUG,
        base.Severity.WARNING: logging.INFO,
    }

    class Logger(base):  # type: ignore[misc] # the base comes at run time
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (base.Severity.INTERNAL_ERROR, base.Severity.ERROR):
                self.errors[:] = [*self.errors[-KEPT_ERRORS:], message]
            noise = bool(_NOISE.search(message))
            log.log(logging.DEBUG if noise else levels.get(severity, logging.DEBUG), "%s: %s", name, message)

    return Logger()


def reason(logger: Any) -> str:
    """Return and clear TensorRT's last error, as one line without the location in NVIDIA's sources."""
    if not logger.errors:
        return "no reason given"
    text = " ".join(str(logger.errors[-1]).split())
    logger.errors.clear()
    text = re.sub(r"^(.*: )?Error Code \d+: [\w ]+ \((.*)\)$", r"\2", text)
    text = re.sub(r"^(In|Error in) \S+ at \S+:\d+:?\s*", "", text)
    return text[:400]


def use_plugin(flavor: Flavor, explicit: Path | None) -> Path:
    """Load the plugin library into the flavor's registry, and return its path.

    Args:
        flavor: TensorRT; TensorRT for RTX has no plugins.
        explicit: the file that the user named; None: MISF_PLUGIN, or the library that `misf-plugin build` installed.

    Raises:
        EnvironmentMismatch: there is no library, it is for another TensorRT, or it does not load.

    """
    path = library.find_library(flavor.major, explicit)
    library.load_library(flavor.module.get_plugin_registry(), path, flavor.version)
    return path
