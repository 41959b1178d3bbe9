"""Folders at length: several pictures at a time, two runs that share the work, reports, estimates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from misf.runtime import Inpainter
from misf.runtime.folder_run import claimed
from misf.runtime.pictures.masks import MaskSettings
from misf.runtime.pictures.settings import CropSettings
from misf.runtime.run_cli import main

from ..support.tiny_models import constant_fill, mean_fill

HOLE = np.zeros((48, 64), np.uint8)
HOLE[10:30, 20:50] = 255


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mean_fill(tmp_path_factory.mktemp("model") / "mean.onnx")


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Twelve pictures and their masks; one that is no picture, and one without a mask."""
    for name in ("in", "masks"):
        (tmp_path / name).mkdir()
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / f"in/{number:02d}.png")
        Image.fromarray(HOLE).save(tmp_path / f"masks/{number:02d}.png")
    (tmp_path / "in/broken.png").write_bytes(b"no picture")
    Image.fromarray(HOLE).save(tmp_path / "masks/broken.png")
    Image.fromarray(HOLE).save(tmp_path / "in/unmasked.png")
    return tmp_path


def run(model: Path, folder: Path, output: str, *more: str) -> Result:
    places = [str(model), str(folder / "in"), str(folder / "masks"), "-o", str(folder / output)]
    return CliRunner().invoke(main, [*places, "--backend", "onnxruntime", *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_several_at_a_time_make_the_same_files_and_a_whole_report(model: Path, folder: Path) -> None:
    one = run(model, folder, "one")
    report = folder / "report.jsonl"
    four = run(model, folder, "four", "--jobs", "4", "--report", str(report))
    assert (one.exit_code, four.exit_code) == (5, 5)
    assert contents(folder / "one") == contents(folder / "four")
    assert sorted(four.stdout.split()) == sorted(str(folder / f"four/{number:02d}.png") for number in range(12))
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    states = {Path(line["input"]).name: line["status"] for line in lines}
    assert states == {f"{number:02d}.png": "done" for number in range(12)} | {
        "broken.png": "failed",
        "unmasked.png": "failed",
    }
    assert "not a picture" in next(line["error"] for line in lines if line["input"].endswith("broken.png"))
    again = run(model, folder, "four", "--jobs", "2", "--skip-existing", "--report", str(report))
    assert again.exit_code == 5
    more = [json.loads(line) for line in report.read_text().splitlines()[14:]]
    assert sorted(line["status"] for line in more) == ["exists"] * 12 + ["failed"] * 2


@pytest.mark.timeout(120)
def test_two_runs_on_one_folder_share_the_work(model: Path, folder: Path) -> None:
    """Two real processes; each picture is done by one of them, and no claim is left."""
    script = "from misf.runtime.run_cli import main; main()"
    places = [str(model), str(folder / "in"), str(folder / "masks"), "-o", str(folder / "out")]
    reports = [folder / "a.jsonl", folder / "b.jsonl"]
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                script,
                *places,
                "--backend",
                "onnxruntime",
                "--skip-existing",
                "--report",
                str(report),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for report in reports
    ]
    assert [process.wait(timeout=60) for process in running] == [5, 5]
    done = [
        line["input"]
        for report in reports
        for line in map(json.loads, report.read_text().splitlines())
        if line["status"] == "done"
    ]
    assert sorted(map(Path, done)) == [folder / f"in/{number:02d}.png" for number in range(12)]
    assert sorted(path.name for path in (folder / "out").iterdir()) == [f"{number:02d}.png" for number in range(12)]


def test_a_claim_goes_with_its_process(tmp_path: Path) -> None:
    output = tmp_path / "x.png"
    code = f"""
import pathlib, sys, time
from misf.runtime.folder_run import claimed
with claimed(pathlib.Path({str(output)!r})) as ours:
    print(ours, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with claimed(output) as ours:
            assert not ours
        os.kill(other.pid, signal.SIGKILL)
    assert list(tmp_path.iterdir())  # the empty file that a kill leaves
    with claimed(output) as ours:
        assert ours
    assert not list(tmp_path.iterdir())


def test_an_estimate_writes_nothing_and_is_near(model: Path, folder: Path) -> None:
    result = run(model, folder, "out", "--dry-run", "--json")
    assert result.exit_code == 5  # one has no mask
    found = json.loads(result.stdout)
    assert (found["pictures"], found["crops"], found["finished_before"]) == (13, 13, 0)
    assert [failure["input"] for failure in found["failures"]] == [str(folder / "in/unmasked.png")]
    assert not (folder / "out").exists()
    started = time.perf_counter()
    run(model, folder, "out")
    taken = time.perf_counter() - started
    assert 0 < found["estimated_seconds"] < 20 * taken + 1
    said = run(model, folder, "out", "--dry-run", "--skip-existing")
    assert said.stdout.startswith("1 picture, 1 crop: about ")


def test_label_maps(model: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """Indices of a palette whose colours say nothing, grey labels of 8 and 16 bits; colour is refused."""
    labels = rng.integers(0, 5, (48, 64)).astype(np.uint8)
    picture = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")
    indexed = Image.fromarray(labels).convert("P")
    indexed.putdata(labels.reshape(-1))  # type: ignore[no-untyped-call]
    indexed.putpalette([7] * 15)
    masks: dict[str, Image.Image] = {
        "indexed.png": indexed,
        "grey.png": Image.fromarray(labels),
        "deep.png": Image.fromarray(labels.astype(np.uint16)),
    }
    for name, mask in masks.items():
        mask.save(tmp_path / name)
        common = ["--backend", "onnxruntime", "--mask-value", "1,3", "--force", "-o", str(tmp_path / "out.png")]
        places = [str(model), str(tmp_path / "x.png"), str(tmp_path / name)]
        result = CliRunner().invoke(main, [*places, *common])
        assert result.exit_code == 0, result.stderr
        filled = np.asarray(Image.open(tmp_path / "out.png"))
        changed = (filled != picture).any(axis=2)
        assert not changed[~np.isin(labels, (1, 3))].any()
        assert changed[np.isin(labels, (1, 3))].mean() > 0.9
    Image.fromarray(picture).save(tmp_path / "colour.png")
    result = CliRunner().invoke(main, [*places[:2], str(tmp_path / "colour.png"), *common])
    assert result.exit_code == 1
    assert "in colour (RGB)" in result.stderr
    for wrong, words in (
        (["--mask-value", "x"], "such as 3 or 3,7"),
        (["--mask-threshold", "3", "--mask-value", "1"], "leave one"),
    ):
        result = CliRunner().invoke(main, [*places, *wrong])
        assert result.exit_code == 2
        assert words in result.stderr


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_feather_blends_linearly_around_the_hole_and_nowhere_else(dtype: Any, tmp_path: Path) -> None:
    """Against the definition, on a flat picture: known + (fill - known) * (1 - distance / (pixels + 1))."""
    inpaint = Inpainter(constant_fill(tmp_path / "c.onnx", 1.0), backend="onnxruntime", feather=9)
    top = int(np.iinfo(dtype).max)
    picture = np.full((64, 80, 3), top // 4, dtype)
    hole = np.zeros((64, 80), np.bool_)
    hole[20:40, 30:50] = True
    result = inpaint(picture, hole)
    assert (result[hole] == top).all()
    for distance in range(1, 14):
        weight = max(0.0, 1 - distance / 10)
        expected = round(top // 4 + (top - top // 4) * weight)
        for pixel in (result[30, 49 + distance], result[30, 30 - distance], result[19 - distance + 1, 40]):
            assert abs(int(pixel[0]) - expected) <= 1
    assert (inpaint(picture, hole, masks=MaskSettings())[~hole] == top // 4).all()


def test_each_call_may_have_its_own_settings(model: Path, rng: np.random.Generator) -> None:
    inpaint = Inpainter(model, backend="onnxruntime", grow_mask=2)
    picture = rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)
    mask = np.zeros((200, 200), np.uint8)
    mask[50:60, 50:60] = 100
    plain = inpaint(picture, mask, masks=MaskSettings(threshold=50))
    grown = inpaint(picture, mask, masks=MaskSettings(threshold=50, grow=5))
    assert not (plain != picture).any(axis=2)[45:50].any()
    assert (grown != picture).any(axis=2)[46, 55]
    near = inpaint(picture, mask, masks=MaskSettings(threshold=50), settings=CropSettings("crop", 64, 8))
    assert (near[50:60, 50:60] != plain[50:60, 50:60]).any()  # the mean of what is near, not of all
    assert not (inpaint(picture, mask) != picture).any()  # its own threshold is 127


def test_a_full_disk_and_a_folder_that_is_gone_are_one_line_each(model: Path, folder: Path) -> None:
    script = "from misf.runtime.run_cli import main; main()"
    places = [str(model), str(folder / "in"), str(folder / "masks"), "--backend", "onnxruntime"]
    gone = folder / "gone"
    gone.mkdir()
    for where, more, words in (
        (
            folder,
            ["-o", str(folder / "full"), "--report", "/dev/full"],
            "cannot write the report /dev/full: No space left",
        ),
        (gone, ["-o", "out"], "the working folder no longer exists"),
    ):
        command = (
            f'cd {where} && {"rmdir . 2>/dev/null; rmdir " + str(gone) + " && " if where == gone else ""}exec "$@"'
        )
        done = subprocess.run(
            ["bash", "-c", command, "bash", sys.executable, "-c", script, *places, *more],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert words in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
