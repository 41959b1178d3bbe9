"""The network that comes with misf: its ONNX file equals a fresh export, and its name stands for its files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from misf.plugins.shared.shipped import SHIPPED, shipped_checkpoint, shipped_model
from misf.runtime import Inpainter

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "runtime/samples/astronaut.jpg"
MASK = ROOT / "runtime/samples/masks/astronaut.png"


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_file_is_what_an_export_makes(name: str, tmp_path: Path) -> None:
    """Every node, and every weight bit for bit. To update the file:

    misf-export --checkpoint misf-small --fp16 -o runtime/models/misf-small.onnx
    """
    from misf.export.exporter import export_onnx
    from misf.training.model.checkpoint import load_checkpoint

    export_onnx(load_checkpoint(name), tmp_path / "fresh.onnx", "fp16")
    shipped, fresh = onnx.load(shipped_model(name)), onnx.load(tmp_path / "fresh.onnx")
    assert {entry.key: entry.value for entry in shipped.metadata_props} == {
        entry.key: entry.value for entry in fresh.metadata_props
    }
    assert [node.op_type for node in shipped.graph.node] == [node.op_type for node in fresh.graph.node]
    assert len(shipped.graph.initializer) == len(fresh.graph.initializer)
    for ours, theirs in zip(shipped.graph.initializer, fresh.graph.initializer, strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(ours), onnx.numpy_helper.to_array(theirs))


def test_a_picture_is_filled_by_name_without_pytorch(tmp_path: Path) -> None:
    """In a process that cannot import torch; the astronaut's known pixels stay, and the hole is not black."""
    code = f"""
import sys
sys.modules["torch"] = None
from misf.runtime.run_cli import main
main(["misf-small", {str(PICTURE)!r}, {str(MASK)!r}, "-o", "filled.png", "--backend", "onnxruntime", "--json"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout)["working_size"] == 512
    before, after = (np.asarray(Image.open(path).convert("RGB")) for path in (PICTURE, tmp_path / "filled.png"))
    hole = np.asarray(Image.open(MASK).convert("L")) > 127
    np.testing.assert_array_equal(after[~hole], before[~hole])
    assert np.abs(after[hole].astype(float) - before[hole]).mean() < 30  # 64 for the known pixels' mean colour


@pytest.mark.parametrize("noise", [0, 25], ids=["flat", "noisy"])
def test_fills_have_the_colours_of_their_surroundings(noise: int) -> None:
    """Within 4 of 255 on average, in large holes too, and in flat pictures nearly flat: without a cast or a pattern."""
    rng = np.random.default_rng(0)
    inpaint = Inpainter("misf-small", backend="onnxruntime")
    mask = np.zeros((320, 320), np.uint8)
    mask[60:250, 80:280] = mask[10:40, 20:300] = 255
    for colour in ((0, 0, 0), (128, 128, 128), (255, 255, 255), (200, 60, 40), (30, 120, 220), (20, 60, 30)):
        picture = np.clip(rng.normal(colour, noise, (320, 320, 3)), 0, 255).round().astype(np.uint8)
        fill = inpaint(picture, mask)[mask > 0].astype(float)
        assert np.abs(fill.mean(axis=0) - picture[mask == 0].mean(axis=0)).max() < 4, colour
        assert fill.std(axis=0).max() < max(noise, 6), colour


def test_the_api_takes_the_name_and_the_networks_working_size(tiny_onnx: Path) -> None:
    assert Inpainter("misf-small", backend="onnxruntime").settings.working_size == 512
    assert Inpainter(tiny_onnx, backend="onnxruntime").settings.working_size == 256
    assert Inpainter(tiny_onnx, backend="onnxruntime", working_size=300).settings.working_size == 300
    assert shipped_checkpoint("misf-small").is_file()
    with pytest.raises(ValueError, match="or the name misf-small"):
        Inpainter("misf-large")


def test_exports_of_a_shipped_network_go_to_the_working_folder(tmp_path: Path, monkeypatch: Any) -> None:
    from click.testing import CliRunner

    from misf.export import export_cli

    written = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export_cli, "_export", lambda *arguments: written.append(arguments[2]) or sys.exit(7))
    assert CliRunner().invoke(export_cli.main, ["--checkpoint", "misf-small", "--fp16"]).exit_code == 7
    assert [path.resolve() for path in written] == [tmp_path / "misf-small_fp16.onnx"]


def test_nothing_is_resized_to_the_size_that_it_has(tiny_onnx: Path) -> None:
    """The taps' decoder enlarges twice; its third stage is at one resolution."""
    assert [node.op_type for node in onnx.load(tiny_onnx).graph.node].count("Resize") == 2
