"""Training samples made on the training device, which holds all pictures and a stock of masks.

For collections that fit into its memory. A GPU cuts thousands of crops in the time that a CPU takes for a few.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..plugins.shared.errors import MisfError
from ..runtime.pictures.geometry import Mask
from .damage import DamageMasks, resized_damage
from .dataset import MaskSource, Picture, Pictures


class ResidentSamples:
    """Random crops with masks from a stock. On one type of device a batch depends only on the seed and its number.

    Args:
        pictures: those whose shorter side is below `crop` are enlarged to it.
        masks: the source of the stock.
        stock: number of masks, each used in all eight orientations.
        crop, seed, zoom_out, shuffle_colors: as for `TrainingSamples`, but crops are cut without resizing from two
            sizes of each picture: the original, and one smaller by the factor `zoom_out`.
        device: the device that holds everything.
        workers: number of processes that draw the masks.
        damage: what is damaged in the pictures.

    Raises:
        MisfError: no picture can be decoded, or a damage mask cannot be used.

    """

    def __init__(
        self,
        pictures: Pictures,
        masks: MaskSource,
        *,
        stock: int,
        crop: int,
        seed: int = 0,
        zoom_out: float = 1.0,
        shuffle_colors: bool = False,
        device: torch.device | str = "cpu",
        workers: int = 0,
        damage: DamageMasks | None = None,
    ) -> None:
        self.crop, self.seed, self.shuffle_colors, self.device = crop, seed, shuffle_colors, torch.device(device)
        draw = partial(_drawn, masks, seed, crop)
        if workers:
            with multiprocessing.get_context("fork").Pool(min(workers, os.cpu_count() or 1)) as pool:
                drawn = pool.map(draw, range(stock), chunksize=64)
        else:
            drawn = [draw(index) for index in range(stock)]
        self._masks = torch.from_numpy(np.stack(drawn)).to(self.device)
        decoded = [
            (picture, None if damage is None else damage.of(path, picture.shape[:2]))
            for index, path in enumerate(pictures.paths)
            if (picture := pictures.get(index)) is not None
        ]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            resized = threads.map(partial(_sizes, crop=crop, zoom_out=zoom_out), *zip(*decoded, strict=True))
            both = [size for several in resized for size in several]
        sizes = [size for size, _ in both]
        self._pictures = len(decoded)
        if not sizes:
            raise MisfError(f"none of {len(pictures)} pictures can be decoded")
        self._pixels = torch.from_numpy(np.concatenate([size.reshape(-1, 3) for size in sizes])).to(self.device)
        damaged = [mask.reshape(-1) for _, mask in both if mask is not None]
        self._damaged = torch.from_numpy(np.concatenate(damaged)).to(self.device) if damaged else None
        shapes = torch.tensor([size.shape[:2] for size in sizes])
        ends = shapes.prod(dim=1).cumsum(dim=0)
        self._starts, self._shapes = (ends - shapes.prod(dim=1)).to(self.device), shapes.to(self.device)

    def __len__(self) -> int:
        return self._pictures

    def batch(self, number: int, count: int) -> tuple[Tensor, ...]:
        """Return batch `number`: float32 count,3,crop,crop RGB in [0,1] and float32 count,1,crop,crop, 1 = hole.

        With `damage`, what is damaged is part of the hole, and a third tensor, float32 count,1,crop,crop, says where.
        """
        random = torch.Generator(self.device).manual_seed(hash((self.seed, number)))

        def below(limits: Tensor) -> Tensor:
            share = torch.rand(count, generator=random, device=self.device, dtype=torch.float64)
            return (share * limits).long()

        def either() -> Tensor:
            return torch.rand(count, 1, 1, generator=random, device=self.device) < 0.5

        place = torch.arange(self.crop, device=self.device)
        which = below(torch.tensor(len(self._starts)))
        height, width = self._shapes[which].unbind(dim=1)
        rows = below(height - self.crop + 1)[:, None, None] + place[:, None]
        columns = below(width - self.crop + 1)[:, None, None] + torch.where(either(), place, place.flip(0))
        places = self._starts[which][:, None, None] + rows * width[:, None, None] + columns
        image = self._pixels[places]
        if self.shuffle_colors:
            order = torch.rand(count, 3, generator=random, device=self.device).argsort(dim=1)
            image = image.gather(3, order[:, None, None].expand_as(image))
        mask = self._masks[below(torch.tensor(len(self._masks)))]
        for turned in (mask.flip(1), mask.flip(2), mask.transpose(1, 2)):
            mask = torch.where(either(), turned, mask)
        masks = [mask]
        if self._damaged is not None:
            damaged = self._damaged[places]
            masks = [mask | damaged, damaged]
        return image.permute(0, 3, 1, 2).float() / 255, *(mask[:, None].float() for mask in masks)

    def batches(self, start: int, count: int, step: int = 1) -> Iterator[tuple[Tensor, ...]]:
        """Yield every `step`th batch from number `start` on, endlessly."""
        for number in itertools.count(start, step):
            yield self.batch(number, count)


def _drawn(masks: MaskSource, seed: int, crop: int, index: int) -> Mask:
    return masks.mask(np.random.default_rng([seed, 2, index]), crop, crop)


def _sizes(picture: Picture, damaged: Mask | None, crop: int, zoom_out: float) -> list[tuple[Picture, Mask | None]]:
    """Return the picture and what is damaged in it, and both smaller by `zoom_out`; no side is below `crop`."""
    height, width = picture.shape[:2]
    factors = {max(1.0, crop / min(height, width)), max(1 / zoom_out, crop / min(height, width))}
    found = []
    for factor in sorted(factors):
        if factor == 1:
            found.append((picture, damaged))
            continue
        size = (max(crop, round(width * factor)), max(crop, round(height * factor)))
        resized = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
        found.append((np.asarray(resized), None if damaged is None else resized_damage(damaged, size[::-1])))
    return found
