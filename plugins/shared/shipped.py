"""The networks that come with misf: taken by name wherever a file of weights or a model file is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

SHIPPED = ("misf-small",)

_PACKAGES = Path(__file__).parents[2]


def shipped_checkpoint(name: str | os.PathLike[str]) -> Path:
    """Return the file of a shipped network's weights; any other name or path as it is."""
    return _PACKAGES / "training" / "weights" / f"{name}.safetensors" if str(name) in SHIPPED else Path(name)


def shipped_model(name: str | os.PathLike[str]) -> Path:
    """Return the ONNX file of a shipped network, float16; any other name or path as it is."""
    return _PACKAGES / "runtime" / "models" / f"{name}.onnx" if str(name) in SHIPPED else Path(name)


class ModelFile(click.Path):
    """A file, or the name of a shipped network, converted to the Path of its ONNX file, or of its `weights`."""

    def __init__(self, *, weights: bool = False) -> None:
        super().__init__(exists=True, dir_okay=False, path_type=Path)
        self.weights = weights

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; a usage error where there is no such file."""
        path = (shipped_checkpoint if self.weights else shipped_model)(value)
        if str(value) not in SHIPPED and os.sep not in str(value) and not path.suffix and not path.exists():
            self.fail(f"there is no file and no network {value!r}; misf comes with {', '.join(SHIPPED)}", param, ctx)
        return super().convert(path, param, ctx)
