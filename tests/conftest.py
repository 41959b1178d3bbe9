"""Shared by all tests: small networks, and the tolerance of each dtype."""

from __future__ import annotations

import importlib.util
import json
import os
import sys

# Before torch is imported: the suite often shares its two cores with other work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:  # noqa: ARG001
    gpu = _has_gpu()
    for item in items:
        if "gpu" in item.keywords and not gpu:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def load_benchmark(name: str) -> ModuleType:
    """Return benchmarks/NAME.py as a module; the scripts are not installed."""
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded by the test's name: the same values whichever tests run before it, or without it."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A misf-tiny checkpoint whose random weights make lively pictures."""
    import torch

    from misf.training import PRESETS
    from misf.training.model.checkpoint import save_checkpoint
    from misf.training.model.network import InpaintingNetwork, initialize

    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    network = InpaintingNetwork(PRESETS["misf-tiny"])
    initialize(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    torch.random.set_rng_state(generator)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    save_checkpoint(path, network.config, network.state_dict(), iteration=5)
    return path


@pytest.fixture(scope="session")
def tiny_onnx(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an ONNX file, float32."""
    pytest.importorskip("onnxscript")
    from misf.export.exporter import export_onnx
    from misf.training.model.checkpoint import load_checkpoint

    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    export_onnx(load_checkpoint(tiny_checkpoint), path)
    return path


@pytest.fixture(scope="session")
def tiny_fp16(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The same as an ONNX file by misf-export --fp16, and its report."""
    pytest.importorskip("onnxscript")
    from misf.export.export_cli import main

    path = tmp_path_factory.mktemp("onnx") / "half.onnx"
    result = CliRunner().invoke(main, ["--checkpoint", str(tiny_checkpoint), "--fp16", "-o", str(path), "--json"])
    assert result.exit_code == 0, result.output
    return path, json.loads(result.stdout)


@pytest.fixture(scope="session")
def tiny_plan(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an engine of TensorRT for RTX, really built, for 1 to 2 pictures of 32x40 to 96x128."""
    pytest.importorskip("tensorrt_rtx")
    from misf.export.engine.builder import EngineOptions, build_engine
    from misf.runtime.engines.side_car import Limits

    path = tmp_path_factory.mktemp("engine") / "tiny.plan"
    limits = Limits((1, 32, 40), (2, 64, 64), (2, 96, 128))
    build_engine(tiny_onnx, path, EngineOptions(backend="tensorrt-rtx", limits=limits))
    return path
