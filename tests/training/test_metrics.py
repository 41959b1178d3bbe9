"""Metrics against SciPy (SSIM), torchmetrics (LPIPS) and NumPy, and the behaviour of the classical methods."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from numpy.typing import NDArray
from scipy.signal import convolve2d
from torch import nn

from misf.plugins.shared.errors import MisfError
from misf.training.judging.baselines import PEERS
from misf.training.judging.lpips import Lpips, load_lpips, published_heads
from misf.training.judging.metrics import compare, l1_percent, mean_of, paste, psnr_db, ssim
from misf.training.mask_drawing import random_mask

Picture = NDArray[np.uint8]


@pytest.fixture(scope="module")
def truth() -> Picture:
    return np.ascontiguousarray(skimage.data.astronaut()[40:136, 170:298])


@pytest.fixture(scope="module")
def hole() -> NDArray[np.bool_]:
    return random_mask(np.random.default_rng(0), 96, 128, (0.2, 0.4))


@pytest.fixture(scope="module")
def noisy(truth: Picture, hole: NDArray[np.bool_]) -> Picture:
    noise = np.random.default_rng(1).normal(0, 25, truth.shape)
    return paste(truth, np.clip(truth / 255 + noise / 255, 0, 1), hole)


def test_psnr_and_l1_against_numpy(truth: Picture, noisy: Picture, hole: NDArray[np.bool_]) -> None:
    error = noisy.astype(float) - truth.astype(float)
    measured = compare(truth, noisy, hole)
    assert measured["psnr_db"] == pytest.approx(20 * np.log10(255 / np.sqrt((error**2).mean())), abs=1e-9)
    assert measured["hole_psnr_db"] == pytest.approx(20 * np.log10(255 / np.sqrt((error[hole] ** 2).mean())), abs=1e-9)
    assert measured["l1_percent"] == pytest.approx(100 * np.abs(error / 255).mean(), abs=1e-9)
    # The known pixels dilute the error exactly by the hole's fraction.
    assert measured["psnr_db"] - measured["hole_psnr_db"] == pytest.approx(-10 * np.log10(hole.mean()), abs=1e-9)
    assert psnr_db(truth, truth) == 100.0
    assert l1_percent(np.zeros_like(truth), np.full_like(truth, 255)) == pytest.approx(100.0)


def test_ssim_by_its_definition(truth: Picture, noisy: Picture) -> None:
    """Wang et al. (2004), equation 13: an 11x11 Gaussian window, only where it lies within the picture."""
    distance = np.arange(-5, 6) ** 2
    window = np.exp(-(distance[:, None] + distance) / (2 * 1.5**2))

    def mean(picture: NDArray[np.float64]) -> NDArray[np.float64]:
        weighted = [convolve2d(channel, window / window.sum(), "valid") for channel in np.moveaxis(picture, 2, 0)]
        return np.stack(weighted)

    x, y = truth.astype(np.float64), noisy.astype(np.float64)
    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    assert ssim(truth, noisy) == pytest.approx((luminance * structure).mean(), abs=1e-9)
    assert ssim(truth, truth) == pytest.approx(1.0)


def test_paste(truth: Picture, hole: NDArray[np.bool_]) -> None:
    filling = np.random.default_rng(2).normal(0.5, 0.6, truth.shape).astype(np.float32)
    result = paste(truth, filling, hole)
    assert result.dtype == np.uint8
    assert np.array_equal(result[~hole], truth[~hole])
    assert np.abs(result[hole] - np.clip(filling[hole], 0, 1) * 255).max() <= 0.5001
    filling[~hole] = np.nan  # values outside the hole do not matter
    assert np.array_equal(paste(truth, filling, hole), result)
    filling[tuple(np.argwhere(hole)[0])] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        paste(truth, filling, hole)


def test_means() -> None:
    assert mean_of([{"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 0.0}]) == {"a": 1.5, "b": 2.0}
    assert mean_of([]) == {}


@pytest.mark.parametrize("name", sorted(PEERS))
def test_peers_fill_from_what_is_known_only(name: str, truth: Picture, hole: NDArray[np.bool_]) -> None:
    fill = PEERS[name]
    hole = hole.copy()
    hole[:3], hole[-3:], hole[:, :3], hole[:, -3:] = (
        False,
        False,
        False,
        False,
    )  # see the note on OpenCV in baselines.py
    black, white = (paste(truth, np.full_like(truth, value), hole) for value in (0, 255))
    result = paste(truth, fill(black, hole), hole)
    assert np.array_equal(result, paste(truth, fill(white, hole), hole))
    flat = paste(truth, np.broadcast_to(truth[~hole].mean(axis=0) / 255, truth.shape), hole)
    assert psnr_db(truth, result, hole) > psnr_db(truth, flat, hole)
    # The biharmonic method continues a ramp exactly, and the others nearly.
    ramp = np.repeat(np.arange(128, dtype=np.uint8)[None, :, None], 96, axis=0).repeat(3, axis=2) + np.uint8(50)
    square = np.zeros((96, 128), bool)
    square[40:56, 50:66] = True
    assert psnr_db(ramp, paste(ramp, fill(ramp * ~square[:, :, None], square), square), square) > 30


def alexnet_features() -> nn.Sequential:
    """AlexNet's feature layers as Krizhevsky (2014) lists them, with random weights."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)]
    return nn.Sequential(*layers)


def test_lpips_against_torchmetrics(truth: Picture, noisy: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchmetrics.functional.image.lpips as referee

    features = alexnet_features()
    monkeypatch.setattr(referee, "_get_tv_model_features", lambda *_, **__: features)
    pair = [torch.from_numpy(x.transpose(2, 0, 1)[None].copy()).float() / 255 for x in (truth, noisy)]
    expected = referee._LPIPS(pretrained=True, net="alex")(*pair, normalize=True)
    backbone = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    ours = Lpips(backbone, published_heads())
    assert ours(*pair).item() == pytest.approx(expected.item(), rel=1e-5)
    assert ours(*pair).item() > 1e-4
    assert ours(pair[0], pair[0]).item() == 0.0


def test_lpips_refuses_other_weights(tmp_path: Path) -> None:
    torch.save(alexnet_features().state_dict(), tmp_path / "alexnet.pth")
    with pytest.raises(MisfError, match=r"alexnet\.pth: expected torchvision's alexnet-owt-7be5be79\.pth"):
        load_lpips(tmp_path / "alexnet.pth")
