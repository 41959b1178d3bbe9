"""Training losses: reconstruction, adversarial, perceptual and style.

Pictures are float N,3,H,W RGB in [0,1], masks float N,1,H,W with 1 = hole; every loss is a scalar. MISF trains with L1,
adversarial, VGG-19 perceptual and style losses (arXiv 2203.06304, section 4.1, after EdgeConnect, arXiv 1901.00212).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .recipe import ADVERSARIAL
from .vgg19 import PERCEPTUAL_LAYERS, STYLE_LAYERS


def without_damage(prediction: Tensor, image: Tensor, mask: Tensor, damaged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the prediction, the picture and the mask for the losses, which then take nothing damaged for the truth.

    Prediction and picture get the predicted pixels there, without gradient: they agree, whatever a loss makes of their
    surroundings. The mask loses what is damaged. `damaged` is as `mask`, which it is part of.
    """
    fill, where = prediction.detach(), damaged > 0.5
    return torch.where(where, fill, prediction), torch.where(where, fill, image), mask * (1 - damaged)


def l1_over_mask(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Return the L1 over all pixels divided by the mask's mean, so that small holes count too, averaged over samples.

    The division is per sample, so that the loss is the same when a batch is split over processes.
    """
    l1 = (prediction - image).abs().mean(dim=(1, 2, 3))
    return (l1 / mask.mean(dim=(1, 2, 3)).clamp(min=1e-3)).mean()


def hole_loss(prediction: Tensor, image: Tensor, mask: Tensor, *, squared: float = 4.0, coarse: float = 0.5) -> Tensor:
    """Return the L1 in the hole, plus `squared` x the mean squared error, plus `coarse` x the L1 of 4x4 means.

    The 4x4 means reward the right colour of a region before its detail. H and W must be multiples of 4.

    Args:
        prediction, image: N,3,H,W.
        mask: N,1,H,W.
        squared, coarse: weights.

    """
    pixels = (3 * mask.sum(dim=(1, 2, 3))).clamp(min=1)

    def per_sample(x: Tensor) -> Tensor:
        return x.sum(dim=(1, 2, 3)) / pixels

    error = (prediction - image) * mask
    l1, l2 = per_sample(error.abs()), per_sample(error.square())
    pooled = per_sample(F.avg_pool2d(error, 4).abs()) * 16
    return (l1 + squared * l2 + coarse * pooled).mean()


def psnr_loss(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Return log(mean squared error in the hole + 2e-4), averaged over samples: -PSNR x ln(10)/10, but for the 2e-4.

    Unlike in the mean squared error, noisy pictures do not dominate smooth ones. Improvements above 37 dB count less
    and less. Arguments as in `hole_loss`.
    """
    square = ((prediction - image) * mask).square().sum(dim=(1, 2, 3)) / (3 * mask.sum(dim=(1, 2, 3))).clamp(min=1)
    return torch.log(square + 2e-4).mean()


def ssim_loss(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Return log(1 - SSIM + 1e-3) of the composite, averaged over samples.

    SSIM is defined as in Wang et al. (2004; 11x11 Gaussian window of sigma 1.5, K 0.01 and 0.03) and averaged over RGB
    and over every other window in both directions, which is less work for nearly the same mean. As in `psnr_loss`, the
    logarithm makes small and large holes count equally. H and W at least 11. Arguments as in `hole_loss`.
    """
    place = torch.arange(11, device=image.device, dtype=image.dtype) - 5
    window = torch.exp(-0.5 * (place / 1.5) ** 2)
    window = window / window.sum()

    def local_means(x: Tensor) -> Tensor:
        channels = x.shape[1]
        x = F.conv2d(x, window.expand(channels, 1, 1, 11), stride=(1, 2), groups=channels)
        return F.conv2d(x, window[:, None].expand(channels, 1, 11, 1), stride=(2, 1), groups=channels)

    result = torch.where(mask > 0.5, prediction, image)
    mean_image, square_image = local_means(torch.cat([image, image * image], dim=1)).chunk(2, dim=1)
    moments = local_means(torch.cat([result, result * result, result * image], dim=1))
    mean, square, product = moments.chunk(3, dim=1)
    both = mean * mean_image
    squares = mean * mean + mean_image * mean_image
    covariance, variances = product - both, square + square_image - squares
    similarity = (2 * both + 1e-4) * (2 * covariance + 9e-4) / ((squares + 1e-4) * (variances + 9e-4))
    return torch.log(1 - similarity.mean(dim=(1, 2, 3)) + 1e-3).mean()


def known_loss(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Return the L1 outside the hole, averaged over samples.

    Composites never show these pixels, but the loss stabilises the shared layers.
    """
    known = 1 - mask
    error = ((prediction - image).abs() * known).sum(dim=(1, 2, 3))
    return (error / (3 * known.sum(dim=(1, 2, 3))).clamp(min=1)).mean()


def adversarial_loss(
    scores: Tensor, real: bool, kind: str = "nsgan", *, for_generator: bool = False, where: Tensor | None = None
) -> Tensor:
    """Return the adversarial loss of a discriminator's raw scores whose target is `real`.

    Args:
        scores: any shape.
        real: the target: whether the pictures are real (discriminator) or should pass for real (generator).
        kind: nsgan (non-saturating logistic), lsgan (least squares to 1 and 0) or hinge.
        for_generator: only matters for hinge, whose generator loss is linear.
        where: 1 for the scores that count, else 0, broadcastable to `scores`; by default all count.

    Raises:
        ValueError: an unknown `kind`.

    """
    scores = scores.float()
    if kind == "nsgan":
        values = F.softplus(-scores if real else scores)
    elif kind == "lsgan":
        values = (scores - float(real)).square()
    elif kind == "hinge":
        sign = 1.0 if real else -1.0
        values = -sign * scores if for_generator else F.relu(1 - sign * scores)
    else:
        raise ValueError(f"adversarial loss {kind!r}: expected one of {', '.join(ADVERSARIAL)}")
    if where is None:
        return values.mean()
    return (values * where).sum() / where.sum().clamp(min=1)


def touched_patches(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return float N,1,h,w: 1 for the discriminator's scores (h, w = `size`) whose patch is near the hole, else 0.

    A 70x70 patch is near the hole if a hole pixel is within 8 pixels of its centre.
    """
    return F.adaptive_max_pool2d(F.max_pool2d(mask, 17, stride=1, padding=8), size)


def feature_distance_loss(distance: Tensor) -> Tensor:
    """Return log(distance + 0.02) of distances N, averaged: as in `psnr_loss`, small and large holes count equally."""
    return torch.log(distance + 0.02).mean()


def grid_loss(composite: Tensor, mask: Tensor, *, period: int = 16) -> Tensor:
    """Return how much of the fill's fine detail repeats every `period` pixels, averaged over samples.

    It is the sum of two fractions: of the energy of the detail (what a blur by 7x7 takes away), and of the energy of
    the variations of its strength, so that a grid of strokes of either sign counts too. In windows of 4x4 periods that
    are mostly hole, means by position within the period are compared with everything: a fraction is about 1/16 without
    a grid, 1 for nothing but a grid. Feature distances do not mind such a grid, and transposed convolutions with
    strides of 2 paint it easily.

    Args:
        composite: N,3,H,W; 0 is returned if H or W is less than 4 periods.
        mask: N,1,H,W.
        period: in pixels; its divisors are included.

    """
    height, width = (side // period * period for side in mask.shape[2:])
    if min(height, width) < 4 * period:
        return 0 * composite.sum()

    def window_means(x: Tensor) -> Tensor:
        """Return the means by position in the period: N,C*period^2,h,w of N,C,H,W."""
        return F.avg_pool2d(F.pixel_unshuffle(x[..., :height, :width], period), 4, stride=2)

    inside = window_means(mask)
    chosen = (inside.mean(dim=1, keepdim=True) > 0.5).to(composite.dtype)

    def repeated(x: Tensor) -> Tensor:
        means = window_means(x).square() / inside.repeat(1, x.shape[1], 1, 1).clamp(min=1 / 16)
        parts = [(part * chosen).sum(dim=(1, 2, 3)) for part in (means, window_means(x.square()))]
        return (parts[0] / (parts[1] + 1e-6)).mean()

    detail = (composite - F.avg_pool2d(composite, 7, stride=1, padding=3, count_include_pad=False)) * mask
    strength = detail.abs().mean(dim=1, keepdim=True)
    around = [F.avg_pool2d(x, 17, stride=1, padding=8) for x in (strength, mask)]
    return repeated(detail) + repeated((strength - around[0] / around[1].clamp(min=1e-3)) * mask)


def feature_matching_loss(of_prediction: Sequence[Tensor], of_image: Sequence[Tensor]) -> Tensor:
    """Return the mean over layers of the L1 between the discriminator's features (pix2pixHD, arXiv 1711.11585)."""
    terms = [F.l1_loss(a.float(), b.detach().float()) for a, b in zip(of_prediction, of_image, strict=True)]
    return torch.stack(terms).mean()


def perceptual_loss(of_prediction: dict[str, Tensor], of_image: dict[str, Tensor]) -> Tensor:
    """Return the sum over PERCEPTUAL_LAYERS of the L1 between VGG features (Johnson et al. 2016)."""
    terms = [F.l1_loss(of_prediction[name].float(), of_image[name].float()) for name in PERCEPTUAL_LAYERS]
    return torch.stack(terms).sum()


def style_loss(of_prediction: dict[str, Tensor], of_image: dict[str, Tensor]) -> Tensor:
    """Return the sum over STYLE_LAYERS of the L1 between Gram matrices (Gatys et al. 2016; Sajjadi et al. 2017)."""
    return torch.stack([F.l1_loss(gram(of_prediction[name]), gram(of_image[name])) for name in STYLE_LAYERS]).sum()


def gram(features: Tensor) -> Tensor:
    """Return the channels' inner products N,C,C of N,C,H,W, divided by C*H*W; always computed in float32."""
    n, channels, height, width = features.shape
    with torch.autocast(features.device.type, enabled=False):
        flat = features.float().reshape(n, channels, height * width)
        return flat @ flat.transpose(1, 2) / (channels * height * width)
