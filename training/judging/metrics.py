"""How close a filled picture is to the true one. PSNR and SSIM are scikit-image's; all metrics use the composite.

Pictures are compared as uint8, as in a file, so that all methods are measured alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

PSNR_LIMIT_DB = 100.0  # the value for identical pictures, so that means stay finite
SMALLEST_SIDE = 11  # size of SSIM's window


def paste(picture: Picture, filling: NDArray[np.generic], hole: NDArray[np.bool_]) -> Picture:
    """Return the composite uint8 H,W,3: `filling` inside the hole, and exactly the picture elsewhere.

    Args:
        picture: uint8 H,W,3.
        filling: H,W,3, uint8, or float in [0,1], which is clipped and rounded.
        hole: bool H,W.

    Raises:
        ValueError: a float filling is not finite inside the hole.

    """
    if filling.dtype != np.uint8:
        values = filling.astype(np.float64)
        if not np.isfinite(values[hole]).all():
            raise ValueError("the prediction is not finite: NaN or infinity inside the hole")
        filling = np.round(np.clip(np.nan_to_num(values), 0, 1) * 255).astype(np.uint8)
    return np.where(hole[:, :, None], filling, picture).astype(np.uint8)


def psnr_db(truth: Picture, result: Picture, hole: NDArray[np.bool_] | None = None) -> float:
    """Return the PSNR in dB (peak 255, at most 100) of uint8 H,W,3 pictures; given `hole` bool H,W, inside it only."""
    from skimage.metrics import peak_signal_noise_ratio

    if hole is not None:
        truth, result = truth[hole], result[hole]
    if np.array_equal(truth, result):
        return PSNR_LIMIT_DB
    decibels = peak_signal_noise_ratio(truth, result, data_range=255)  # type: ignore[no-untyped-call]
    return min(float(decibels), PSNR_LIMIT_DB)


def ssim(truth: Picture, result: Picture) -> float:
    """Return the SSIM of uint8 H,W,3 pictures as in Wang et al. (2004): Gaussian window, sigma 1.5; mean over RGB."""
    from skimage.metrics import structural_similarity

    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(truth, result, data_range=255, channel_axis=2, **settings))  # type: ignore[no-untyped-call]


def l1_percent(truth: Picture, result: Picture) -> float:
    """Return the mean absolute error of uint8 H,W,3 pictures in percent of the full range."""
    return float(np.abs(truth.astype(np.int16) - result.astype(np.int16)).mean() / 2.55)


def compare(truth: Picture, result: Picture, hole: NDArray[np.bool_]) -> dict[str, float]:
    """Return psnr_db, ssim and l1_percent over the picture, and hole_psnr_db inside the hole only.

    Args:
        truth: the whole picture, uint8 H,W,3, H and W at least 11.
        result: the composite, uint8 H,W,3.
        hole: bool H,W with at least one True.

    """
    return {
        "psnr_db": psnr_db(truth, result),
        "ssim": ssim(truth, result),
        "l1_percent": l1_percent(truth, result),
        "hole_psnr_db": psnr_db(truth, result, hole),
    }


def mean_of(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the pictures; empty if there are none."""
    rows = list(rows)
    return {name: float(np.mean([row[name] for row in rows])) for name in (rows[0] if rows else {})}
