"""The network against the official generator's stored outputs, and its behaviour at awkward sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch

from misf.training import PRESETS, NetworkConfig, load_model
from misf.training.model.network import (
    InpaintingNetwork,
    InstanceNorm,
    composite,
    initialize,
    network_input,
    norm_in_layout,
    reflect_to,
)
from misf.training.model.smooth_fill import coarse_fill

from .golden.make_official import GOLDEN, official_weights, picture_and_mask, stored

TINY = PRESETS["misf-tiny"]


def tiny_network(config: NetworkConfig = TINY) -> InpaintingNetwork:
    torch.manual_seed(0)
    network = InpaintingNetwork(config).eval()
    initialize(network)
    return network


@pytest.fixture(scope="module")
def official_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator file in the official code's format, with the weights of make_official.py."""
    with np.load(GOLDEN) as golden:
        shapes = {
            str(name): tuple(int(side) for side in shape if side)
            for name, shape in zip(golden["names"], golden["shapes"], strict=True)
        }
    path = tmp_path_factory.mktemp("official") / "places2_InpaintingModel_gen.pth"
    torch.save({"iteration": 1234, "generator": official_weights(shapes)}, path)
    return path


def test_agrees_with_the_official_generator(official_file: Path) -> None:
    network = load_model(official_file)
    picture, mask = picture_and_mask()
    with torch.inference_mode():
        answer = stored(network(picture, mask))
    with np.load(GOLDEN) as golden:
        for part, value in answer.items():
            assert golden[part].std() > 0.1, "the golden picture must not be flat"
            np.testing.assert_allclose(value, golden[part], rtol=0, atol=1e-5)


def test_published_sizes() -> None:
    with torch.device("meta"):
        network = InpaintingNetwork(PRESETS["misf"])
    # conv_final, 327 parameters, is in the official files but not used in the forward pass.
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_059_493 - 327


DETAILED = replace(TINY, detail=8, normalize=False)


@pytest.mark.parametrize("config", [TINY, DETAILED], ids=["tiny", "detailed"])
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (5, 7), (57, 91), (64, 48)])
def test_any_size(size: tuple[int, int], config: NetworkConfig) -> None:
    network = tiny_network(config)
    image, mask = torch.rand(2, 3, *size), (torch.rand(2, 1, *size) > 0.7).float()
    with torch.inference_mode():
        prediction = network(image, mask)
        assert prediction.shape == image.shape
        assert 0 <= prediction.min() <= prediction.max() <= 1
        # The same, computed step by step with NumPy's reflection.
        border = [(0, 0), (0, 0)] + [(0, config.padded_side(side) - side) for side in size]
        padded = torch.from_numpy(np.pad(network_input(image, mask).numpy(), border, mode="reflect"))
        expected = network.predict(padded)[:, :, : size[0], : size[1]]
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "target"), [((1, 1), (4, 4)), ((2, 3), (16, 20)), ((5, 4), (8, 4))])
def test_reflection_is_numpys(size: tuple[int, int], target: tuple[int, int]) -> None:
    x = torch.rand(1, 2, *size)
    border = [(0, 0), (0, 0), (0, target[0] - size[0]), (0, target[1] - size[1])]
    assert np.array_equal(reflect_to(x, *target).numpy(), np.pad(x.numpy(), border, mode="reflect"))


def test_sizes_that_the_fill_and_the_layers_need() -> None:
    assert [config.multiple for config in (TINY, DETAILED)] == [4, 16]
    # Reflection by 2, which is the dilation, needs 3 pixels at a quarter of the layers' resolution.
    assert [config.minimum_side for config in (TINY, DETAILED)] == [12, 48]


def numpy_fill(known: np.ndarray) -> np.ndarray:
    """Return the smooth fill by definition, H,W,4 -> H,W,3, with SciPy's box filters and averages of 2x2 pixels."""

    def tent(pixels: np.ndarray, size: int) -> np.ndarray:
        for _ in range(2):
            for axis in (0, 1):
                pixels = scipy.ndimage.uniform_filter1d(pixels, size, axis=axis, mode="constant")
        return pixels

    def half(pixels: np.ndarray) -> np.ndarray:
        height, width, channels = pixels.shape
        return pixels.reshape(height // 2, 2, width // 2, 2, channels).mean(axis=(1, 3))

    def twice(pixels: np.ndarray) -> np.ndarray:
        """Enlarge bilinearly: a pixel is 3/4 of the small pixel that contains it and 1/4 of the nearest neighbour."""
        for axis in (0, 1):
            edge = np.pad(pixels, [(1, 1) if axis == a else (0, 0) for a in range(3)], mode="edge")
            here = np.take(edge, range(1, edge.shape[axis] - 1), axis)
            before, after = (np.take(edge, np.arange(start, start + here.shape[axis]), axis) for start in (0, 2))
            pair = np.stack([0.75 * here + 0.25 * before, 0.75 * here + 0.25 * after], axis=axis + 1)
            pixels = pair.reshape([2 * n if a == axis else n for a, n in enumerate(pixels.shape)])
        return pixels

    levels = [known, half(known), half(half(known))]
    mean = known.mean(axis=(0, 1))
    estimate = (mean[:3] + 0.0005) / (mean[3:] + 0.001)
    for level in (2, 1, 0):
        for size in (17, 9, 5, 3) if level == 2 else (3,):
            nearby = tent(levels[level], size)
            estimate = (nearby[:, :, :3] + 0.02 * estimate) / (nearby[:, :, 3:] + 0.02)
        estimate = twice(estimate) if level else estimate
    return estimate


@pytest.mark.parametrize("size", [(4, 4), (48, 80)])
def test_the_fill_is_its_definition(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    fraction = rng.random((*size, 1))  # at a lower resolution pixels are partly known
    fraction[1:12, 2:] = 0
    known = np.concatenate([rng.random((*size, 3)) * fraction, fraction], axis=2)
    found = coarse_fill(torch.from_numpy(known.transpose(2, 0, 1))[None])[0].numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(found, numpy_fill(known), rtol=0, atol=1e-9)


def test_an_untrained_network_with_a_head_continues_colours_without_a_cast() -> None:
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 10:50, 20:90] = 1
    colour = torch.tensor([0.2, 0.9, 0.5]).view(1, 3, 1, 1).expand(1, 3, 64, 96)
    network = tiny_network(replace(DETAILED, image_filter=False))  # its random taps would change the brightness
    with torch.inference_mode():
        torch.testing.assert_close(network(colour, mask), colour, rtol=0, atol=2e-3)
        assert torch.equal(network(colour, torch.ones_like(mask)), torch.full_like(colour, 0.5))


def test_a_detail_of_one_colour_is_noise_and_the_same_in_every_batch() -> None:
    network = tiny_network(DETAILED)
    assert network.detail is not None
    torch.nn.init.normal_(network.detail.last.weight, std=0.01)  # zero in an untrained network
    image, mask = torch.full((2, 3, 192, 256), 0.5), torch.ones(2, 1, 192, 256)
    mask[..., :16, :] = 0
    with torch.inference_mode():
        first = network(image, mask)
        torch.testing.assert_close(network(image[:1], mask[:1]), first[:1], rtol=0, atol=1e-5)
    assert first[0, :, 80:160, 64:192].std() > 1e-4, "noise is the only source of detail here"
    assert torch.equal(first[0], first[1])


@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_is_its_definition(training: bool) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 5, 7, 9) + 10).requires_grad_()
    direction = torch.randn(2, 5, 7, 9)
    exact = x.detach().double().requires_grad_()
    variance, mean = torch.var_mean(exact, dim=(2, 3), correction=0, keepdim=True)
    expected = (exact - mean) / (variance + 1e-5).sqrt()
    found = InstanceNorm().train(training)(x)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("pictures", "dtype", "tolerance"),
    [(1, torch.float32, 5e-5), (3, torch.float32, 5e-5), (3, torch.float16, 2e-3), (3, torch.bfloat16, 1.6e-2)],
    ids=str,  # a single 16-bit picture goes to PyTorch's batch norm, whose CPU kernel rounds more than CUDA's
)
def test_instance_norm_in_its_layout(pictures: int, dtype: torch.dtype, tolerance: float) -> None:
    """The instance norm for channels-last on CUDA, against the definition in float64; one channel is constant."""
    torch.manual_seed(0)
    x = (torch.randn(pictures, 6, 9, 7) * torch.tensor([3, 1, 0.1, 20, 1, 1])[:, None, None] + 5).to(dtype)
    x[:, 4] = 5
    x = x.contiguous(memory_format=torch.channels_last)
    variance, mean = torch.var_mean(x.double(), dim=(2, 3), correction=0, keepdim=True)
    expected = (x.double() - mean) / (variance + 1e-5).sqrt()
    found = norm_in_layout(x)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_what_is_under_the_mask_is_never_read() -> None:
    network = tiny_network()
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:20, 8:20] = 1
    image = torch.rand(1, 3, 32, 32)
    other = torch.where(mask > 0.5, torch.nan, image)
    with torch.inference_mode():
        assert torch.equal(network(image, mask), network(other, mask))
        assert torch.equal(composite(image, network(image, mask), mask), composite(other, network(other, mask), mask))


def test_batch_members_do_not_see_each_other() -> None:
    network = tiny_network()
    image, mask = torch.rand(3, 3, 32, 36), (torch.rand(3, 1, 32, 36) > 0.6).float()
    with torch.inference_mode():
        together, alone = network(image, mask), network(image[1:2], mask[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)


ABLATIONS = {
    "none": {"feature_filter_level": 0, "image_filter": False},
    "image": {"feature_filter_level": 0},
    "level 1": {"feature_filter_level": 1, "image_filter": False},
    "level 2": {"feature_filter_level": 2, "image_filter": False},
    "level 3": {"feature_filter_level": 3, "image_filter": False},
    "both, level 2": {"feature_filter_level": 2},
    "5 x 5": {"kernel_size": 5, "share": 5},
}


@pytest.mark.parametrize("change", ABLATIONS.values(), ids=ABLATIONS)
def test_ablations_use_every_parameter(change: dict[str, int | bool]) -> None:
    config = replace(TINY, **change)  # type: ignore[arg-type]
    network = tiny_network(config).train()
    assert (network.prediction is None) == (change == ABLATIONS["none"])
    network(torch.rand(1, 3, 32, 32), (torch.rand(1, 1, 32, 32) > 0.5).float()).square().mean().backward()
    unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert unused == []


def test_fresh_filters_keep_the_mean() -> None:
    """The initial taps of every channel sum to 1, up to the small random part."""
    network = tiny_network()
    assert network.prediction is not None
    k2, share = TINY.kernel_size**2, TINY.share
    bias = network.prediction.feature_taps.bias.detach().numpy()
    taps = np.repeat(bias, share).reshape(TINY.filtered_channels, k2)
    assert np.allclose(taps.mean(), 1 / k2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "object"),
        ("{", "must be JSON"),
        ('{"width": 64, "depth": 3}', "unknown network config keys depth"),
        ('{"width": 1e9}', "whole numbers"),
        ('{"width": 100000}', "1..1024"),
        ('{"width": "64"}', "fit|whole"),
        ('{"kernel_size": 4}', "odd"),
        ('{"share": 5, "width": 8}', "share must divide"),
        ('{"residual_dilations": 3}', "fit"),
    ],
)
def test_config_from_a_file_is_checked(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkConfig.from_json(text)


def test_config_round_trip() -> None:
    config = replace(TINY, residual_dilations=(1, 2, 8), image_filter=False)
    assert NetworkConfig.from_json(config.to_json()) == config
    assert config.minimum_side == 36
