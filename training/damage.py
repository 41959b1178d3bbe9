"""What is damaged in the training pictures themselves, such as scratches and stains: no loss may take it for true."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..plugins.shared.errors import MisfError
from ..runtime.jobs import MaskIndex, single_mask
from ..runtime.pictures.geometry import Mask, Size
from ..runtime.pictures.masks import MaskSettings, resized_mask
from .mask_drawing import MaskFolder

if TYPE_CHECKING:
    from .dataset import Pictures

log = logging.getLogger(__name__)


class DamageMasks:
    """The damage masks of pictures, found by their names as misf-run finds masks; white is damaged.

    `pictures` are those to train on: a mask among them is none.

    Args:
        pictures: the picture files.
        root: the folder that their names are relative to; only the file name of others counts.
        folder: the masks.
        settings: how the files are read; resize, grow and feather are not used.

    Raises:
        MisfError: no picture has a mask, or one has several.

    """

    def __init__(
        self, pictures: Sequence[Path], root: Path, folder: Path, settings: MaskSettings | None = None
    ) -> None:
        index, found = MaskIndex(folder), {}
        for path in pictures:
            name = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
            if masks := index.masks(path, name):
                try:
                    found[path] = single_mask(masks, name)
                except ValueError as error:
                    raise MisfError(f"{folder}: {error}") from error
        if not found:
            stem = pictures[0].stem
            raise MisfError(
                f"{folder} holds no mask for any of {len(pictures)} pictures: expected {stem}.* or {stem}_mask*.* for "
                f"{pictures[0].name}, in the same subfolder"
            )
        inside = folder != root and folder.is_relative_to(root)
        files = set(found.values())
        self.pictures = tuple(
            path for path in pictures if path not in files and not (inside and path.is_relative_to(folder))
        )
        self._numbers = {path: number for number, path in enumerate(found)}
        self._files = MaskFolder(list(found.values()), settings)

    def check(self, pictures: Pictures) -> None:
        """Read every mask once, log how much they mark, and raise what `of` raises, before training starts."""

        def share(index: int) -> float | None:
            path, picture = pictures.paths[index], pictures.get(index)
            return (
                None if path not in self._numbers or picture is None else float(self.of(path, picture.shape[:2]).mean())
            )

        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            shares = [found for found in pool.map(share, range(len(pictures))) if found is not None]
        log.info(
            "damage masks mark %.2f %% of %d pictures; %d have none",
            *(100 * sum(shares) / max(len(shares), 1), len(shares), len(pictures) - len(shares)),
        )

    def __len__(self) -> int:
        return len(self._files)

    def of(self, picture: Path, size: Size) -> Mask:
        """Return what is damaged in a picture of that size, bool H,W: nothing where it has no mask.

        Raises:
            MisfError: the mask cannot be read or has another size.

        """
        number = self._numbers.get(picture)
        if number is None:
            return np.zeros(size, np.bool_)
        mask = self._files.read(number)
        if mask.shape != size:
            raise MisfError(
                f"the damage mask {self._files.paths[number]} is {mask.shape[1]}x{mask.shape[0]} and its picture "
                f"{picture.name} {size[1]}x{size[0]} (width x height): give a mask of the picture's size"
            )
        return mask


def resized_damage(damaged: Mask, size: Size) -> Mask:
    """Return bool at another size H,W: all pixels of a picture resized by Pillow's LANCZOS that saw a damaged one.

    The filter reaches three pixels far, of the picture before or after, whichever are larger.
    """
    import cv2

    reach = [2 * math.ceil(3 * max(1.0, before / after)) + 1 for before, after in zip(damaged.shape, size, strict=True)]
    return resized_mask(cv2.dilate(damaged.astype(np.uint8), np.ones(reach, np.uint8)).astype(np.bool_), size)
