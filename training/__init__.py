"""The network, its checkpoints and its training."""

from __future__ import annotations

from .checkpoint import load_model
from .config import PRESETS, NetworkConfig

__all__ = ["PRESETS", "NetworkConfig", "load_model"]
