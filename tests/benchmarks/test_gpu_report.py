"""benchmarks/gpu_report.py compares predictions with measurements."""

from __future__ import annotations

import json
from pathlib import Path

from ..conftest import load_benchmark


def test_predictions_meet_the_rows_that_they_are_about(tmp_path: Path) -> None:
    report = load_benchmark("gpu_report")
    predictions = json.loads(report.PREDICTIONS.read_text())["predictions"]
    where = predictions[0]["where"]
    other = {**where, "dtype": "float32", "of_copy": 0.99}
    (tmp_path / "forward").mkdir()
    (tmp_path / "forward" / "kernel-cuda.json").write_text(json.dumps({"rows": [other, {**where, "of_copy": 0.75}]}))
    network = {"1 x 256x256": {"PyTorch eager fp32, official formulation": {"p50_ms": 7.5}, "broken": {"failed": "no"}}}
    (tmp_path / "latency-cuda.json").write_text(json.dumps({"results": network}))
    lines = report.table(tmp_path, predictions).splitlines()
    assert lines[2].endswith("| 80% to 87% | 75% | below |")
    assert "| 88% to 92% | 99% | above |" in lines[3]
    assert sum("| 6 to 10 | 7.5 | within |" in line for line in lines) == 1
    assert sum("not measured" in line for line in lines) == len(predictions) - 3


def test_every_prediction_names_a_row_that_a_benchmark_makes() -> None:
    """Predictions use the names in the benchmarks: one with an outdated name would always be 'not measured'."""
    kernel, latency_gpu = load_benchmark("kernel"), load_benchmark("latency_gpu")
    predictions = json.loads(load_benchmark("gpu_report").PREDICTIONS.read_text())["predictions"]
    shapes = {f"{c.batch}x{c.channels}x{c.side}x{c.side}" for c in kernel.cases("cuda", ())}
    ways = {way.name for way in latency_gpu.torch_ways(Path("none"), "cuda", compiled=False)}
    for prediction in predictions:
        where = prediction["where"]
        if "way" in where:
            assert where["way"] in ways or where["way"].startswith("TensorRT fp16 with plugin"), where
        else:
            assert where["shape"] in shapes
            assert where["method"] in {"ours", "plugin"}
            assert prediction["value"] in kernel.Row.__dataclass_fields__
