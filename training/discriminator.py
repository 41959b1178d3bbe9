"""The 70x70 patch discriminator (Isola et al., CVPR 2017) with spectral norm, as in MISF."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Five 4x4 convolutions, zero-padded by 1, without bias; each score sees a 70x70 patch.

    Strides 2, 2, 2, 1, 1; channels `width` x 1, 2, 4, 8, then 1; leaky ReLU 0.2 between. Every weight is divided by its
    largest singular value.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = [(3, width, 2), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 1)]
        self.layers = nn.ModuleList(
            _normalized(nn.Conv2d(inputs, outputs, 4, stride, padding=1, bias=False))
            for inputs, outputs, stride in [*sizes, (8 * width, 1, 1)]
        )

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the scores N,1,h,w (no sigmoid; high is real) and the four layers' features before them.

        Args:
            x: N,3,H,W in [0,1], at least 32 pixels high and wide.

        """
        features = []
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.layers[-1](x), features


def _normalized(layer: nn.Conv2d) -> nn.Module:
    nn.init.normal_(layer.weight, std=0.02)
    return spectral_norm(layer)
