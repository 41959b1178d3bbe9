"""benchmarks/fidelity.py writes a table that matches its JSON, and a grid of the photographs."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import skimage.data
from click.testing import CliRunner
from PIL import Image

from ..conftest import load_benchmark


@pytest.fixture(scope="module")
def fidelity() -> ModuleType:
    return load_benchmark("fidelity")


def test_margins_are_over_the_best_other(fidelity: ModuleType) -> None:
    def report(psnr_db: float, ssim: float) -> dict[str, object]:
        return {"bands": {band: {"psnr_db": psnr_db, "ssim": ssim} for band in ("0-20%", "20-40%", "40-60%")}}

    margins = fidelity.margins([report(20.5, 0.7), report(19.0, 0.65), report(18.0, 0.75)])
    assert margins["40-60%"] == {"psnr_db": pytest.approx(1.5), "ssim": pytest.approx(-0.05)}


def test_table_and_grid(fidelity: ModuleType, tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = [
        "--model",
        str(tiny_checkpoint),
        "--name",
        "ours",
        "--per-band",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(fidelity.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "out" / "fidelity.md").read_text()
    assert text.strip() in result.stdout
    report = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert [method["name"] for method in report["methods"]] == ["ours", "telea", "navier-stokes", "biharmonic"]
    for method in report["methods"]:
        row = next(line for line in text.splitlines() if line.startswith(f"| {method['name']} |"))
        assert f"| {method['bands']['20-40%']['psnr_db']:.2f} | {method['bands']['20-40%']['ssim']:.4f} |" in row
    assert str(tmp_path) not in json.dumps(report) + text
    sheet = np.asarray(Image.open(tmp_path / "out" / "fidelity.jpg"), float)
    assert sheet.shape == (26 + 12 * 262 - 6, 4 * 262 - 6, 3)
    photograph = Image.fromarray(skimage.data.astronaut()).resize((256, 256), Image.Resampling.LANCZOS)
    hole, telea, ours, truth = (sheet[288:544, 262 * column : 262 * column + 256] for column in range(4))
    assert np.abs(truth - np.asarray(photograph)).mean() < 2  # JPEG
    hidden = (hole > 250).all(axis=2)
    assert 0.15 < hidden.mean() < 0.6
    for filled in (telea, ours):
        differs = np.abs(filled - truth).max(axis=2) > 60
        assert differs[hidden].mean() > 0.1
        assert differs[~hidden].mean() < 0.05  # JPEG blurs the edge of the hole
