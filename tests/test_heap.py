"""The heap is trimmed between stages, forward and backward, and numbers stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from misf.training import heap


def test_trims_after_every_forward_and_before_every_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stages = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    stages(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in stages.parameters() if parameter.grad is not None]
    trims: list[int] = []
    monkeypatch.setattr(heap, "trim_heap", lambda *_: trims.append(1))
    heap.keep_heap_small(stages)
    stages.zero_grad()
    loss = stages(x).square().sum()
    assert len(trims) == 2
    loss.backward()
    assert len(trims) == 4
    found = [parameter.grad for parameter in stages.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True) if b is not None)
    with torch.no_grad():
        stages(x)
    assert len(trims) == 6
