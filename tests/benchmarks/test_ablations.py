"""benchmarks/ablations.py: it trains runs, resumes them, and makes the table from them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("lightning_fabric")

from misf.runtime.checks.accuracy import SAMPLES
from misf.training.dataset import Pictures
from misf.training.judging.evaluate import Method, cases, evaluate, model_fill
from misf.training.model.checkpoint import load_checkpoint

from ..conftest import load_benchmark


@pytest.fixture(scope="module")
def ablations() -> ModuleType:
    return load_benchmark("ablations")


@pytest.mark.slow
def test_table_of_two_variants(ablations: ModuleType, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with Image.open(SAMPLES / "coffee.jpg") as picture:
        picture.convert("RGB").resize((300, 280)).save(data / "coffee.png")
    arguments = ["--data", data, "--val", data, "--runs", tmp_path / "runs", "--output", tmp_path / "out"]
    arguments += ["--config", "misf-tiny", "--steps", 2, "--crop", 32, "--filters", "both", "--filters", "none"]
    arguments += ["--seeds", 1, "--device", "cpu"]
    for _ in range(2):  # the second time finds finished runs
        result = CliRunner().invoke(ablations.main, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
    weights = {name: tmp_path / "runs" / f"{name}-0" / "ema.safetensors" for name in ("none", "both")}
    configs = {name: load_checkpoint(path).config for name, path in weights.items()}
    assert (configs["none"].feature_filter_level, configs["none"].image_filter) == (0, False)
    assert (configs["both"].feature_filter_level, configs["both"].image_filter) == (3, True)
    other = CliRunner().invoke(ablations.main, [str(argument) for argument in (*arguments, "--steps", 3)])
    assert other.exit_code == 1
    assert "holds a run of another recipe" in other.stderr.splitlines()[-1]
    report = json.loads((tmp_path / "out" / "ablations.json").read_text())
    assert [row["filters"] for row in report["rows"]] == ["none", "both"]
    assert report["rows"][0]["parameters"] < report["rows"][1]["parameters"]
    method = Method("both", model_fill(weights["both"])[0])
    assert len(list(evaluate([method], cases(Pictures([data / "coffee.png"]))))) == 3
    assert report["rows"][1]["psnr_db"] == [pytest.approx(method.report()["all"]["psnr_db"])]
    text = (tmp_path / "out" / "ablations.md").read_text()
    assert text.strip() in result.stdout
    assert f"| {method.report()['bands']['20-40%']['psnr_db']:.2f} |" in text
    assert str(tmp_path) not in text + json.dumps(report)
