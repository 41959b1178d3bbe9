"""Muon against PyTorch's, which accepts only matrices and computes in bfloat16; and AdamW beside it."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from misf.training import PRESETS
from misf.training.model.network import InpaintingNetwork
from misf.training.optimizers import BIAS_RATE, Muon, make_optimizers, orthogonalized
from misf.training.recipe import RECIPES


@pytest.mark.parametrize("shape", [(40, 13), (13, 40), (32, 32), (1, 7)])
def test_agrees_with_pytorchs_on_matrices(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = torch.randn(shape, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    muon = Muon([ours], 0.02, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], 0.02, weight_decay=0.1)
    start = ours.detach().clone()
    for _ in range(10):
        gradient = torch.randn(shape) + 1
        ours.grad, theirs.grad = gradient, gradient.clone()
        muon.step()
        reference.step()
    ours, theirs = ours.detach(), theirs.detach()
    moved = (ours - start).norm()
    assert float((ours - theirs).norm() / moved) < 0.01  # bfloat16 has 8 bits


def test_a_convolution_is_the_matrix_of_its_first_dimension_in_any_memory_format() -> None:
    torch.manual_seed(1)
    weight = torch.randn(6, 4, 3, 3)
    gradient = torch.randn(6, 4, 3, 3)
    matrix = weight.flatten(1).clone().requires_grad_()
    matrix.grad = gradient.flatten(1)
    Muon([matrix], 0.1).step()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        parameter = weight.clone(memory_format=memory_format).requires_grad_()
        parameter.grad = gradient.clone(memory_format=memory_format)
        Muon([parameter], 0.1).step()
        torch.testing.assert_close(parameter.flatten(1), matrix)
        assert parameter.is_contiguous(memory_format=memory_format)


def test_orthogonalized_keeps_directions_and_evens_lengths() -> None:
    rng = np.random.default_rng(2)
    left, _, right = np.linalg.svd(rng.normal(size=(20, 8)), full_matrices=False)
    x = left * np.geomspace(1, 0.05, 8) @ right
    found = orthogonalized(torch.from_numpy(x).float()).numpy().astype(np.float64)
    # In the basis of x's singular vectors the result is diagonal, with values near 1.
    inside = left.T @ found @ right.T
    np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-5)
    assert np.diag(inside).min() > 0.6
    assert np.diag(inside).max() < 1.3
    assert not orthogonalized(torch.zeros(3, 2)).any()


def test_every_parameter_has_one_optimizer() -> None:
    network = InpaintingNetwork(PRESETS["misf-tiny"])
    for recipe, count in (("paper", 1), ("fidelity", 2)):
        optimizers = make_optimizers(network, replace(RECIPES[recipe], learning_rate=0.5))
        assert len(optimizers) == count
        held = [id(p) for optimizer, _ in optimizers for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(parameter) for parameter in network.parameters())
    assert [share for _, share in optimizers] == [1.0, BIAS_RATE]
    assert all(parameter.ndim == 4 for parameter in optimizers[0][0].param_groups[0]["params"])


def test_muons_momentum_is_saved_and_restored() -> None:
    torch.manual_seed(3)
    start, gradients = torch.randn(4, 5), torch.randn(6, 4, 5)

    def step(optimizer: Muon, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        weight.grad = gradient.clone()
        optimizer.step()

    straight = start.clone().requires_grad_()
    whole = Muon([straight], 0.1)
    for gradient in gradients[:3]:
        step(whole, straight, gradient)
    resumed = straight.detach().clone().requires_grad_()
    rest = Muon([resumed], 0.7)
    rest.load_state_dict(copy.deepcopy(whole.state_dict()))
    for gradient in gradients[3:]:
        step(whole, straight, gradient)
        step(rest, resumed, gradient)
    assert torch.equal(straight, resumed)
