"""Running a model on pictures: `Inpainter`, `open_backend` for arrays, and what both raise.

inpainter.py   the Python API
jobs.py        which picture goes with which mask and output
fill_file.py   one picture file: read, filled, written
folder_run.py  a folder's pictures, several at a time, shared with other runs
estimate.py    what a run would take
run_cli.py     misf-run
memory.py      whether a run fits into memory
pictures/      files, masks, crops, without any model
backends/      one module per way of running a model
engines/       what TensorRT engines need
checks/        misf-verify and misf-doctor
batch/         misf-batch: the same on a cluster
triton/        what runs inside NVIDIA Triton
models/        misf-small as an ONNX file
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..plugins.shared.errors import AccuracyError, EnvironmentMismatch, MisfError

if TYPE_CHECKING:
    from .backends import open_backend
    from .inpainter import FillReport, Inpainter

__all__ = ["AccuracyError", "EnvironmentMismatch", "FillReport", "Inpainter", "MisfError", "open_backend"]

# Read when ONNX Runtime is imported, which every part of misf does after this: from 1.29 on it would send telemetry.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    """Import what needs NumPy and Pillow when it is first asked for, so that commands start without them."""
    if name in ("FillReport", "Inpainter"):
        from . import inpainter

        return getattr(inpainter, name)
    if name == "open_backend":
        from .backends import open_backend

        return open_backend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
