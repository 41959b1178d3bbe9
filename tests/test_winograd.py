"""Winograd's convolutions against PyTorch's in float64, alone and in a network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from misf.training import PRESETS, NetworkConfig, winograd
from misf.training.network import InpaintingNetwork, initialize
from misf.training.winograd import WinogradConv2d, use_winograd


def results(conv: nn.Conv2d, x: Tensor, direction: Tensor) -> list[Tensor]:
    """A convolution's answer, and the gradients of its product with `direction`."""
    x = x.detach().requires_grad_()
    answer = conv(x)
    gradients = torch.autograd.grad((answer * direction).sum(), [x, *conv.parameters()])
    return [answer.detach(), *gradients]


@pytest.mark.parametrize("workspace", [1, 1 << 30], ids=["picture by picture", "at once"])
@pytest.mark.parametrize(
    ("inputs", "outputs", "height", "width", "padding", "dilation", "bias"),
    [
        (5, 7, 13, 16, 1, 1, True),
        (3, 4, 20, 23, 0, 2, True),  # a residual block's, padded by reflection
        (4, 4, 23, 9, 2, 2, False),
        (2, 6, 3, 3, 0, 1, True),  # one output pixel
        (130, 140, 8, 8, 1, 1, True),
    ],
)
def test_is_the_direct_convolution(
    inputs: int,
    outputs: int,
    height: int,
    width: int,
    padding: int,
    dilation: int,
    bias: bool,
    workspace: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(winograd, "_WORKSPACE", workspace)
    torch.manual_seed(0)
    ours = WinogradConv2d(inputs, outputs, 3, padding=padding, dilation=dilation, bias=bias)
    exact = nn.Conv2d(inputs, outputs, 3, padding=padding, dilation=dilation, bias=bias).double()
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(3, inputs, height, width).contiguous(memory_format=torch.channels_last)
    direction = torch.randn_like(exact(x.double()))
    for found, expected in zip(results(ours, x, direction.float()), results(exact, x.double(), direction), strict=True):
        error = (found - expected).abs().max() / expected.abs().max()
        assert found.shape == expected.shape
        assert error < 2e-5


def test_only_training_in_float32_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []
    monkeypatch.setattr(winograd._Winograd, "apply", lambda *arguments: taken.append(arguments[0]))
    conv = WinogradConv2d(4, 4, 3, padding=1)
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    assert not taken
    conv(x)
    assert taken == [x]


def test_takes_the_wide_3x3_convolutions_and_keeps_parameters() -> None:
    with torch.device("meta"):
        network, small = InpaintingNetwork(PRESETS["misf"]), InpaintingNetwork(PRESETS["misf-small"])
    names = list(network.state_dict())
    use_winograd(network, 128)
    use_winograd(small, 128)
    taken = [layer for layer in network.modules() if isinstance(layer, WinogradConv2d)]
    assert len(taken) == 30  # 16 in residual blocks, 2 + 3 + 3 down and 3 + 3 up in the prediction branch
    assert list(network.state_dict()) == names
    assert not any(isinstance(layer, WinogradConv2d) for layer in small.modules())


@pytest.mark.parametrize("saving", [False, True], ids=["keeping all", "saving memory"])
def test_a_network_learns_the_same(saving: bool) -> None:
    torch.manual_seed(0)
    config = NetworkConfig(
        width=32, prediction_width=32, prediction_convs=1, residual_dilations=(2, 1), normalize=False
    )
    network = InpaintingNetwork(config)
    initialize(network)
    x = torch.rand(2, 4, 32, 40)
    exact = InpaintingNetwork(config).double()
    exact.load_state_dict(network.state_dict())
    exact.predict(x.double()).square().mean().backward()
    use_winograd(network, 128)
    if saving:
        network.save_memory()
    assert any(isinstance(layer, WinogradConv2d) for layer in network.modules())
    network.predict(x).square().mean().backward()
    for (name, found), expected in zip(network.named_parameters(), exact.parameters(), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        error = (found.grad - expected.grad).norm() / (expected.grad.norm() + 1e-7)
        assert error < 1e-3, name
