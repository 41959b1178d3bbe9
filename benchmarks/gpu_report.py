"""Compares the measurements of a GPU session with the predictions: python benchmarks/gpu_report.py FOLDER.

It reads predictions.json and all results files below FOLDER, writes FOLDER/predictions.md and prints the table. Shares
are fractions of the copy speed measured on the same GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PREDICTIONS = Path(__file__).with_name("predictions.json")


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a results file of kernel.py or latency.py."""
    document = json.loads(path.read_text())
    yield from document.get("rows", [])
    for title, ways in document.get("results", {}).items():
        for way, row in ways.items():
            yield {"title": title, "way": way, **row}


def measured(folder: Path, prediction: dict[str, Any]) -> float | None:
    """Return the measured value for a prediction, or None if it was not measured."""
    for path in sorted(folder.rglob(prediction["rows"])):
        for row in rows(path):
            if prediction["value"] in row and prediction["where"].items() <= row.items():
                return float(row[prediction["value"]])
    return None


def table(folder: Path, predictions: list[dict[str, Any]]) -> str:
    """Return the comparison as Markdown."""
    lines = ["| what | predicted | measured | |", "| --- | ---: | ---: | --- |"]
    for prediction in predictions:
        low, high, value = prediction["low"], prediction["high"], measured(folder, prediction)
        show = "{:.0%}".format if prediction["value"] == "of_copy" else "{:.3g}".format
        verdict = "" if value is None else "below" if value < low else "above" if value > high else "within"
        found = "not measured" if value is None else show(value)
        lines.append(f"| {prediction['what']} | {show(low)} to {show(high)} | {found} | {verdict} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    folder = Path(sys.argv[1])
    text = table(folder, json.loads(PREDICTIONS.read_text())["predictions"])
    (folder / "predictions.md").write_text("# Predicted before the session, and measured in it\n\n" + text)
    print(text)


if __name__ == "__main__":
    main()
