"""The networks that come with misf, whose names are accepted wherever a checkpoint or a model file is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

SHIPPED = ("misf-small",)

_PACKAGES = Path(__file__).parents[2]


def shipped_checkpoint(name: str | os.PathLike[str]) -> Path:
    """Return the weights file of a shipped network; any other name or path is returned unchanged."""
    return _PACKAGES / "training" / "weights" / f"{name}.safetensors" if str(name) in SHIPPED else Path(name)


def shipped_model(name: str | os.PathLike[str]) -> Path:
    """Return the ONNX file (float16) of a shipped network; any other name or path is returned unchanged."""
    return _PACKAGES / "runtime" / "models" / f"{name}.onnx" if str(name) in SHIPPED else Path(name)


class ModelFile(click.Path):
    """A file or the name of a shipped network, converted to the path of its ONNX file or its `weights`."""

    def __init__(self, *, weights: bool = False) -> None:
        super().__init__(exists=True, dir_okay=False, path_type=Path)
        self.weights = weights

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; a usage error if there is no such file."""
        path = (shipped_checkpoint if self.weights else shipped_model)(value)
        if str(value) not in SHIPPED and os.sep not in str(value) and not path.suffix and not path.exists():
            self.fail(f"there is no file or network {value!r}; misf comes with {', '.join(SHIPPED)}", param, ctx)
        return super().convert(path, param, ctx)
