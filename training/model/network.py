"""The MISF generator (Li et al., CVPR 2022, arXiv 2203.06304): picture and mask in, predicted picture out.

Two branches. The filtering branch encodes the picture, filters its features with taps of their own for every pixel,
passes them through residual blocks, decodes, and filters the resulting picture once more. The prediction branch
makes both sets of taps, looking at the filtering branch's features on its way (the paper's interactive link).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...plugins.dynamic_filter.op import dynamic_filter
from .config import NetworkConfig


class InstanceNorm(nn.Module):
    """Instance norm without weights and running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """Return N,C,H,W, every channel of every picture with mean 0 and variance 1."""
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if x.device.type == "cuda" and last and not torch.is_grad_enabled():
            return norm_in_layout(x)
        return F.instance_norm(x)


def norm_in_layout(x: Tensor) -> Tensor:
    """Return the instance norm of N,C,H,W in the dtype and memory layout of x, without gradients.

    F.instance_norm copies channels-last to NCHW, and the next convolution copies it back. Sums are in float32; for
    16-bit data the difference of moments loses less than the data's own rounding.
    """
    if len(x) == 1:  # then it is batch norm, which keeps the layout in two kernels
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
    """`count` zero-padded 3x3 convolutions with ReLU and no norm."""

    def __init__(self, in_channels: int, out_channels: int, count: int) -> None:
        layers: list[nn.Module] = []
        for index in range(count):
            inputs = in_channels if index == 0 else out_channels
            layers += [nn.Conv2d(inputs, out_channels, 3, padding=1), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class JoiningBlock(ConvBlock):
    """A `ConvBlock` on the channels of two feature maps; the second is enlarged `factor` times to fit the first."""

    def __init__(self, in_channels: int, out_channels: int, count: int, factor: int) -> None:
        super().__init__(in_channels, out_channels, count)
        self.factor = factor

    def forward(self, x: Tensor, smaller: Tensor) -> Tensor:  # type: ignore[override]
        """Return N,K,H,W for x N,C,H,W and N,D,H/factor,W/factor."""
        y = torch.cat([x, _enlarge(smaller, self.factor)], dim=1)
        for layer in self:
            y = layer(y)
        return y


class PredictionBranch(nn.Module):
    """Layers that predict the taps of both filters: a U-Net without norm, cut to what the config's filters need."""

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
        """Return the image filter's taps N,3*K*K,H,W from what the branch saw at the three resolutions."""
        x = self.up3(quarter, self.down[3](quarter))
        taps: Tensor = self.image_taps(self.up1(full, self.up2(half, x)))
        return taps


def _enlarge(x: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)


class InpaintingNetwork(nn.Module):
    """The generator. `forward` takes any size; `predict` is the bare network that the exporter traces."""

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
        self.edges = EdgeContinuation() if config.fill_first else None
        self.prediction = PredictionBranch(config) if config.prediction_levels else None

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the predicted picture, float32 N,3,H,W in [0,1], of any height and width.

        Args:
            image: N,3,H,W float32 RGB in [0,1]; what is under the mask is never read.
            mask: N,1,H,W float32, 1 = hole; values above 0.5 count as hole.

        The picture is reflected at its right and bottom edge up to the size the network works at, and cropped back.

        """
        height, width = image.shape[2:]
        x = reflect_to(network_input(image, mask), self.config.padded_side(height), self.config.padded_side(width))
        return self.predict(x)[:, :, :height, :width]

    def predict(self, x: Tensor) -> Tensor:
        """Return the predicted picture N,3,H,W in [0,1] for the network input N,4,H,W (see `network_input`).

        H and W must be multiples of `config.multiple` and at least `config.minimum_side`.
        """
        scale = self.config.scale
        if not self.config.fill_first:
            return (torch.tanh(self.filtered(x)) + 1) / 2
        assert self.edges is not None
        filled = smooth_fill(x)
        y = torch.cat([filled, x[:, 3:]], dim=1)
        if scale > 1:
            y = F.avg_pool2d(y, scale)
        # What the layers change in the filled picture; zero at the start of training.
        change = self.filtered(y, y[:, :3]) - y[:, :3]
        continued: Tensor = self.edges(x, filled + _enlarge(change, scale))
        return continued.clamp(0, 1)

    def filtered(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        """Return what both branches make of N,4,h,w: the picture N,3,h,w, from decoder and `base`, after its filter."""
        config = self.config
        features, seen = F.relu(self.norm(self.stem(_reflect_border(x)))), [x]
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
        picture: Tensor = self.head(_reflect_border(features))
        if base is not None:
            picture = picture + base
        if self.prediction is not None and config.image_filter:
            picture = dynamic_filter(picture, self.prediction.image_filter_taps(*seen[1:]), config.kernel_size)
        return picture


def _reflect_border(x: Tensor) -> Tensor:
    return F.pad(x, (3, 3, 3, 3), mode="reflect")


def network_input(image: Tensor, mask: Tensor) -> Tensor:
    """Return N,4,H,W: the picture with its holes set to 0, and the mask as exact 0 and 1."""
    hole = mask > 0.5
    return torch.cat([torch.where(hole, 0.0, image), hole.to(image.dtype)], dim=1)


def smooth_fill(x: Tensor) -> Tensor:
    """Return the picture N,3,H,W of a network input N,4,H,W with its holes filled by wide to narrow local averages.

    Normalised convolution: every scale averages the known pixels within its reach, and keeps the wider scale's
    estimate where it sees few of them. Wide scales work on a smaller picture. H and W must be multiples of 16.
    """
    known = torch.cat([x[:, :3], 1 - x[:, 3:]], dim=1)
    mean = known.mean(dim=(2, 3), keepdim=True)
    estimate = (mean[:, :3] + 0.5 * _LITTLE) / (mean[:, 3:] + _LITTLE)
    shrunk = [known]
    for _ in _FILL_SIZES[1:]:
        shrunk.append(F.avg_pool2d(shrunk[-1], 2))
    for sizes in _FILL_SIZES:
        smaller = shrunk.pop()
        for size in sizes:
            nearby = _box(_box(smaller, size), size)  # two boxes make a tent: no visible edges
            estimate = (nearby[:, :3] + _PRIOR * estimate) / (nearby[:, 3:] + _PRIOR)
        if shrunk:
            estimate = _enlarge(estimate, 2)
    nearby = _box(known, 3)  # the hole's outermost pixels follow their neighbours
    estimate = (nearby[:, :3] + _EDGE_PRIOR * estimate) / (nearby[:, 3:] + _EDGE_PRIOR)
    return x[:, :3] + x[:, 3:] * estimate


_FILL_SIZES = ((17, 9, 5, 3), (3,), (3,), (3,), (3,))  # at 1/16, 1/8, 1/4, 1/2 and full resolution
_PRIOR, _EDGE_PRIOR = 0.02, 0.1  # the wider estimate counts like this share of known pixels
_LITTLE = 1e-3  # a picture without any known pixel becomes grey


def _box(x: Tensor, size: int) -> Tensor:
    if size == 3:
        return F.avg_pool2d(x, 3, stride=1, padding=1)
    x = F.avg_pool2d(x, (size, 1), stride=1, padding=(size // 2, 0))
    return F.avg_pool2d(x, (1, size), stride=1, padding=(0, size // 2))


class EdgeContinuation(nn.Module):
    """Corrects a prediction near the edges of holes so that it continues the slopes of the known pixels there.

    A plane is fitted around every pixel to the known pixels in reach, by least squares with Gaussian weights; the
    prediction is one more observation in the middle, of weight `prior`, and `ridge` keeps the slope small. That is
    normalised convolution of first order (Knutsson and Westin 1993); no more than the planes' moments are convolved.
    Out of reach of known pixels the prediction stays as it is. Nothing here is trained.
    """

    PLANES = ((7, 1.7, 0.01, 0.7), (5, 0.8, 0.02, 0.4))
    """Size and sigma of the window in pixels, prior, ridge in square pixels; one after the other."""

    def __init__(self) -> None:
        super().__init__()
        for index, (size, sigma, _, _) in enumerate(self.PLANES):
            down, across = _moment_kernels(size, sigma)
            self.register_buffer(f"down{index}", down, persistent=False)
            self.register_buffer(f"across{index}", across, persistent=False)

    def forward(self, x: Tensor, prediction: Tensor) -> Tensor:
        """Return N,3,H,W float32 for a network input N,4,H,W and a prediction N,3,H,W, all on one scale of colours."""
        with torch.autocast(x.device.type, enabled=False):
            known = torch.cat([x[:, :3], 1 - x[:, 3:]], dim=1)
            for index in range(len(self.PLANES)):
                share, rest = self._planes(known, index)
                prediction = share * prediction + rest
            return prediction

    @torch.no_grad()  # nothing here is asked for gradients, and oneDNN has faster convolutions for that
    def _planes(self, known: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Return the planes' values in the middle: share N,1,H,W x the prediction there + rest N,3,H,W."""
        _, _, prior, ridge = self.PLANES[index]
        down, across = self.get_buffer(f"down{index}"), self.get_buffer(f"across{index}")
        side = down.shape[2] // 2
        moments = F.conv2d(F.conv2d(known, down, padding=(side, 0)), across, padding=(0, side))
        total = moments[:, 9:10] + prior
        colour, colour_x, colour_y, _, x1, y1, xx, xy, yy = torch.split(moments / total, [3, 3, 3, 1, 1, 1, 1, 1, 1], 1)
        xx, xy, yy = xx - x1 * x1 + ridge, xy - x1 * y1, yy - y1 * y1 + ridge  # the variances of the positions
        determinant = xx * yy - xy * xy
        along_x, along_y = (yy * x1 - xy * y1) / determinant, (xx * y1 - xy * x1) / determinant
        # The mean of all observations, less the slope times the distance (x1, y1) of their mean position.
        in_mean = 1 + along_x * x1 + along_y * y1
        return prior / total * in_mean, in_mean * colour - along_x * colour_x - along_y * colour_y


def _moment_kernels(size: int, sigma: float) -> tuple[Tensor, Tensor]:
    """Return kernels 9,4,size,1 and 15,9,1,size that, one after the other, make a picture's moments in a window.

    From three colours, 0 where unknown, and 1 where known: the colours, the colours times x, times y, and 1, x, y, xx,
    xy, yy, all times the Gaussian weights, whose sum is 1; x and y count pixels from the middle.
    """
    place = torch.arange(size, dtype=torch.float64, device="cpu") - size // 2  # not meta, whatever the network is on
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


def composite(image: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    """Return the finished picture N,3,H,W: `prediction` where mask > 0.5, elsewhere `image`, bit for bit."""
    return torch.where(mask > 0.5, prediction, image)


def reflect_to(x: Tensor, height: int, width: int) -> Tensor:
    """Return x N,C,H,W continued to the right and to the bottom by reflection, as often as needed.

    Like numpy.pad(mode="reflect"), which, other than torch's, reflects again when a picture is smaller than the border.
    """
    for dim, size in ((2, height), (3, width)):
        if size != x.shape[dim]:
            period = max(2 * (x.shape[dim] - 1), 1)
            position = torch.arange(size, device=x.device) % period
            x = x.index_select(dim, torch.minimum(position, period - position))
    return x


def initialize(network: InpaintingNetwork) -> None:
    """Give `network` weights to train from: He-normal convolutions and filters that start as near-identities, in place.

    The taps' biases give each channel taps that sum to 1 in the predicted channels that hold its centre tap,
    so that training starts from an encoder-decoder whose filters pass everything through.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    config = network.config
    if config.fill_first:
        nn.init.zeros_(network.head.weight)  # noise here would teach the layers below to be silent
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
