"""The heap is trimmed between stages, forward and backward, and numbers stay as they are."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

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


def vm_rss() -> int:
    """Resident memory in bytes, as the system's status file has it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is trimmed")
def test_trims_what_is_beyond_the_most_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    heap.keep_freed_memory()
    monkeypatch.setattr(heap, "_most_in_use", 0)
    heap.trim_heap()
    before = vm_rss()
    blocks = [torch.ones(1 << 18) for _ in range(200)]  # a megabyte each
    last = torch.ones(1 << 16)  # keeps the heap's end where it is
    assert vm_rss() > before + (150 << 20)
    del blocks
    monkeypatch.setattr(heap, "_most_in_use", before + (500 << 20))
    heap.trim_heap()
    assert vm_rss() > before + (150 << 20)
    monkeypatch.setattr(heap, "_most_in_use", 0)
    heap.trim_heap()
    assert vm_rss() < before + (50 << 20)
    assert abs(heap.resident() - vm_rss()) < 8 << 20
    assert last.sum() == 1 << 16


@pytest.mark.parametrize(("set_already", "expected"), [({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")])
def test_huge_pages_are_a_default_that_the_environment_overrules(
    set_already: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(set_already))
    heap.prefer_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == expected


@pytest.mark.parametrize(("flags", "expected"), [([], None), (["--save-memory"], "1")])
def test_training_asks_for_huge_pages_before_any_tensor(flags: list[str], expected: str | None, tmp_path: Path) -> None:
    # Importing lightning_fabric makes a tensor already, and PyTorch reads the variable once.
    report = "f\"{'lightning_fabric' in sys.modules} {os.environ.get('THP_MEM_ALLOC_ENABLE')}\""
    program = f"import os, sys; from misf.training import cli; cli._settings = lambda _: sys.exit({report}); cli.main()"
    command = [sys.executable, "-c", program, "--data", str(tmp_path), "--output", str(tmp_path / "run"), *flags]
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == f"False {expected}"
