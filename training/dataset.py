"""Training pictures and masks, a pure function of (seed, sample index), so that runs resume exactly."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..plugins.shared.errors import MisfError
from ..runtime.pictures.geometry import Mask
from ..runtime.pictures.image_io import read_rgb
from .damage import DamageMasks, resized_damage

log = logging.getLogger(__name__)

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
LIST_SUFFIXES = frozenset({".txt", ".json", ".flist"})

Picture = NDArray[np.uint8]


def picture_paths(source: str | os.PathLike[str]) -> list[Path]:
    """Return the picture files of `source` in a fixed order, without decoding them.

    Args:
        source: a folder, whose subfolders are searched too (links are followed, hidden files are skipped, the result
            is sorted); or a list file (.txt, .json, .flist) with one path per line or, as in the official MISF lists, a
            JSON array of paths. Relative paths in a list start from the list's folder.

    Raises:
        MisfError: there are no pictures, the list file is malformed, or none of its first 100 files exists.

    """
    path = Path(source)
    if path.is_dir():
        found = sorted(_walk(path))
        if not found:
            kinds = " ".join(sorted(PICTURE_SUFFIXES))
            raise MisfError(f"no pictures in {source}: expected files ending in {kinds}")
        return found
    if not path.is_file():
        raise MisfError(f"{source}: expected a folder of pictures or a list file, found nothing")
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return [path]
    if path.suffix.lower() not in LIST_SUFFIXES:
        raise MisfError(f"{source}: expected a folder, or a list ending in {' '.join(sorted(LIST_SUFFIXES))}")
    listed = [path.parent / line for line in _listed(path)]
    if not any(entry.is_file() for entry in listed[:100]):
        raise MisfError(
            f"{source}: none of its first {len(listed[:100])} files exists, such as {listed[0]}; "
            "paths in a list are absolute or relative to the list's folder"
        )
    return listed


def _walk(folder: Path) -> Iterator[Path]:
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link back up the tree
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in PICTURE_SUFFIXES:
                yield Path(parent, name)


def _listed(path: Path) -> list[str]:
    """Return the paths that a list file names."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MisfError(f"{path}: expected a list of paths in UTF-8, found other bytes") from error
    entries: Any = [line.strip() for line in text.splitlines()]
    if text.lstrip().startswith(("[", "{")):
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            if re.match(r'\s*[\[{]\s*"', text):  # else it is a name that begins with a bracket
                raise MisfError(
                    f"{path}: expected a JSON array of paths, found a syntax error in line {error.lineno}"
                ) from error
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise MisfError(f"{path}: expected a JSON array of paths")
    if not (paths := [entry for entry in entries if entry]):
        raise MisfError(f"{path}: the list is empty")
    return paths


def read_picture(path: str | os.PathLike[str], short_side: int | None = None) -> Picture:
    """Return a picture as uint8 H,W,3 RGB, turned upright, and shrunk to `short_side` if it is larger (`read_rgb`).

    Raises:
        MisfError: the file cannot be decoded completely; the message is one line that names it.

    """
    try:
        return read_rgb(path, short_side)
    except ValueError as error:
        raise MisfError(str(error)) from error


class Pictures:
    """Pictures by index, cached in memory as uint8 H,W,3 RGB.

    A file that cannot be decoded is logged once, in one line, and added to `bad` with the reason.

    Args:
        paths: the files.
        short_side: larger pictures are shrunk to this size when they are read; None keeps their size.
        cache_bytes: size of the cache; pictures that do not fit are decoded on every access.

    """

    def __init__(self, paths: Sequence[Path], *, short_side: int | None = None, cache_bytes: int = 4 << 30) -> None:
        self.paths = tuple(paths)
        self.short_side = short_side
        self.bad: dict[Path, str] = {}
        self._space = cache_bytes
        self._kept: dict[int, Picture] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def get(self, index: int) -> Picture | None:
        """Return picture `index` as uint8 H,W,3 RGB, or None when its file cannot be decoded."""
        if index in self._kept:
            return self._kept[index]
        path = self.paths[index]
        if path in self.bad:
            return None
        try:
            picture = read_picture(path, self.short_side)
        except MisfError as error:
            log.warning("%s: skipped", error)
            self.bad[path] = str(error)
            return None
        if picture.nbytes <= self._space:
            self._space -= picture.nbytes
            self._kept[index] = picture
        return picture

    def preload(self, threads: int | None = None) -> int:
        """Decode pictures in parallel until the cache is full; return the number of pictures not known to be bad."""

        def load(index: int) -> bool:
            return self._space <= 0 or self.get(index) is not None

        with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 16)) as pool:
            return sum(pool.map(load, range(len(self.paths))))


class MaskSource(Protocol):
    """Where masks come from: RandomMasks or MaskFolder."""

    def mask(self, rng: np.random.Generator, height: int, width: int) -> Mask:
        """Return a mask bool H,W, True = hole."""
        ...


class TrainingSamples(Dataset[tuple[Tensor, ...]]):
    """Random crops with masks. `sample(index)` depends only on the seed and the index, which may be any from 0 up.

    Every len(self) consecutive indices are an epoch, which shows each picture once in a new order. A picture that
    cannot be decoded is replaced by another, drawn from the same (seed, index); `Pictures` logs it.

    To resume at a position, give the DataLoader `sampler=range(position, end)`; no state is needed.

    Args:
        pictures: the pictures.
        masks: RandomMasks() or a MaskFolder.
        crop: side of the square crops in pixels.
        seed: together with the index, the only source of randomness.
        zoom_out: a crop is cut from a square of up to this many times its side, and shrunk. 1 keeps native pixels.
            Pictures smaller than the crop are enlarged to fit.
        flip: mirror crops left to right with probability 1/2.
        whole: use the middle square of each picture, resized, instead of random crops, as the official code does.
        shuffle_colors: put the three colour channels in a random order.
        damage: what is damaged in the pictures.

    Raises:
        MisfError: there are no pictures; later, from `sample`, if no picture can be decoded.
        ValueError: `crop` is below 8 or `zoom_out` below 1.

    """

    def __init__(
        self,
        pictures: Pictures,
        masks: MaskSource,
        *,
        crop: int = 256,
        seed: int = 0,
        zoom_out: float = 1.0,
        flip: bool = True,
        whole: bool = False,
        shuffle_colors: bool = False,
        damage: DamageMasks | None = None,
    ) -> None:
        if not len(pictures):
            raise MisfError("no pictures to train with")
        if crop < 8 or zoom_out < 1:
            raise ValueError(
                f"crop {crop}, zoom_out {zoom_out}: expected a crop of at least 8 and a zoom_out of at least 1"
            )
        self.pictures = pictures
        self.masks = masks
        self.crop = crop
        self.seed = seed
        self.zoom_out = zoom_out
        self.flip = flip
        self.whole = whole
        self.shuffle_colors = shuffle_colors
        self.damage = damage
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.sample(index)

    def sample(self, index: int) -> tuple[Tensor, ...]:
        """Return sample `index`, (image, mask): float32 3,crop,crop RGB in [0,1] and float32 1,crop,crop, 1 = hole.

        With `damage`, (image, mask, damaged): what is damaged is part of the hole, and float32 1,crop,crop says where.
        """
        picture, *masks = self.sample_bytes(index)
        image = np.ascontiguousarray(picture.transpose(2, 0, 1), np.float32) / np.float32(255)
        return torch.from_numpy(image), *(torch.from_numpy(mask[None].astype(np.float32)) for mask in masks)

    def sample_bytes(self, index: int) -> tuple[NDArray[Any], ...]:
        """Return `sample` as uint8 crop,crop,3 RGB and bool crop,crop, True = hole, or damaged."""
        if index < 0:
            raise IndexError(f"sample {index}: expected 0 or more")
        rng = np.random.default_rng([self.seed, 1, index])
        picture, *damaged = self._cropped(rng, *self._picture(rng, index))
        hole = np.ascontiguousarray(self.masks.mask(rng, self.crop, self.crop))
        return picture, functools.reduce(np.logical_or, damaged, hole), *damaged

    def _picture(self, rng: np.random.Generator, index: int) -> tuple[NDArray[Any], ...]:
        """Return the picture of sample `index` and, with `damage`, what is damaged in it."""
        epoch, position = divmod(index, len(self.pictures))
        if self._order[0] != epoch:
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.pictures))
            self._order = epoch, order
        number = int(self._order[1][position])
        picture = self.pictures.get(number)
        attempts = 0
        while picture is None:
            attempts += 1
            if attempts > 1000:
                bad = self.pictures.bad
                raise MisfError(f"none of {len(bad)} pictures can be decoded, {list(bad)[-1]} for example")
            number = int(rng.integers(len(self.pictures)))
            picture = self.pictures.get(number)
        if self.damage is None:
            return (picture,)
        return picture, self.damage.of(self.pictures.paths[number], picture.shape[:2])

    def _cropped(self, rng: np.random.Generator, picture: Picture, *masks: Mask) -> tuple[NDArray[Any], ...]:
        height, width = picture.shape[:2]
        side = min(round(self.crop * rng.uniform(1.0, self.zoom_out)), height, width)
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        if self.whole:
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
        flipped = bool(rng.random() < 0.5) and self.flip
        window = np.s_[top : top + side, left : left + side]
        square, damaged = picture[window], [mask[window] for mask in masks]
        if side != self.crop:
            resized = Image.fromarray(square).resize((self.crop, self.crop), Image.Resampling.LANCZOS)
            square = np.asarray(resized)
            damaged = [resized_damage(mask, (self.crop, self.crop)) for mask in damaged]
        if self.shuffle_colors:
            square = square[:, :, rng.permutation(3)]
        return tuple(np.ascontiguousarray(each[:, ::-1] if flipped else each) for each in (square, *damaged))
