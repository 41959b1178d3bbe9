"""The generator's optimizers: AdamW for everything, or Muon for the convolutions and AdamW for their biases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .recipe import Recipe

BIAS_RATE = 0.25
"""AdamW's learning rate as a fraction of Muon's, whose updates are larger (their singular values are near 1)."""


def make_optimizers(module: nn.Module, config: Recipe) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return the optimizers of a network's parameters, each with its factor for the recipe's learning rate."""
    parameters = list(module.parameters())

    def adamw(which: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            which, config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    if config.optimizer == "adamw":
        return [(adamw(parameters), 1.0)]
    weights = [parameter for parameter in parameters if parameter.ndim > 1]
    rest = [parameter for parameter in parameters if parameter.ndim <= 1]
    muon = Muon(weights, config.learning_rate, weight_decay=config.weight_decay)
    return [(muon, 1.0), (adamw(rest), BIAS_RATE)]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for weights with two or more dimensions.

    A weight is seen as a matrix, its first dimension against all others. The update is approximately the orthogonal
    matrix nearest to the momentum: all but the smallest singular values are raised to about 1. torch.optim.Muon, with
    which it agrees on matrices (tests/training/test_optimizers.py), accepts matrices only and computes in bfloat16,
    which takes as long as the network itself on a CPU without bfloat16 instructions.

    Args:
        weights: the parameters to train, each with two or more dimensions.
        lr: the learning rate, multiplied by sqrt(rows / columns) for matrices with more rows than columns.
        momentum: Nesterov momentum.
        weight_decay: decoupled weight decay, as in AdamW.

    """

    def __init__(self, weights: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the weights once; a closure, if given, is called first, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault((weight.shape[0], weight[0].numel()), []).append(weight)
            for (rows, columns), weights in alike.items():
                self._update(weights, group, max(1.0, rows / columns) ** 0.5)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any], scale: float) -> None:
        """Update weights whose matrices have the same shape, all at once: single ones would leave a GPU mostly idle."""
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        means = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, means, group["momentum"])
        changes = orthogonalized(torch.stack([matrix.flatten(1) for matrix in ahead]))
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        steps = [change.reshape(weight.shape) for change, weight in zip(changes, weights, strict=True)]
        torch._foreach_add_(weights, steps, alpha=-group["lr"] * scale)


def orthogonalized(x: Tensor) -> Tensor:
    """Return an approximation of U V^T for x = U S V^T, a matrix or a stack of matrices (..., rows, columns).

    Five Newton-Schulz steps with Jordan's coefficients.
    """
    turned: Tensor = x.mT if x.shape[-2] > x.shape[-1] else x
    y: Tensor = turned / turned.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = 3.4445 * y + (2.0315 * (gram @ gram) - 4.7750 * gram) @ y
    return y.mT if turned is not x else y
