"""Losses and discriminator against plain formulas in NumPy and PyTorch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional as F

from misf.plugins.shared.errors import MisfError
from misf.training import losses, vgg19
from misf.training.discriminator import PatchDiscriminator


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A prediction, a picture, and masks of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    prediction, image = torch.rand(2, 3, 3, 16, 24, generator=generator, dtype=torch.float64)
    mask = torch.zeros(3, 1, 16, 24, dtype=torch.float64)
    mask[0, :, 2:3, 5] = 1
    mask[1, :, :9] = 1
    mask[2] = 1
    return prediction, image, mask


def test_l1_over_mask_is_the_papers_for_one_sample_and_the_mean_for_several() -> None:
    prediction, image, mask = batch()
    expected = [
        float(np.abs(p - i).mean() / m.mean())
        for p, i, m in zip(*map(Tensor.numpy, (prediction, image, mask)), strict=True)
    ]
    assert expected[0] > 100 * expected[2]  # a hole of one pixel counts as much as a full one: 384 times
    assert float(losses.l1_over_mask(prediction, image, mask)) == pytest.approx(np.mean(expected))


def test_hole_loss_is_its_formula() -> None:
    prediction, image, mask = batch()
    expected = []
    for p, i, m in zip(*map(Tensor.numpy, (prediction, image, mask)), strict=True):
        hole = np.broadcast_to(m > 0.5, p.shape)
        l1, l2 = np.abs(p - i)[hole].mean(), np.square(p - i)[hole].mean()
        blocks = np.where(hole, p - i, 0).reshape(3, 4, 4, 6, 4).mean(axis=(2, 4))
        expected.append(l1 + 2 * l2 + 0.25 * np.abs(blocks).sum() * 16 / hole.sum())
    found = losses.hole_loss(prediction, image, mask, squared=2, coarse=0.25)
    assert float(found) == pytest.approx(np.mean(expected))


def test_hole_and_known_losses_look_only_where_they_say() -> None:
    prediction, image, mask = batch()
    elsewhere = torch.where(mask > 0.5, prediction, torch.rand_like(prediction))
    assert float(losses.hole_loss(elsewhere, image, mask)) == float(losses.hole_loss(prediction, image, mask))
    inside = torch.where(mask > 0.5, torch.rand_like(prediction), prediction)
    assert float(losses.known_loss(inside, image, mask)) == float(losses.known_loss(prediction, image, mask))
    known = [np.abs(p - i)[:, m[0] == 0].mean() for p, i, m in zip(*(x[:2].numpy() for x in batch()), strict=True)]
    assert float(losses.known_loss(prediction, image, mask)) == pytest.approx((known[0] + known[1] + 0) / 3)


def test_psnr_loss_is_minus_the_mean_psnr() -> None:
    prediction, image, mask = batch()
    expected = []
    for p, i, m in zip(*map(Tensor.numpy, (prediction, image, mask)), strict=True):
        expected.append(np.square(p - i)[:, m[0] > 0.5].mean())
    psnr_db = -10 * np.log10(expected).mean()
    assert float(losses.psnr_loss(prediction, image, mask)) == pytest.approx(-psnr_db * np.log(10) / 10, rel=1e-2)
    exact = np.log(np.array(expected) + 2e-4).mean()
    assert float(losses.psnr_loss(prediction, image, mask)) == pytest.approx(exact)


def test_ssim_loss_is_scikit_images_on_the_composite() -> None:
    prediction, image, mask = batch()
    expected = []
    for p, i, m in zip(*map(Tensor.numpy, (prediction, image, mask)), strict=True):
        _, similarity = structural_similarity(
            i,
            np.where(m > 0.5, p, i),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            use_sample_covariance=False,
            full=True,
        )
        expected.append(similarity[:, 5:-5:2, 5:-5:2].mean())  # every other window that fits
    exact = np.log(1 - np.array(expected) + 1e-3).mean()
    assert float(losses.ssim_loss(prediction, image, mask)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("period", [4, 8, 16])
def test_grid_loss_is_the_energy_of_the_means_by_position(period: int) -> None:
    """Of white noise, 1/16 on average in either part; a grid of any period that divides 16 adds all of its energy."""
    generator = torch.Generator().manual_seed(0)
    cells = (144 // period, 160 // period)
    noise = torch.randn(1, 3, 144, 160, generator=generator)
    cell = torch.randn(1, 3, period, period, generator=generator)
    grid = cell.repeat(1, 1, *cells)
    signs = torch.randint(0, 2, cells, generator=generator) * 2.0 - 1
    strokes = (cell.abs() > 1.5).float().repeat(1, 1, *cells) * torch.kron(signs, torch.ones(period, period))
    mask = torch.zeros(1, 1, 144, 160)
    mask[..., 16:144, 16:144] = 1
    without = 2 / 16
    assert float(losses.grid_loss(noise, mask)) == pytest.approx(without, abs=0.03)
    assert float(losses.grid_loss(grid, mask)) == pytest.approx(2, abs=0.05)
    assert float(losses.grid_loss(noise + grid, mask)) > 3 * without
    assert float(losses.grid_loss(noise / 4 + strokes, mask)) > 2 * without
    assert float(losses.grid_loss(grid[..., :60, :], mask[..., :60, :])) == 0
    flat = torch.full_like(noise, 0.5, requires_grad=True)
    losses.grid_loss(flat, mask).backward()
    assert flat.grad is not None
    assert torch.isfinite(flat.grad).all()


@pytest.mark.parametrize("name", ["l1_over_mask", "hole_loss", "psnr_loss", "ssim_loss", "known_loss"])
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_empty_and_full_masks_give_numbers_and_gradients(name: str, fill: float) -> None:
    prediction, image, mask = batch()
    prediction.requires_grad_()
    loss = getattr(losses, name)(prediction, image, torch.full_like(mask, fill))
    loss.backward()
    assert prediction.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(prediction.grad).all()


def test_adversarial_losses_are_their_papers() -> None:
    scores = torch.tensor([-3.0, -0.2, 0.4, 2.0])
    ones, zeros = torch.ones(4), torch.zeros(4)
    expected = {
        ("nsgan", True, False): F.binary_cross_entropy_with_logits(scores, ones),
        ("nsgan", False, False): F.binary_cross_entropy_with_logits(scores, zeros),
        ("nsgan", True, True): F.binary_cross_entropy_with_logits(scores, ones),
        ("lsgan", True, False): F.mse_loss(scores, ones),
        ("lsgan", False, False): F.mse_loss(scores, zeros),
        ("lsgan", True, True): F.mse_loss(scores, ones),
        ("hinge", True, False): torch.tensor([4.0, 1.2, 0.6, 0.0]).mean(),
        ("hinge", False, False): torch.tensor([0.0, 0.8, 1.4, 3.0]).mean(),
        ("hinge", True, True): torch.tensor([3.0, 0.2, -0.4, -2.0]).mean(),
    }
    for (kind, real, for_generator), value in expected.items():
        found = losses.adversarial_loss(scores, real, kind, for_generator=for_generator)
        torch.testing.assert_close(found, value, msg=f"{kind} {real} {for_generator}")
    assert torch.isfinite(losses.adversarial_loss(torch.tensor([-1e4, 1e4]), True))  # no log of 0
    with pytest.raises(ValueError, match="nsgan, lsgan, hinge"):
        losses.adversarial_loss(scores, True, "wgan")


def test_gram_is_its_formula() -> None:
    features = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = np.einsum("nchw,ndhw->ncd", features.numpy(), features.numpy()) / (3 * 4 * 5)
    np.testing.assert_allclose(losses.gram(features).numpy(), expected, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses.gram(features.bfloat16()).dtype == torch.float32


def torchvision_state() -> dict[str, Tensor]:
    """Return small random weights with the names and shapes of torchvision's vgg19 (configuration "E", by index)."""
    generator = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128)}
    shapes |= dict.fromkeys((12, 14, 16), (256, 256)) | {19: (512, 256)}
    shapes |= dict.fromkeys((21, 23, 25, 28, 30, 32, 34), (512, 512))
    state = {"classifier.0.weight": torch.zeros(1)}
    for index, (outputs, inputs) in shapes.items():
        scale = (2 / (9 * inputs)) ** 0.5
        state[f"features.{index}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * scale
        state[f"features.{index}.bias"] = torch.randn(outputs, generator=generator) * 0.1
    return state


def test_vgg19_features_are_those_of_torchvisions_layers() -> None:
    state = torchvision_state()
    vgg = vgg19.Vgg19()
    vgg.load_state_dict(vgg19.vgg19_weights(state))
    image = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    x = (image - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    # In torchvision's features, a convolution with its ReLU takes two indices and a pool one.
    outputs = {}
    for index in range(36):
        if index in (4, 9, 18, 27):
            x = F.max_pool2d(x, 2)
        elif f"features.{index}.weight" in state:
            x = F.relu(F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1))
            outputs[index + 1] = x
    expected = {"relu1_1": 1, "relu2_1": 6, "relu3_1": 11, "relu4_1": 20, "relu5_1": 29}
    expected |= {"relu2_2": 8, "relu3_4": 17, "relu4_4": 26, "relu5_2": 31}
    found = vgg(image)
    assert set(found) == set(expected)
    for name, index in expected.items():
        torch.testing.assert_close(found[name], outputs[index], msg=name)
    same = vgg(image.clone())
    assert float(losses.perceptual_loss(found, same)) == float(losses.style_loss(found, same)) == 0
    other = vgg(image.flip(3))
    by_hand = sum(float((found[f"relu{n}_1"] - other[f"relu{n}_1"]).abs().mean()) for n in range(1, 6))
    assert float(losses.perceptual_loss(found, other)) == pytest.approx(by_hand, rel=1e-5)
    assert float(losses.style_loss(found, other)) > 0


def test_vgg19_file_is_checked_by_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisfError, match=r"vgg19-dcbb9e9d\.pth"):
        vgg19.load_vgg19(tmp_path / "missing.pth")
    path = tmp_path / "vgg19.pth"
    torch.save(torchvision_state(), path)
    with pytest.raises(MisfError, match=r"is damaged or another file: .* expected dcbb9e9d"):
        vgg19.load_vgg19(path)
    monkeypatch.setattr(vgg19, "VGG19_DIGEST", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    vgg = vgg19.load_vgg19(path)
    assert not any(parameter.requires_grad for parameter in vgg.parameters())


def test_discriminator_sees_70_pixels_and_has_unit_norms() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(width=8)
    image = torch.rand(1, 3, 160, 128, requires_grad=True)
    for _ in range(30):  # the power iteration needs some steps to find the largest singular value
        scores, features = judge(image)
    assert scores.shape == (1, 1, 18, 14)
    assert [layer.shape[1] for layer in features] == [8, 16, 32, 64]
    scores[0, 0, 9, 7].backward()
    assert image.grad is not None
    rows = image.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70
    judge.eval()
    for layer in judge.requires_grad_(False).layers:
        assert float(torch.linalg.matrix_norm(layer.weight.flatten(1), 2)) == pytest.approx(1, abs=0.05)


def test_feature_matching_reaches_only_the_prediction() -> None:
    a, b = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    loss = losses.feature_matching_loss([a, a * 2], [b, b * 2])
    assert loss.item() == pytest.approx(1.5 * (a - b).abs().mean().item())
    loss.backward()
    assert a.grad is not None
    assert b.grad is None
