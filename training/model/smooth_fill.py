"""The classical fill that misf-small's layers start from: smooth in the hole, and close to its edge like the edge.

It has no trained weights, and becomes part of the exported graph.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Return x N,C,H,W enlarged to N,C,H*factor,W*factor, bilinearly."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)


def coarse_fill(known: Tensor) -> Tensor:
    """Return a smooth estimate N,3,h,w of a picture: local averages of its known pixels, widest first.

    This is normalised convolution: each scale averages the known pixels within its reach, and keeps the estimate of the
    next wider scale where there are few.

    Args:
        known: N,4,h,w: known colours, 0 in holes, and the known fraction of each pixel. h and w must be multiples of 4;
            the widest averages are taken at a quarter of the resolution.

    """
    mean = known.mean(dim=(2, 3), keepdim=True)
    estimate = (mean[:, :3] + 0.5 * _LITTLE) / (mean[:, 3:] + _LITTLE)
    half = F.avg_pool2d(known, 2)
    quarter = F.avg_pool2d(half, 2)
    for size in _FILL_SIZES:
        nearby = _wide_box(_wide_box(quarter, size), size)  # two boxes make a tent, which leaves no visible edges
        estimate = (nearby[:, :3] + PRIOR * estimate) / (nearby[:, 3:] + PRIOR)
    for nearby in (half, known):
        estimate = near_known(nearby, enlarge(estimate, 2))
    return estimate


_FILL_SIZES = (17, 9, 5, 3)  # sizes of the boxes at the smallest scale; the other scales use 3
PRIOR = 0.02  # the wider estimate counts like this fraction of known pixels
_LITTLE = 1e-3  # makes a picture without known pixels grey


def known_colours(x: Tensor) -> Tensor:
    """Return known colours (0 in holes) and the known fraction, N,4,H,W, of a network input N,4,H,W."""
    return torch.cat([x[:, :3], 1 - x[:, 3:]], dim=1)


def completed(x: Tensor, estimate: Tensor) -> list[Tensor]:
    """Return the picture N,3,H,W of a network input, with `estimate` where nothing is known, and the mask N,1,H,W."""
    mask = x[:, 3:]
    return [x[:, :3] + mask * estimate, mask]


def near_known(known: Tensor, estimate: Tensor) -> Tensor:
    """Return `estimate` N,3,H,W pulled to the mean of the known pixels (N,4,H,W) in a 5x5 tent."""
    nearby = _box(_box(known))
    result: Tensor = (nearby[:, :3] + PRIOR * estimate) / (nearby[:, 3:] + PRIOR)
    return result


def refined(x: Tensor, half: Tensor, picture: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return a picture N,3,H/4,W/4 enlarged to half and to full resolution, both as from `completed`.

    At half resolution the known pixels correct it. x and half: the network input N,4,H,W and the same at half
    resolution.
    """
    estimate = near_known(known_colours(half), enlarge(picture, 2))
    return completed(half, estimate), completed(x, enlarge(estimate, 2))


def _box(x: Tensor) -> Tensor:
    """Return zero-padded 3x3 means of N,4,H,W, computed as a convolution, which runtimes execute fast."""
    weight = torch.eye(4, dtype=x.dtype, device=x.device)[:, :, None, None].expand(4, 4, 3, 3) / 9
    return F.conv2d(x, weight, padding=1)


def _wide_box(x: Tensor, size: int) -> Tensor:
    x = F.avg_pool2d(x, (size, 1), stride=1, padding=(size // 2, 0))
    return F.avg_pool2d(x, (1, size), stride=1, padding=(0, size // 2))


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context without autocast, empty where autocast is off, because the exporter would make it a subgraph."""
    if not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
