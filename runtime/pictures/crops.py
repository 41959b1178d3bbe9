"""Which parts of a picture the network sees: pure geometry on the mask, no picture needed.

A picture of about the working size runs whole. In a larger one every hole gets a crop with context around it: small
holes share a crop, a long thin hole (a wire, a scratch) is walked in pieces at native resolution, and a wide hole, or
the wide part of one, is seen reduced. So the cost follows the holes, not the picture.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .geometry import Box, Mask, Size
from .settings import ABOUT, CropSettings

BLOCK = 8  # holes are separated on a grid of 8x8 blocks: 64 times fewer cells than pixels
THIN = 0.4  # a long hole no thicker than this share of the working size is walked at native resolution
LEAST_MARGIN = 32


@dataclass(frozen=True)
class Crop:
    """One run of the network: what it sees, at which size, and the part of the hole that it fills."""

    box: Box  # what the network sees
    size: Size  # the size it sees it at, H and W
    core: Box  # around the hole pixels to fill, inside `box`
    hole: Mask  # the hole pixels to fill, of core's size


@dataclass(frozen=True)
class _Piece:
    """A hole, or a piece of a long one, on its way to a crop."""

    core: Box
    margin: int
    blocks: Mask  # over the block grid of `core`


def plan_crops(mask: Mask, settings: CropSettings | None = None) -> list[Crop]:
    """Return the crops that together fill every hole pixel of `mask`, bool H,W, exactly once; none if it is empty."""
    settings = settings or CropSettings()
    strategy, working_size, margin = settings.strategy_for(mask.shape), settings.working_size, settings.margin
    bounds = _bounds(mask)
    if bounds is None:
        return []
    height, width = mask.shape
    if strategy != "crop":
        whole = Box(0, 0, width, height)
        size = (height, width) if strategy != "resize" else _reduced((height, width), working_size, slack=1.0)
        return [Crop(whole, size, bounds, mask[bounds.slices])]
    pieces = _merge(_pieces(mask, working_size, margin), working_size)
    return [_crop(mask, piece, working_size) for piece in pieces]


def _bounds(mask: Mask) -> Box | None:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return None
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _blocks(mask: Mask) -> tuple[Mask, Mask]:
    """Return two of bool ceil(H/8), ceil(W/8): which blocks hold any hole pixel, which hold nothing else."""
    height, width = mask.shape
    rows, columns = -(-height // BLOCK), -(-width // BLOCK)
    padded = np.zeros((rows * BLOCK, columns * BLOCK), np.bool_)
    padded[:height, :width] = mask
    words = padded.view(np.uint64).reshape(rows, BLOCK, columns)  # eight pixels are one word
    full = np.ones(BLOCK, np.bool_).view(np.uint64)[0]
    occupied = np.bitwise_or.reduce(words, axis=1) != 0
    return np.asarray(occupied), np.asarray(np.bitwise_and.reduce(words, axis=1) == full)


def _pieces(mask: Mask, working_size: int, margin: int | None) -> list[_Piece]:
    """Return the connected holes: whole where a crop of about the working size or a wide hole needs it, else walked."""
    occupied, solid = _blocks(mask)
    pieces: list[_Piece] = []
    for top, left, blocks in _connected(occupied):
        piece = _whole(top, left, blocks, margin)
        height, width = piece.core.size
        if (height + 2 * piece.margin) * (width + 2 * piece.margin) <= ABOUT * working_size**2:
            pieces.append(piece)
            continue
        inside = solid[top : top + blocks.shape[0], left : left + blocks.shape[1]]
        wide = _wide_part(blocks, blocks & inside, working_size)
        pieces += [_whole(top + y, left + x, part, margin) for y, x, part in _connected(wide)]
        pieces += _walk(top, left, blocks & ~wide, working_size, margin)
    return pieces


def _connected(blocks: Mask) -> list[tuple[int, int, Mask]]:
    """Return the connected parts of a grid of blocks: top, left, and the part within its bounds."""
    from scipy import ndimage

    labels, _ = ndimage.label(blocks, structure=np.ones((3, 3), np.int8))
    places = enumerate(ndimage.find_objects(labels), start=1)
    return [(rows.start, columns.start, labels[rows, columns] == number) for number, (rows, columns) in places]


def _whole(top: int, left: int, blocks: Mask, margin: int | None) -> _Piece:
    core = _block_box(top, left, blocks.shape)
    return _Piece(core, max(LEAST_MARGIN, max(core.size) // 4) if margin is None else margin, blocks)


def _wide_part(blocks: Mask, solid: Mask, working_size: int) -> Mask:
    """Return the part of a hole that is too thick to be walked, with the stubs on it.

    solid: the blocks that are entirely hole; scattered pixels therefore never count as thick.
    """
    from scipy import ndimage

    radius = THIN * working_size / 2 / BLOCK
    thick: Mask = ndimage.distance_transform_edt(np.pad(solid, 1))[1:-1, 1:-1] > radius
    if not thick.any():
        return thick
    wide: Mask = blocks & (ndimage.distance_transform_edt(~thick) <= 2 * radius)
    for top, left, part in _connected(blocks & ~wide):
        if max(part.shape) * BLOCK <= working_size // 2:
            wide[top : top + part.shape[0], left : left + part.shape[1]] |= part
    return wide


def _walk(first_row: int, first_column: int, blocks: Mask, working_size: int, margin: int | None) -> list[_Piece]:
    """Return the pieces of a long thin hole, on a grid that leaves each its margin within the working size."""
    around = 3 * working_size // 16 if margin is None else min(margin, working_size // 4)
    step = (working_size - 2 * around) // BLOCK
    pieces = []
    for top in range(0, blocks.shape[0], step):
        for left in range(0, blocks.shape[1], step):
            cell = blocks[top : top + step, left : left + step]
            if cell.any():
                pieces.append(_Piece(_block_box(first_row + top, first_column + left, cell.shape), around, cell))
    return pieces


def _block_box(top: int, left: int, shape: tuple[int, ...]) -> Box:
    return Box(left * BLOCK, top * BLOCK, (left + shape[1]) * BLOCK, (top + shape[0]) * BLOCK)


def _merge(pieces: list[_Piece], working_size: int) -> list[_Piece]:
    """Return fewer pieces: those whose union still fits a crop of the working size share it.

    Neighbours are found through a grid, so ten thousand specks take no quadratic time; the number of crops is bounded
    by the picture's area, whatever the number of holes.
    """
    cells: dict[tuple[int, int], list[_Piece]] = defaultdict(list)
    for piece in pieces:
        step = working_size // 2
        cells[(piece.core.top // step, piece.core.left // step)].append(piece)
    merged: list[_Piece] = []
    for members in (cells[key] for key in sorted(cells)):
        merged += _merge_greedily(members, working_size)
    return _merge_greedily(merged, working_size)


def _merge_greedily(pieces: list[_Piece], working_size: int) -> list[_Piece]:
    """Return fewer pieces: each joins the first group before it that has room for it.

    What shares a crop starts at most `step` apart, margins leave no more, so groups are looked up by where they start,
    on a grid of that step.
    """
    step = max(1, working_size - 2 * min((piece.margin for piece in pieces), default=0))
    groups: list[tuple[Box, int, list[_Piece]]] = []
    cells: dict[tuple[int, int], set[int]] = defaultdict(set)
    for piece in pieces:
        row, column = _cell(piece.core, step)
        near = (cells[y, x] for y in range(row - 1, row + 2) for x in range(column - 1, column + 2) if (y, x) in cells)
        for index in sorted(set().union(*near)):
            core, margin, members = groups[index]
            union, around = core.union(piece.core), max(margin, piece.margin)
            if max(union.size) + 2 * around <= working_size:
                groups[index] = (union, around, [*members, piece])
                cells[_cell(core, step)].discard(index)
                cells[_cell(union, step)].add(index)
                break
        else:
            cells[row, column].add(len(groups))
            groups.append((piece.core, piece.margin, [piece]))
    return [_Piece(core, margin, _union_blocks(core, members)) for core, margin, members in groups]


def _cell(box: Box, step: int) -> tuple[int, int]:
    return box.top // step, box.left // step


def _union_blocks(core: Box, members: list[_Piece]) -> Mask:
    if len(members) == 1:
        return members[0].blocks
    blocks = np.zeros((core.size[0] // BLOCK, core.size[1] // BLOCK), np.bool_)
    for piece in members:
        top, left = (piece.core.top - core.top) // BLOCK, (piece.core.left - core.left) // BLOCK
        blocks[top : top + piece.blocks.shape[0], left : left + piece.blocks.shape[1]] |= piece.blocks
    return blocks


def _crop(mask: Mask, piece: _Piece, working_size: int) -> Crop:
    height, width = mask.shape
    left, top, right, bottom = piece.core
    core = Box(left, top, min(right, width), min(bottom, height))
    blocks = np.repeat(np.repeat(piece.blocks, BLOCK, axis=0), BLOCK, axis=1)[: core.size[0], : core.size[1]]
    hole = blocks & mask[core.slices]
    top, bottom = _span(core.top, core.bottom, piece.margin, working_size, height)
    left, right = _span(core.left, core.right, piece.margin, working_size, width)
    box = Box(left, top, right, bottom)
    return Crop(box, _reduced(box.size, working_size, slack=ABOUT), core, hole)


def _span(start: int, stop: int, margin: int, least: int, limit: int) -> tuple[int, int]:
    """Return one side of a crop: the hole with its margin, at least `least` long, shifted to lie in 0..limit."""
    length = min(limit, max(stop - start + 2 * margin, least))
    first = min(max(0, (start + stop - length) // 2), limit - length)
    return first, first + length


def _reduced(size: Size, working_size: int, slack: float) -> Size:
    """Return the size as it is up to `slack` working squares, else reduced to one working square, same proportions."""
    height, width = size
    if height * width <= slack * working_size**2:
        return size
    scale = working_size / math.sqrt(height * width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def fit(size: Size, largest: Size) -> Size:
    """Return the size, reduced in proportion until neither side is longer than `largest` allows."""
    height, width = size
    scale = min(1.0, largest[0] / height, largest[1] / width)
    return (height, width) if scale == 1 else (max(1, int(height * scale)), max(1, int(width * scale)))
