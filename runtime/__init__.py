"""Running a model on pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inpainter import Inpainter

__all__ = ["Inpainter"]


def __getattr__(name: str) -> Any:
    """Import Inpainter when it is first asked for, so that commands start without NumPy and Pillow."""
    if name == "Inpainter":
        from .inpainter import Inpainter

        return Inpainter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
