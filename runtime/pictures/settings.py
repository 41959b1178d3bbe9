"""How much of a picture the network sees at a time. Light to import: commands take their defaults from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STRATEGIES = ("auto", "crop", "resize", "original")
ABOUT = 1.5
"""An area of up to 1.5 working squares still runs without resizing."""


@dataclass(frozen=True)
class CropSettings:
    """How much of a picture the network sees. ValueError for an unknown strategy, or for sizes that make no sense."""

    strategy: str = "auto"
    """crop: around each hole; resize: the picture reduced to the working size; original: as it is; auto: original for
    a picture of about the working size or less, else crop."""
    working_size: int = 512
    """The network sees about this many pixels squared at a time; at least 64."""
    margin: int | None = None
    """Pixels of context around a hole; None: a quarter of the hole's longer side, at least 32."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"unknown strategy {self.strategy!r}: expected one of {', '.join(STRATEGIES)}")
        if self.working_size < 64:
            raise ValueError(f"working size {self.working_size} is too small: expected at least 64")
        if self.margin is not None and self.margin < 0:
            raise ValueError(f"margin {self.margin} is negative")

    def strategy_for(self, size: tuple[int, int]) -> str:
        """Return what `auto` means for a picture of H,W; any other strategy as it is."""
        if self.strategy != "auto":
            return self.strategy
        return "original" if size[0] * size[1] <= ABOUT * self.working_size**2 else "crop"


def network_working_size(config: Mapping[str, Any]) -> int:
    """Return the working size that a model file gives for its network; that of misf-small for files without one."""
    size = config.get("working_size")
    return size if isinstance(size, int) and size >= 64 else CropSettings.working_size
