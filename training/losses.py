"""What the networks are trained to make small: reconstruction, adversarial, perceptual and style losses.

Pictures are float N,3,H,W RGB in [0,1], masks N,1,H,W with 1 = hole. The recipe is MISF's (arXiv 2203.06304, section
4.1, which takes it from EdgeConnect, arXiv 1901.00212): L1, adversarial, VGG-19 perceptual and style.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..plugins.shared.errors import MisfError
from .recipe import ADVERSARIAL


def l1_over_mask(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Return L1 over all pixels divided by the mask's mean, so that small holes count too; the mean over samples.

    Sample by sample, so that a batch has the same loss in one piece as spread over processes.
    """
    l1 = (prediction - image).abs().mean(dim=(1, 2, 3))
    return (l1 / mask.mean(dim=(1, 2, 3)).clamp(min=1e-3)).mean()


def hole_loss(prediction: Tensor, image: Tensor, mask: Tensor, *, squared: float = 4.0, coarse: float = 0.5) -> Tensor:
    """Return L1 in the hole, plus `squared` x its mean square, plus `coarse` x L1 of its 4x4 means.

    The means reward the right colour of a region before its detail. H and W must be multiples of 4.

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
    """Return log(mean square in the hole + 2e-4), the mean over samples: -PSNR times ln(10)/10, but for the 2e-4.

    Noisy pictures do not outshout calm ones, as they do in the mean square itself; what is better than 37 dB already
    counts less and less. Arguments as in `hole_loss`.
    """
    square = ((prediction - image) * mask).square().sum(dim=(1, 2, 3)) / (3 * mask.sum(dim=(1, 2, 3))).clamp(min=1)
    return torch.log(square + 2e-4).mean()


def ssim_loss(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Return log(1 - SSIM + 1e-3) of the composite, the mean over samples.

    SSIM as Wang et al. (2004) define it (11x11 Gaussian window of sigma 1.5, K 0.01 and 0.03), the mean over RGB and
    over every other window both ways: less work for nearly the same mean. As in `psnr_loss`, the logarithm makes small
    and large holes count alike. H and W at least 11. Arguments as in `hole_loss`.
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
    """Return L1 outside the hole: the composite never shows it, but it steadies the layers that are shared."""
    known = 1 - mask
    error = ((prediction - image).abs() * known).sum(dim=(1, 2, 3))
    return (error / (3 * known.sum(dim=(1, 2, 3))).clamp(min=1)).mean()


def adversarial_loss(scores: Tensor, real: bool, kind: str = "nsgan", *, for_generator: bool = False) -> Tensor:
    """Return the adversarial loss of a discriminator's raw scores that should say `real`.

    Args:
        scores: any shape.
        real: what the pictures are (discriminator), or shall pass for (generator: True).
        kind: nsgan (logistic, not saturating), lsgan (squares to 1 and 0), hinge.
        for_generator: matters to hinge only, whose generator loss has no hinge.

    """
    scores = scores.float()
    if kind == "nsgan":
        return F.softplus(-scores if real else scores).mean()
    if kind == "lsgan":
        return (scores - float(real)).square().mean()
    if kind == "hinge":
        sign = 1.0 if real else -1.0
        return -sign * scores.mean() if for_generator else F.relu(1 - sign * scores).mean()
    raise ValueError(f"adversarial loss {kind!r}: expected one of {', '.join(ADVERSARIAL)}")


def feature_matching_loss(of_prediction: Sequence[Tensor], of_image: Sequence[Tensor]) -> Tensor:
    """Return the mean over layers of the L1 between the discriminator's features (pix2pixHD, arXiv 1711.11585)."""
    terms = [F.l1_loss(a.float(), b.detach().float()) for a, b in zip(of_prediction, of_image, strict=True)]
    return torch.stack(terms).mean()


VGG19_SOURCE = "torchvision's vgg19-dcbb9e9d.pth (548 MB; torchvision.models.VGG19_Weights.IMAGENET1K_V1.url)"
VGG19_DIGEST = "dcbb9e9d"
"""The first digits of the file's SHA-256, which torchvision puts into its name."""

# Channels of the 16 3x3 convolutions, in five blocks with max-pools between (Simonyan and Zisserman, table 1, E).
_VGG19_BLOCKS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


class Vgg19(nn.Module):
    """The features of VGG-19 that the perceptual and style losses compare. Its weights are never trained."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        self.blocks = nn.ModuleList()
        for block in _VGG19_BLOCKS:
            inputs = (channels, *block)
            self.blocks.append(
                nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(inputs, block, strict=False))
            )
            channels = block[-1]
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the features of PERCEPTUAL_LAYERS and STYLE_LAYERS for N,3,H,W in [0,1], at least 16 pixels a side."""
        x = (x - self.mean) / self.std
        kept = {}
        for number, block in enumerate(self.blocks, 1):
            if number > 1:
                x = F.max_pool2d(x, 2)
            assert isinstance(block, nn.ModuleList)
            for layer, conv in enumerate(block, 1):
                x = F.relu(conv(x))
                name = f"relu{number}_{layer}"
                if name in PERCEPTUAL_LAYERS or name in STYLE_LAYERS:
                    kept[name] = x
                if name == STYLE_LAYERS[-1]:
                    break  # nothing deeper is compared
        return kept


PERCEPTUAL_LAYERS = tuple(f"relu{number}_1" for number in range(1, 6))
STYLE_LAYERS = ("relu2_2", "relu3_4", "relu4_4", "relu5_2")


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


def load_vgg19(path: str | os.PathLike[str]) -> Vgg19:
    """Return VGG-19 with the weights of torchvision's file, which is checked by its digest and never unpickled blindly.

    Raises MisfError when there is no such file or it is another one; the message says where to get it.
    """
    path = Path(path)
    if not path.is_file():
        raise MisfError(f"{path}: no VGG-19 weights there: get {VGG19_SOURCE}, or train without --vgg19")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(VGG19_DIGEST):
        raise MisfError(
            f"{path}: SHA-256 starts with {digest[:8]}, expected {VGG19_DIGEST}: damaged, or another file; "
            f"get {VGG19_SOURCE}"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    vgg = Vgg19()
    vgg.load_state_dict(vgg19_weights(state))
    return vgg.eval()


def vgg19_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return torchvision's VGG-19 state_dict under our names; its classifier is left out.

    There, `features` counts every convolution, ReLU and pool: block 2 starts at index 5, block 3 at 10, and so on.
    """
    weights = {}
    index = 0
    for number, block in enumerate(_VGG19_BLOCKS):
        for layer in range(len(block)):
            for kind in ("weight", "bias"):
                weights[f"blocks.{number}.{layer}.{kind}"] = state[f"features.{index}.{kind}"]
            index += 2
        index += 1
    return weights
