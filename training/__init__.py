"""The network, its checkpoints and its training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .model.config import PRESETS, NetworkConfig

if TYPE_CHECKING:
    from .model.checkpoint import load_model
    from .model.network import composite

__all__ = ["PRESETS", "NetworkConfig", "composite", "load_model"]


def __getattr__(name: str) -> object:
    if name == "load_model":  # imported lazily: --help needs no PyTorch
        from .model.checkpoint import load_model

        return load_model
    if name == "composite":
        from .model.network import composite

        return composite
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
