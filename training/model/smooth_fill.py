"""The classical fill that misf-small's layers start from: smooth in the hole, continuing slopes at its edges.

It has no trained weights, and becomes part of the exported graph.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Return x N,C,H,W enlarged to N,C,H*factor,W*factor, bilinearly."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)


def smooth_fill(x: Tensor) -> Tensor:
    """Return the picture N,3,H,W of a network input N,4,H,W with its holes filled by local averages, widest first.

    This is normalised convolution: each scale averages the known pixels within its reach, and keeps the estimate of the
    next wider scale where there are few. Wide scales work on a smaller picture. H and W must be multiples of 16.
    """
    known = shrunken(x, 2)
    estimate = coarse_fill(known[2])
    for nearby in (known[1], known[0]):
        estimate = near_known(nearby, enlarge(estimate, 2), PRIOR, twice=True)
    estimate = near_known(known[0], estimate, EDGE_PRIOR)  # fits the hole's outermost pixels to their neighbours
    return x[:, :3] + x[:, 3:] * estimate


def coarse_fill(known: Tensor) -> Tensor:
    """Return a smooth estimate N,3,h,w of a picture.

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
        estimate = near_known(nearby, enlarge(estimate, 2), PRIOR, twice=True)
    return estimate


_FILL_SIZES = (17, 9, 5, 3)  # sizes of the boxes at the smallest scale; the other scales use 3
PRIOR, EDGE_PRIOR = 0.02, 0.1  # the wider estimate counts like this fraction of known pixels
_LITTLE = 1e-3  # makes a picture without known pixels grey


def shrunken(x: Tensor, times: int) -> list[Tensor]:
    """Return known colours (0 in holes) and the known fraction, N,4,H,W, at full resolution and `times` lower ones."""
    known = [torch.cat([x[:, :3], 1 - x[:, 3:]], dim=1)]
    for _ in range(times):
        known.append(F.avg_pool2d(known[-1], 2))
    return known


def completed(known: Tensor, estimate: Tensor) -> Tensor:
    """Return N,4,H,W: the picture, with known colours where there are any and `estimate` elsewhere, and the mask."""
    mask = 1 - known[:, 3:]
    return torch.cat([known[:, :3] + mask * estimate, mask], dim=1)


def near_known(known: Tensor, estimate: Tensor, prior: float, twice: bool = False) -> Tensor:
    """Return `estimate` N,3,H,W pulled to the mean of the known pixels (N,4,H,W) in a 3x3 box, or in a 5x5 tent."""
    nearby = _box(_box(known)) if twice else _box(known)
    result: Tensor = (nearby[:, :3] + prior * estimate) / (nearby[:, 3:] + prior)
    return result


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


class EdgeContinuation(nn.Module):
    """Corrects a prediction near the edges of holes so that it continues the slopes of the known pixels there.

    Around every pixel, a plane is fitted to the known pixels within reach by least squares with Gaussian weights. The
    prediction is one more observation in the middle, with weight `prior`, and `ridge` keeps the slope small. This is
    first-order normalised convolution (Knutsson and Westin 1993), which only convolves the planes' moments. Beyond the
    reach of known pixels the prediction is unchanged. There are no trained weights.
    """

    PLANES = ((7, 1.7, 0.01, 0.7), (5, 0.8, 0.02, 0.4))
    """Window size and sigma in pixels, prior, and ridge in square pixels of each pass, in order."""

    def __init__(self) -> None:
        super().__init__()
        for index, (size, sigma, _, _) in enumerate(self.PLANES):
            down, across = _moment_kernels(size, sigma)
            self.register_buffer(f"down{index}", down, persistent=False)
            self.register_buffer(f"across{index}", across, persistent=False)

    def forward(self, x: Tensor, prediction: Tensor) -> Tensor:
        """Return N,3,H,W float32 for a network input N,4,H,W and a prediction N,3,H,W in the same range of values."""
        with full_precision(x):
            known = torch.cat([x[:, :3], 1 - x[:, 3:]], dim=1)
            for index in range(len(self.PLANES)):
                share, rest = self._planes(known, index)
                prediction = share * prediction + rest
            return prediction

    @torch.no_grad()  # no gradient flows through here, and oneDNN has faster convolutions for inference
    def _planes(self, known: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Return (share N,1,H,W, rest N,3,H,W): a plane's value in the middle is share x prediction + rest."""
        _, _, prior, ridge = self.PLANES[index]
        down, across = self.get_buffer(f"down{index}"), self.get_buffer(f"across{index}")
        side = down.shape[2] // 2
        moments = F.conv2d(F.conv2d(known, down, padding=(side, 0)), across, padding=(0, side))
        total = moments[:, 9:10] + prior
        colour, colour_x, colour_y, _, x1, y1, xx, xy, yy = torch.split(moments / total, [3, 3, 3, 1, 1, 1, 1, 1, 1], 1)
        xx, xy, yy = xx - x1 * x1 + ridge, xy - x1 * y1, yy - y1 * y1 + ridge  # the variances of the positions
        determinant = xx * yy - xy * xy
        along_x, along_y = (yy * x1 - xy * y1) / determinant, (xx * y1 - xy * x1) / determinant
        # The value is the mean of all observations minus the slope times their mean position (x1, y1).
        in_mean = 1 + along_x * x1 + along_y * y1
        return prior / total * in_mean, in_mean * colour - along_x * colour_x - along_y * colour_y


def _moment_kernels(size: int, sigma: float) -> tuple[Tensor, Tensor]:
    """Return kernels 9,4,size,1 and 15,9,1,size that, one after the other, compute a picture's moments in a window.

    The input has three colours, 0 where unknown, and a channel that is 1 where they are known. The output has the
    colours, the colours times x, the colours times y, and 1, x, y, xx, xy, yy, all summed with Gaussian weights whose
    sum is 1; x and y count pixels from the middle.
    """
    place = torch.arange(size, dtype=torch.float64, device="cpu") - size // 2  # the network may be built on meta
    weight = torch.exp(-0.5 * (place / sigma) ** 2)
    powers = torch.stack([weight * place**power for power in range(3)]) / weight.sum()
    down, across = powers.new_zeros(9, 4, size), powers.new_zeros(15, 9, size)
    for channel in range(3):  # the intermediate channels: colours, colours times y, then 1, y, yy
        down[channel, channel], down[3 + channel, channel] = powers[0], powers[1]
        across[channel, channel], across[3 + channel, channel] = powers[0], powers[1]
        across[6 + channel, 3 + channel] = powers[0]
    for power in range(3):
        down[6 + power, 3] = powers[power]
    for row, (x_power, y_power) in enumerate([(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]):
        across[9 + row, 6 + y_power] = powers[x_power]
    return down[:, :, :, None].float(), across[:, :, None, :].float()
