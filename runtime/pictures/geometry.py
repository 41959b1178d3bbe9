"""The words for places in a picture that everything about pictures shares."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
"""H,W; True = hole."""
Size = tuple[int, int]
"""H, W."""


class Box(NamedTuple):
    """A rectangle of pixels, right and bottom exclusive, in the order that Pillow uses."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> Size:
        """H, W."""
        return self.bottom - self.top, self.right - self.left

    @property
    def slices(self) -> tuple[slice, slice]:
        """Indices into an array of H,W."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def union(self, other: Box) -> Box:
        """Return the smallest box around both."""
        return Box(
            min(self.left, other.left),
            min(self.top, other.top),
            max(self.right, other.right),
            max(self.bottom, other.bottom),
        )
