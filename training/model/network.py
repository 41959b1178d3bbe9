"""The MISF generator (Li et al., CVPR 2022, arXiv 2203.06304): picture and mask in, predicted picture out.

It has two branches. The filtering branch encodes the picture, filters its features with separate taps for every pixel,
passes them through residual blocks, decodes them, and filters the resulting picture once more. The prediction branch
predicts the taps of both filters, and uses the filtering branch's features to do so (the paper's interactive link).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...plugins.dynamic_filter.op import dynamic_filter
from .config import NetworkConfig
from .smooth_fill import coarse_fill, completed, enlarge, full_precision, known_colours, refined


class InstanceNorm(nn.Module):
    """Instance norm without weights or running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """Return N,C,H,W, every channel of every picture with mean 0 and variance 1."""
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if x.device.type == "cuda" and last and not torch.is_grad_enabled():
            return norm_in_layout(x)
        return F.instance_norm(x)


def norm_in_layout(x: Tensor) -> Tensor:
    """Return the instance norm of N,C,H,W in the dtype and memory layout of x, without gradients.

    F.instance_norm copies channels-last to NCHW, and the next convolution copies it back. Sums are float32; for 16-bit
    data the error of E[x^2] - E[x]^2 is smaller than the rounding of the data.
    """
    if len(x) == 1:  # equal to batch norm, which keeps the layout and takes two kernels
        return F.batch_norm(x, None, None, training=True)
    if x.dtype == torch.float32:
        variance, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    else:
        mean = x.mean(dim=(2, 3), keepdim=True, dtype=torch.float32)
        square = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=torch.float32).square()
        variance = (square / (x.shape[2] * x.shape[3]) - mean.square()).clamp(min=0)
    scale = torch.rsqrt(variance + 1e-5)
    return torch.addcmul(-mean * scale, x, scale, out=torch.empty_like(x))


class ResidualBlock(nn.Module):
    """Two reflect-padded 3x3 convolutions, with instance norm if `normalize`, added to the input."""

    def __init__(self, channels: int, dilation: int, normalize: bool = True) -> None:
        super().__init__()
        self.dilation = dilation
        self.norm = InstanceNorm() if normalize else nn.Identity()
        self.conv1 = nn.Conv2d(channels, channels, 3, dilation=dilation)
        self.conv2 = nn.Conv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return N,C,H,W of the input's size; H and W must exceed the dilation."""
        y = self.conv1(F.pad(x, (self.dilation,) * 4, mode="reflect"))
        y = self.conv2(F.pad(F.relu(self.norm(y)), (1, 1, 1, 1), mode="reflect"))
        result: Tensor = x + self.norm(y)
        return result


class ConvBlock(nn.Sequential):
    """`count` zero-padded 3x3 convolutions with ReLU, without a norm."""

    def __init__(self, in_channels: int, out_channels: int, count: int) -> None:
        layers: list[nn.Module] = []
        for index in range(count):
            inputs = in_channels if index == 0 else out_channels
            layers += [nn.Conv2d(inputs, out_channels, 3, padding=1), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class JoiningBlock(ConvBlock):
    """A `ConvBlock` on two concatenated feature maps; the second is enlarged `factor` times to match the first."""

    def __init__(self, in_channels: int, out_channels: int, count: int, factor: int) -> None:
        super().__init__(in_channels, out_channels, count)
        self.factor = factor

    def forward(self, x: Tensor, smaller: Tensor) -> Tensor:  # type: ignore[override]
        """Return N,K,H,W for x N,C,H,W and N,D,H/factor,W/factor."""
        y = torch.cat([x, enlarge(smaller, self.factor)], dim=1)
        for layer in self:
            y = layer(y)
        return y


class PredictionBranch(nn.Module):
    """Predicts the taps of both filters: a U-Net without norms, with only the layers that the config's filters need."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width, convs, levels = config.prediction_width, config.prediction_convs, config.prediction_levels
        linked = 2 * width + 2 * config.width  # level 2's output beside the features of the filtering branch
        inputs, outputs = (4, width, linked, 4 * width), (width, 2 * width, 4 * width, 8 * width)
        self.down = nn.ModuleList(ConvBlock(inputs[i], outputs[i], convs) for i in range(levels))
        if config.feature_filter_level:
            seen = (width, linked, 4 * width)[config.feature_filter_level - 1]
            self.feature_taps = nn.Conv2d(seen, config.feature_taps, 1)
        if config.image_filter:
            self.up3 = JoiningBlock(12 * width, 4 * width, convs, 1)
            self.up2 = JoiningBlock(4 * width + linked, 2 * width, convs, 2)
            self.up1 = JoiningBlock(3 * width, width, convs, 2)
            self.image_taps = nn.Conv2d(width, 3 * config.kernel_size**2, 1)

    def image_filter_taps(self, full: Tensor, half: Tensor, quarter: Tensor) -> Tensor:
        """Return the image filter's taps N,3*K*K,H,W from the branch's features at the three resolutions."""
        x = self.up3(quarter, self.down[3](quarter))
        taps: Tensor = self.image_taps(self.up1(full, self.up2(half, x)))
        return taps


class InpaintingNetwork(nn.Module):
    """The generator. `forward` accepts pictures of any size; `predict` is the bare network that the exporter traces."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = InstanceNorm() if config.normalize else nn.Identity()
        width = config.width
        self.stem = nn.Conv2d(4, width, 7)
        self.down = nn.ModuleList(
            [nn.Conv2d(width, 2 * width, 4, 2, padding=1), nn.Conv2d(2 * width, 4 * width, 4, 2, padding=1)]
        )
        self.middle = nn.Sequential(
            *(ResidualBlock(4 * width, dilation, config.normalize) for dilation in config.residual_dilations)
        )
        self.up = nn.ModuleList(
            [
                nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, padding=1),
                nn.ConvTranspose2d(2 * width, width, 4, 2, padding=1),
            ]
        )
        self.head = nn.Conv2d(width, 3, 7)
        self.detail = Detail(width, config.detail) if config.detail else None
        self.prediction = PredictionBranch(config) if config.prediction_levels else None

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the predicted picture, float32 N,3,H,W in [0,1], of any height and width.

        Args:
            image: N,3,H,W float32 RGB in [0,1]; pixels in the hole are never read.
            mask: N,1,H,W float32; values above 0.5 are hole.

        The picture is padded by reflection at the right and bottom to the network's size, and the result cropped.

        """
        height, width = image.shape[2:]
        x = reflect_to(network_input(image, mask), self.config.padded_side(height), self.config.padded_side(width))
        return self.predict(x)[:, :, :height, :width]

    def predict(self, x: Tensor) -> Tensor:
        """Return the predicted picture N,3,H,W in [0,1] for the network input N,4,H,W (see `network_input`).

        H and W must be multiples of `config.multiple` and at least `config.minimum_side`.
        """
        if self.detail is not None:
            return self._detailed(x)
        return (torch.tanh(self.filtered(x)[0]) + 1) / 2

    def _detailed(self, x: Tensor) -> Tensor:
        """Return the prediction N,3,H,W in [0,1] of a network with a detail head.

        The branches work on a smooth fill of the hole at a quarter of the resolution. At half of it the known pixels
        correct their result, and from there the head adds the detail.
        """
        assert self.detail is not None
        with full_precision(x):
            half = F.avg_pool2d(x, 2)
            quarter = F.avg_pool2d(half, 2)
            filled = completed(quarter, coarse_fill(known_colours(quarter)))
        picture, features = self.filtered(torch.cat(filled, dim=1), filled[0])
        with full_precision(x):
            seen, full = refined(x, half, picture.float())
        detailed: Tensor = full[0] + self.detail(features, seen, full)
        return detailed.clamp(0, 1)

    def filtered(self, x: Tensor, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the filtered picture N,3,h,w and the decoder's features N,width,h,w.

        Args:
            x: network input N,4,h,w.
            base: picture N,3,h,w to which the decoder's output is added before the image filter.

        """
        config = self.config
        features = F.relu(self.norm(self.stem(_reflect_border(x, self.stem))))
        seen = [x]
        for level in (1, 2, 3):
            if level > 1:
                features = F.relu(self.norm(self.down[level - 2](features)))
            if self.prediction is None or level > config.prediction_levels:
                continue
            y = self.prediction.down[level - 1](seen[-1] if level == 1 else F.avg_pool2d(seen[-1], 2))
            seen.append(torch.cat([y, features], dim=1) if level == 2 else y)
            if level == config.feature_filter_level:
                taps = self.prediction.feature_taps(seen[-1])
                features = dynamic_filter(features, taps, config.kernel_size, config.share)
        features = self.middle(features)
        for layer in self.up:
            features = F.relu(self.norm(layer(features)))
        picture: Tensor = self.head(_reflect_border(features, self.head))
        if base is not None:
            picture = picture + base
        if self.prediction is not None and config.image_filter:
            picture = dynamic_filter(picture, self.prediction.image_filter_taps(*seen[1:]), config.kernel_size)
        return picture, features


def _reflect_border(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Return x padded by reflection so that `conv` preserves its size."""
    return F.pad(x, (conv.kernel_size[0] // 2,) * 4, mode="reflect")


def network_input(image: Tensor, mask: Tensor) -> Tensor:
    """Return N,4,H,W: the picture N,3,H,W with its holes set to 0, and the mask N,1,H,W as exact 0 and 1."""
    hole = mask > 0.5
    return torch.cat([torch.where(hole, 0.0, image), hole.to(image.dtype)], dim=1)


class Detail(nn.Module):
    """The head that adds detail, from features at a quarter of the resolution over half of it to all of it.

    At half and full resolution its input is the picture as filled so far, the mask, and a fixed plane of noise as a
    source of detail that the surroundings do not determine. It has no layers that work on blocks of pixels (strided or
    transposed convolutions, pixel shuffle), because those cause grid artefacts in large holes.
    """

    NOISE = 128
    """Period of the noise plane in pixels."""

    noise: Tensor

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.at_quarter = nn.Conv2d(width, 2 * channels, 3, padding=1)
        self.half_view = nn.Conv2d(5, 2 * channels, 3, padding=1, bias=False)
        self.at_half = nn.ModuleList(
            [
                nn.Conv2d(2 * channels, 2 * channels, 3, padding=1),
                nn.Conv2d(2 * channels, channels, 3, padding=1),
            ]
        )
        self.full_view = nn.Conv2d(5, channels, 3, padding=1, bias=False)
        self.at_full = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, 3, 1)
        self.register_buffer("noise", _noise(self.NOISE), persistent=False)

    def forward(self, features: Tensor, half: list[Tensor], full: list[Tensor]) -> Tensor:
        """Return the detail to add to the filled picture, N,3,H,W.

        Args:
            features: N,width,H/4,W/4.
            half, full: the picture as filled so far, N,3,h,w, and the mask, N,1,h,w, at half and at full resolution.

        """
        y = enlarge(self.at_quarter(features), 2)
        y = F.relu(self.half_view(self._view(*half)) + y)
        for layer in self.at_half[:-1]:
            y = F.relu(layer(y))
        y = enlarge(self.at_half[-1](y), 2)
        y = F.relu(self.full_view(self._view(*full)) + y)
        result: Tensor = self.last(F.relu(self.at_full(y)))
        return result

    def _view(self, picture: Tensor, mask: Tensor) -> Tensor:
        """Return N,5,h,w: the picture, the mask, and the plane of noise."""
        rows, columns = (torch.arange(side, device=mask.device) % self.NOISE for side in mask.shape[2:])
        plane = self.noise.index_select(2, rows).index_select(3, columns)
        plane = plane + torch.zeros_like(mask)  # `expand` would fix the batch in ONNX exports
        return torch.cat([picture, mask, plane], dim=1)


def _noise(side: int) -> Tensor:
    """Return a plane 1,1,side,side of values in [-1,1], a hash of each pixel's index, the same on every machine."""
    x = torch.arange(1, side * side + 1, dtype=torch.int64, device="cpu")  # the network may be built on meta
    for shift, factor in ((16, 0x45D9F3B), (15, 0x45D9F3B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    return (x.double() / 2**31 - 1).float().reshape(1, 1, side, side)


def composite(image: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    """Return the finished picture N,3,H,W: `prediction` where mask > 0.5, and exactly `image` elsewhere.

    Args:
        image, prediction: N,3,H,W.
        mask: N,1,H,W.

    """
    return torch.where(mask > 0.5, prediction, image)


def reflect_to(x: Tensor, height: int, width: int) -> Tensor:
    """Return x N,C,H,W padded to N,C,height,width by reflection at the right and the bottom.

    Like numpy.pad(mode="reflect"), and unlike PyTorch's, it reflects repeatedly if x is smaller than the border.
    """
    for dim, size in ((2, height), (3, width)):
        if size != x.shape[dim]:
            period = max(2 * (x.shape[dim] - 1), 1)
            position = torch.arange(size, device=x.device) % period
            x = x.index_select(dim, torch.minimum(position, period - position))
    return x


def initialize(network: InpaintingNetwork) -> None:
    """Initialise `network` for training, in place: He-normal convolutions, and filters that are nearly identities.

    The biases of the taps sum to 1 over the predicted channels that hold a channel's centre tap, so that training
    starts from an encoder-decoder whose filters pass everything through.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    config = network.config
    if network.detail is not None:
        nn.init.zeros_(network.head.weight)  # random weights here would train the layers below to output nothing
        nn.init.zeros_(network.detail.last.weight)
    else:
        nn.init.xavier_normal_(network.head.weight)
    if not config.normalize:
        for block in network.middle:
            nn.init.kaiming_normal_(block.conv2.weight, a=2.0)  # type: ignore[union-attr, arg-type]
    if network.prediction is None:
        return
    heads = []
    if config.feature_filter_level:
        heads.append((network.prediction.feature_taps, config.filtered_channels, config.share))
    if config.image_filter:
        heads.append((network.prediction.image_taps, 3, 1))
    area = config.kernel_size**2
    for head, channels, share in heads:
        nn.init.normal_(head.weight, std=1e-3)
        centre = torch.arange(channels) * area + area // 2
        with torch.no_grad():
            head.bias.index_fill_(0, centre // share, 1 / min(share, area))  # type: ignore[union-attr]
