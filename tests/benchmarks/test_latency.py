"""The GPU part of benchmarks/latency.py as far as it works on a CPU: on CPU tensors, timed by the clock."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import latency_gpu


def test_ways_take_turns_and_failures_stay_apart(tiny_checkpoint: Path) -> None:
    image, mask = latency_gpu.pictures(64, 80, 2, "cpu")
    assert (image.shape, mask.shape) == ((2, 3, 64, 80), (2, 1, 64, 80))

    def broken(_image: Any, _mask: Any) -> Any:
        raise RuntimeError("no such\nprovider")

    def off_by_a_tenth(image: Any, mask: Any) -> Any:
        right = latency_gpu.torch_ways(tiny_checkpoint, "cpu", False)[0].make(image, mask)
        return lambda: (right() + 0.1).numpy()

    ways = latency_gpu.torch_ways(tiny_checkpoint, "cpu", compiled=False)
    ways += [latency_gpu.Way("broken", broken), latency_gpu.Way("wrong", off_by_a_tenth, events=False)]
    rows = latency_gpu.measure(ways, image, mask, rounds=3, warm_up=1)
    assert list(rows) == [way.name for way in ways]
    assert rows["broken"] == {"failed": "RuntimeError: no such provider"}
    assert rows["wrong"]["psnr_db"] == pytest.approx(20, abs=0.01)
    ours = rows["PyTorch eager fp32, our filter"]
    assert ours["psnr_db"] is None or ours["psnr_db"] > 100
    assert rows[latency_gpu.BASELINE]["times_faster"] == 1
    assert ours["pictures_per_second"] == pytest.approx(2000 / ours["p50_ms"])
    assert ours["p50_ms"] <= ours["p90_ms"] <= ours["p99_ms"]
    text = latency_gpu.table("2 x 64x80", rows, floor=1.0)
    assert {line.count("|") for line in text.splitlines()} == {11}
    assert "not measured: RuntimeError: no such provider" in text


def test_floor_and_halves() -> None:
    assert latency_gpu.floor_ms(512, 256, 4, tflops=261.0) == pytest.approx(8.0)
    image, mask = torch.rand(1, 3, 8, 8), torch.ones(1, 1, 8, 8)
    half, hole = latency_gpu.prepared(image, mask, latency_gpu.Setting(torch.float16, True))
    assert half.dtype == hole.dtype == torch.float16
    assert half.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(half.float().numpy(), image.numpy(), atol=5e-4)
