"""Folders at length: several pictures at a time, two runs that share the work, reports, estimates."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from misf.runtime import Inpainter
from misf.runtime.folder_run import Results, claimed, run_folder
from misf.runtime.jobs import Job
from misf.runtime.pictures.canvas import ArrayCanvas
from misf.runtime.pictures.image_io import open_mask
from misf.runtime.pictures.masks import MaskSettings
from misf.runtime.pictures.png16 import SIGNATURE, chunk
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


def test_an_interrupted_run_stops_at_the_next_crop_and_tells_what_it_wrote(tmp_path: Path) -> None:
    """Of three at work one is done, which the run is interrupted at, one ends within a crop, one between two."""
    stopped = threading.Event()

    def fill(job: Job, progress: Callable[[int, int], None]) -> dict[str, Any]:
        record = {"output": job.output.name, "width": 1, "height": 1, "strategy": "crop", "crops": 9, "seconds": 0.0}
        if job.image.name == "b":
            try:
                while True:
                    progress(1, 9)
                    time.sleep(0.01)
            finally:
                stopped.set()
        if job.image.name == "c":
            assert stopped.wait(20)
        return record

    reported = []

    def report(record: dict[str, Any]) -> None:
        reported.append(record["output"])
        if len(reported) == 1:
            raise KeyboardInterrupt

    jobs = [Job(tmp_path / name, tmp_path / name, False, Path(name), tmp_path / "x") for name in "abcd"]
    results = Results([], [], SimpleNamespace(append=report), print_paths=False)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        run_folder(SimpleNamespace(run=fill), jobs, results, 3, share=False)  # type: ignore[arg-type]
    assert reported == ["a", "c"]
    assert [record["output"] for record in results.done] == ["a", "c"]
    assert results.failures == []


CLAIMING = """
import pathlib, sys, time
from misf.runtime.folder_run import claimed
with claimed(pathlib.Path(sys.argv[1])) as ours:
    print(ours, flush=True)
    time.sleep(60)
"""


@pytest.mark.timeout(120)
def test_what_a_killed_run_was_at_is_done_by_the_other(model: Path, folder: Path) -> None:
    command = [sys.executable, "-c", CLAIMING, folder / "out/05.png"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with ThreadPoolExecutor() as pool:
            result = pool.submit(run, model, folder, "out", "--skip-existing")
            while len(list((folder / "out").glob("[0-9]*.png"))) < 11:
                assert not result.done()
                time.sleep(0.01)
            time.sleep(0.5)
            assert not result.done()
            os.kill(other.pid, signal.SIGKILL)
            assert result.result(timeout=60).exit_code == 5
    assert sorted(contents(folder / "out")) == [f"{number:02d}.png" for number in range(12)]


def test_a_claim_goes_with_its_process(tmp_path: Path) -> None:
    output = tmp_path / "x.png"
    with subprocess.Popen([sys.executable, "-c", CLAIMING, output], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with claimed(output) as ours:
            assert not ours
        os.kill(other.pid, signal.SIGKILL)
    assert list(tmp_path.iterdir())  # the empty file that a kill leaves
    with claimed(output) as ours:
        assert ours
    assert not list(tmp_path.iterdir())


def test_a_claim_is_lost_with_the_file_that_was_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run has removed the file, and a third made it anew, between our opening and our locking it."""
    output, flock = tmp_path / "x.png", fcntl.flock

    def late(file: Any, how: int) -> None:
        path = Path(file.name)
        path.rename(tmp_path / "old")
        path.touch()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with claimed(output) as ours:
        assert not ours
    assert len(list(tmp_path.glob(".misf-claim-*"))) == 1  # the third one's


def test_pictures_are_filled_where_the_file_system_has_no_locks(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    result = run(model, folder, "unlocked", "--skip-existing")
    assert len(contents(folder / "unlocked")) == 12
    assert result.stderr.count("no locks in") == 1


def test_names_as_long_as_they_can_be_are_claimed(model: Path, tmp_path: Path) -> None:
    name = f"{'x' * 251}.png"
    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "in" / name)
    Image.fromarray(HOLE).save(tmp_path / "mask.png")
    places = [str(model), str(tmp_path / "in"), str(tmp_path / "mask.png"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*places, "--backend", "onnxruntime", "--skip-existing"])
    assert result.exit_code == 0, result.stderr
    assert list(contents(tmp_path / "out")) == [name]


def test_a_report_tells_of_files_that_are_no_pictures_and_of_single_pictures(model: Path, folder: Path) -> None:
    (folder / "in/notes.txt").touch()
    report = folder / "report.jsonl"
    run(model, folder, "out", "--report", str(report))
    states = {Path(line["input"]).name: line["status"] for line in map(json.loads, report.read_text().splitlines())}
    assert (states["notes.txt"], states["00.png"], len(states)) == ("skipped", "done", 15)
    single = [str(model), str(folder / "in/00.png"), str(folder / "masks/00.png"), "-o", str(folder / "out")]
    CliRunner().invoke(main, [*single, "--skip-existing", "--report", str(report)])
    last = json.loads(report.read_text().splitlines()[-1])
    assert (last["status"], last["output"]) == ("exists", str(folder / "out/00.png"))


def test_stdout_gets_the_bytes_of_a_name_and_a_full_one_is_named(model: Path, folder: Path) -> None:
    name = os.fsdecode("nä\udcff.png".encode("utf-8", "surrogateescape"))
    (folder / "in/00.png").rename(folder / "in" / name)
    code = "from misf.runtime.run_cli import main; main()"
    command = [sys.executable, "-c", code, str(model), str(folder / "in" / name), str(folder / "masks/00.png")]
    common: dict[str, Any] = {"env": {**os.environ, "PYTHONIOENCODING": "ascii"}, "stderr": subprocess.PIPE}
    done = subprocess.run([*command, "-o", folder], stdout=subprocess.PIPE, timeout=60, check=True, **common)
    assert done.stdout == os.fsencode(folder / name) + b"\n"
    with Path("/dev/full").open("w") as full:
        refused = subprocess.run([*command, "-o", folder, "--force"], stdout=full, timeout=60, **common)
    assert refused.returncode == 1
    assert refused.stderr.endswith(b"misf-run: stdout: No space left on device\n")


def test_an_estimate_writes_nothing_and_is_near(model: Path, folder: Path) -> None:
    result = run(model, folder, "out", "--dry-run", "--json")
    assert result.exit_code == 5  # one has no mask
    found = json.loads(result.stdout)
    assert (found["pictures"], found["crops"], found["finished_before"]) == (12, 12, 0)
    assert [Path(failure["input"]).name for failure in found["failures"]] == ["broken.png", "unmasked.png"]
    assert not (folder / "out").exists()
    started = time.perf_counter()
    run(model, folder, "out")
    taken = time.perf_counter() - started
    assert 0 < found["estimated_seconds"] < 20 * taken + 1
    (folder / "out/03.png").unlink()
    said = run(model, folder, "out", "--dry-run", "--skip-existing")
    assert said.stdout.startswith("1 picture, 1 crop: about ")
    again = run(model, folder, "out", "--dry-run")
    assert again.stdout.startswith("1 picture, 1 crop: about ")
    assert again.stderr.count("exists already") == 11
    single = [str(model), str(folder / "in/04.png"), str(folder / "masks"), "-o", str(folder / "out"), "--dry-run"]
    alone = CliRunner().invoke(main, single)
    assert alone.exit_code == 1
    assert "exists already" in alone.stderr.splitlines()[-1]


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
        (["--mask-value", "1", "--mask-from-alpha"], "leave one"),
    ):
        result = CliRunner().invoke(main, [*places, *wrong])
        assert result.exit_code == 2
        assert words in result.stderr


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_label_maps_of_few_bits_have_the_values_of_their_files(bits: int, tmp_path: Path) -> None:
    """Pillow shows the grey values of these scaled to 255: 3 of 4 bits as 51."""
    labels = np.arange(2**bits, dtype=np.uint8)
    row = np.packbits(np.unpackbits(labels[:, None], axis=1)[:, -bits:])
    header = struct.pack(">IIBBBBB", len(labels), 1, bits, 0, 0, 0, 0)
    body = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + row.tobytes())), (b"IEND", b"")]
    (tmp_path / "m.png").write_bytes(SIGNATURE + b"".join(chunk(*part) for part in body))
    for value in labels:
        hole = MaskSettings(values=(int(value),)).hole(open_mask(tmp_path / "m.png"))
        np.testing.assert_array_equal(hole, [labels == value])


def test_values_that_no_pixel_has_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        assert not MaskSettings(values=(3, 7)).hole(Image.fromarray(np.uint8([[0, 5, 5, 255]]))).any()
    assert "no pixel of the mask has the value 3, 7: those that it has are 0, 5, 255" in caplog.text


@pytest.mark.parametrize(
    ("mode", "known", "white"),
    [
        ("CMYK", (10, 20, 30, 120), (0, 0, 0, 0)),
        ("RGBA", (10, 200, 30, 77), (255, 255, 255, 77)),
        ("LA", (80, 0), (255, 0)),
        ("YCbCr", (80, 90, 200), (255, 128, 128)),
    ],
)
def test_feather_blends_each_channel_of_the_file_itself(
    mode: str, known: tuple[int, ...], white: tuple[int, ...], tmp_path: Path
) -> None:
    """By way of RGB the black of CMYK would be gone at the outer edge of the blend, and alpha is not the fill's."""
    inpaint = Inpainter(constant_fill(tmp_path / "c.onnx", 1.0), backend="onnxruntime", feather=9)
    hole = np.zeros((64, 80), np.bool_)
    hole[20:40, 30:50] = True
    result = inpaint(Image.new(mode, (80, 64), known), hole)
    for distance in range(14):
        share = max(0.0, 1 - distance / 10)
        expected = share * np.array(white) + (1 - share) * np.array(known)
        assert np.abs(np.array(result.getpixel((49 + distance, 30))) - expected).max() <= 1, distance


def test_a_feathered_hole_has_no_seams_where_its_crops_meet(tmp_path: Path) -> None:
    inpaint = Inpainter(constant_fill(tmp_path / "c.onnx", 1.0), backend="onnxruntime")
    hole = np.zeros((120, 700), np.bool_)
    hole[55:65, 40:660] = True
    picture = np.full((120, 700, 3), 50, np.uint8)
    canvas = ArrayCanvas(picture.copy())
    report = inpaint.fill(canvas, hole, settings=CropSettings("crop", 128), feather=12)
    assert report.crops > 3
    assert report.hole_pixels == 10 * 620
    y, x = np.ogrid[:120, :700]
    distance = np.hypot(np.maximum(0, np.maximum(55 - y, y - 64)), np.maximum(0, np.maximum(40 - x, x - 659)))
    expected = 50 + 205 * np.clip(1 - distance / 13, 0, 1)
    assert np.abs(canvas.array - expected[..., None]).max() <= 1


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
            "cannot write /dev/full: No space left",
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
