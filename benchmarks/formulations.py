"""Other formulations of the dynamic filter, for comparison with ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def stacked(features: Tensor, taps: Tensor, kernel_size: int = 3, share: int = 1) -> Tensor:
    """Return the dynamic filter, computed in the official code's order of operations.

    Taps are expanded to K*K per channel, K*K shifted copies of the features are stacked, multiplied and summed.
    """
    n, channels, height, width = features.shape
    expanded = taps.repeat_interleave(share, dim=1).view(n, channels, kernel_size**2, height, width)
    padded = F.pad(features, (kernel_size // 2,) * 4)
    copies = [padded[..., i : i + height, j : j + width] for i in range(kernel_size) for j in range(kernel_size)]
    return (expanded * torch.stack(copies, dim=2)).sum(dim=2)


def unfolded(features: Tensor, taps: Tensor, kernel_size: int = 3, share: int = 1) -> Tensor:
    """Return the dynamic filter, computed with F.unfold."""
    n, channels, height, width = features.shape
    expanded = taps.repeat_interleave(share, dim=1).view(n, channels, kernel_size**2, height, width)
    patches = F.unfold(features, kernel_size, padding=kernel_size // 2)
    return (patches.view(n, channels, kernel_size**2, height, width) * expanded).sum(dim=2)


@contextlib.contextmanager
def official_formulation() -> Iterator[None]:
    """Make `misf.training`'s network use `stacked` inside the block."""
    from misf.training.model import network

    ours = network.dynamic_filter
    network.dynamic_filter = stacked
    try:
        yield
    finally:
        network.dynamic_filter = ours


@contextlib.contextmanager
def plain_norm() -> Iterator[None]:
    """Make `misf.training`'s network use F.instance_norm for all memory layouts inside the block."""
    from misf.training.model import network

    ours = network.norm_in_layout
    network.norm_in_layout = F.instance_norm
    try:
        yield
    finally:
        network.norm_in_layout = ours
