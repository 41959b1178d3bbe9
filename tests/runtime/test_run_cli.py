"""misf-run: files and folders, what is written and what is not, exit codes and the one line of each failure."""

from __future__ import annotations

import errno
import json
import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from skimage import data

from misf.plugins.shared.errors import MisfError
from misf.plugins.shared.files import written_whole
from misf.runtime.fill_file import FileFiller
from misf.runtime.jobs import Job
from misf.runtime.run_cli import main
from misf.training.mask_drawing import MaskFolder

from ..support.tiny_models import constant_fill, foreign, mean_fill

SHAPE = (60, 80)
HOLE = np.zeros(SHAPE, np.bool_)
HOLE[10:30, 20:50] = True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mean_fill(tmp_path_factory.mktemp("model") / "mean.onnx")


@pytest.fixture(autouse=True)
def _on_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands in these tests name no backend; OpenVINO takes half a second longer to import."""
    for parameter in main.params:
        if parameter.name == "backend":
            monkeypatch.setattr(parameter, "default", "onnxruntime")
    monkeypatch.delenv("MISF_DEVICE", raising=False)
    monkeypatch.delenv("MISF_LOG_LEVEL", raising=False)


def _picture(path: Path, shape: tuple[int, int] = SHAPE, **options: Any) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(list(path.name.encode())).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def _mask(path: Path, hole: np.ndarray = HOLE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(hole.astype(np.uint8) * 255).save(path)
    return path


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def _one_line(result: Result) -> str:
    """Return the line on stderr that names the command, after checking that it is one, and no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("misf-run: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_one_picture(model: Path, tmp_path: Path) -> None:
    pixels = _picture(tmp_path / "photo.png")
    mask = _mask(tmp_path / "mask.png")
    result = _run(model, tmp_path / "photo.png", mask)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'photo_inpainted.png'}\n"
    assert "mean.onnx runs on onnxruntime, cpu, fp32" in result.stderr
    filled = _pixels(tmp_path / "photo_inpainted.png")
    np.testing.assert_array_equal(filled[~HOLE], pixels[~HOLE])
    assert np.abs(filled[HOLE] - pixels[~HOLE].mean(axis=0)).max() <= 1
    assert _files(tmp_path) == {"photo.png", "mask.png", "photo_inpainted.png"}


def test_nothing_is_overwritten_that_was_not_named(model: Path, tmp_path: Path) -> None:
    photo, mask = tmp_path / "photo.png", _mask(tmp_path / "mask.png")
    _picture(photo)
    given = photo.read_bytes()
    assert _run(model, photo, mask).exit_code == 0
    again = _run(model, photo, mask)
    assert again.exit_code == 1
    assert "photo_inpainted.png exists already: pass --force to overwrite it" in _one_line(again)
    assert _run(model, photo, mask, "--force").exit_code == 0
    assert _run(model, photo, mask, "-o", tmp_path / "photo_inpainted.png").exit_code == 0  # named, so it may go
    for target, what in ((photo, "picture"), (mask, "mask")):
        refused = _run(model, photo, mask, "-o", target)
        assert refused.exit_code == 1
        assert f"is the {what} itself: name another, or pass --force" in _one_line(refused)
    assert photo.read_bytes() == given
    assert _run(model, photo, mask, "-o", photo, "--force").exit_code == 0
    assert photo.read_bytes() != given


def test_json_is_one_document(model: Path, tmp_path: Path) -> None:
    _picture(tmp_path / "photo.png", (900, 1200))
    hole = np.zeros((900, 1200), np.bool_)
    hole[:40, :40] = hole[-40:, -40:] = True
    mask = _mask(tmp_path / "mask.png", hole)
    result = _run(model, tmp_path / "photo.png", mask, "--json", "--concat")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    [record] = document.pop("images")
    assert document == {
        "model": str(model),
        "backend": "onnxruntime",
        "device": "cpu",
        "precision": "fp32",
        "strategy": "auto",
        "working_size": 512,
        "failures": [],
        "finished_before": [],
        "skipped": [],
        "interrupted": False,
    }
    assert (record["width"], record["height"], record["strategy"], record["crops"]) == (1200, 900, "crop", 2)
    assert record["hole_pixels"] == 3200
    assert 0 < record["model_seconds"] <= record["seconds"]
    panels = _pixels(Path(record["concat"]))
    assert panels.shape == (768, 3 * 1024 + 2 * 8, 3)  # 900x1200 reduced to a longest side of 1024
    assert tuple(panels[5, 1024 + 8 + 5]) == (230, 26, 38)  # the hole, marked


def test_a_folder_keeps_paths_and_formats_and_goes_on_after_failures(model: Path, tmp_path: Path) -> None:
    photos, masks, out = tmp_path / "photos", tmp_path / "masks", tmp_path / "out"
    for name in ("a.png", "deep/er/b.jpg", "c.webp", "e.png", ".hidden.png"):
        _picture(photos / name)
    _picture(photos / "small.png", (9, 9))
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    (photos / "notes.txt").write_text("not a picture either")
    (photos / "lost.png").symlink_to(tmp_path / "nowhere.png")
    for name in ("a.png", "deep/er/b.png", "c.png", "small.png", "broken.png", "e.png", "e.bmp"):
        _mask(masks / name)
    result = _run(model, photos, masks, "-o", out, "--json")
    assert result.exit_code == 5, result.stderr
    assert _files(out) == {"a.png", "deep/er/b.jpg", "c.webp"}
    document = json.loads(result.stdout)
    assert [Path(record["output"]).name for record in document["images"]] == ["a.png", "c.webp", "b.jpg"]
    failures = {Path(failure["input"]).name: failure["error"] for failure in document["failures"]}
    assert set(failures) == {"broken.jpg", "small.png", "e.png"}
    assert "the mask is 80x60 and the picture 9x9" in failures["small.png"]
    assert "broken.jpg cannot be read as a picture" in failures["broken.jpg"]
    assert failures["e.png"] == "2 masks for e.png: e.bmp, e.png; expected one"
    assert "error: small.png: the mask is 80x60" in result.stderr
    assert document["skipped"] == [str(photos / "lost.png"), str(photos / "notes.txt")]
    assert f"warning: 2 files in {photos} are skipped, not pictures we read, or links: lost.png" in result.stderr
    assert f"error: {photos / 'broken.jpg'} cannot be read" in result.stderr
    assert "error: 3 of 6 pictures failed" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_by_default_and_one_mask_for_all(model: Path, tmp_path: Path) -> None:
    mask = _mask(tmp_path / "photos" / "the_mask.png")
    pixels = [_picture(tmp_path / "photos" / name) for name in ("x.png", "y.png")]
    result = _run(model, tmp_path / "photos", mask)
    assert result.exit_code == 0, result.stderr
    assert _files(tmp_path / "photos_inpainted") == {"x.png", "y.png"}  # the mask is not a picture to fill
    for name, before in zip(("x.png", "y.png"), pixels, strict=True):
        np.testing.assert_array_equal(_pixels(tmp_path / "photos_inpainted" / name)[~HOLE], before[~HOLE])
    assert _run(model, tmp_path / "photos", mask).exit_code == 5  # they exist now
    assert _run(model, tmp_path / "photos", mask, "--force").exit_code == 0


def test_lama_pairs_in_one_folder(model: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        _picture(tmp_path / "in" / f"{name}.png")
        _mask(tmp_path / "in" / f"{name}_mask001.png")
    _picture(tmp_path / "in" / "alone.png")
    result = _run(model, tmp_path / "in", tmp_path / "in", "-o", tmp_path / "in" / "out")
    assert result.exit_code == 5
    assert _files(tmp_path / "in" / "out") == {"x.png", "y.png"}
    assert "error: alone.png: no mask for alone.png: expected alone.* or alone_mask*.*" in result.stderr
    again = _run(model, tmp_path / "in", tmp_path / "in", "-o", tmp_path / "in" / "out", "--json", "--force")
    assert len(json.loads(again.stdout)["images"]) == 2  # its own outputs are no pictures to fill


def test_a_comparison_that_cannot_be_written_leaves_no_picture(model: Path, tmp_path: Path) -> None:
    """A later run with --skip-existing would take the picture for finished."""
    _picture(tmp_path / "in" / f"{'n' * 246}.png")  # the comparison's name would be too long
    options = ("-o", tmp_path / "out", "--concat")
    assert _run(model, tmp_path / "in", _mask(tmp_path / "mask.png"), *options).exit_code == 5
    assert not list((tmp_path / "out").iterdir())


def test_a_dry_run_refuses_the_mask_that_a_run_refuses(model: Path, tmp_path: Path) -> None:
    _picture(tmp_path / "photo.png")
    mask = _mask(tmp_path / "mask.png", HOLE.T)
    for options in ((), ("--dry-run",)):
        result = _run(model, tmp_path / "photo.png", mask, "-o", tmp_path / "out.png", *options)
        assert result.exit_code == 1
        assert "the mask is 60x80 and the picture 80x60" in result.stderr


def test_comparisons_overwrite_nothing_and_have_names_of_their_own(model: Path, tmp_path: Path) -> None:
    photo, mask = tmp_path / "photo.png", _mask(tmp_path / "mask.png")
    _picture(photo)
    mine = tmp_path / "out_concat.png"
    mine.write_bytes(b"mine")
    refused = _run(model, photo, mask, "-o", tmp_path / "out.png", "--concat")
    assert refused.exit_code == 1
    assert f"{mine} exists already: pass --force to overwrite it" in _one_line(refused)
    assert mine.read_bytes() == b"mine"
    assert not (tmp_path / "out.png").exists()
    assert _run(model, photo, mask, "-o", tmp_path / "out.png", "--concat", "--force").exit_code == 0
    assert _pixels(mine).shape == (60, 3 * 80 + 2 * 8, 3)
    names = {"a.jpg", "a.png", "b.png", "c.png", "c_concat.png", "sub/b.jpg"}
    for name in names:
        _picture(tmp_path / "in" / name)
    result = _run(model, tmp_path / "in", mask, "--concat")
    assert result.exit_code == 0, result.stderr
    comparisons = {"a.jpg_concat.png", "a.png_concat.png", "b_concat.png", "sub/b_concat.png"}
    comparisons |= {"c_concat_concat.png", "c_concat_concat_concat.png"}
    assert _files(tmp_path / "in_inpainted") == names | comparisons
    for name in names:  # a comparison would be wider
        assert _pixels(tmp_path / "in_inpainted" / name).shape == (*SHAPE, 3)


def test_an_interrupted_folder_goes_on(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    photos, mask, out = tmp_path / "in", _mask(tmp_path / "mask.png"), tmp_path / "in_inpainted"
    for name in ("a.png", "b.png", "c.png"):
        _picture(photos / name)
    run = FileFiller.run

    def stopped_at_b(self: FileFiller, job: Job, **rest: Any) -> dict[str, Any]:
        if job.relative.name == "b.png":
            raise KeyboardInterrupt
        return run(self, job, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(FileFiller, "run", stopped_at_b)
        stopped = _run(model, photos, mask, "--json")
    assert stopped.exit_code == 130
    document = json.loads(stopped.stdout)
    assert [Path(record["output"]).name for record in document["images"]] == ["a.png"]
    assert document["interrupted"] is True
    (out / "a.png").write_bytes(b"left alone")
    goes_on = _run(model, photos, mask, "--json", "--skip-existing")
    assert goes_on.exit_code == 0, goes_on.stderr
    document = json.loads(goes_on.stdout)
    assert [Path(record["output"]).name for record in document["images"]] == ["b.png", "c.png"]
    assert document["finished_before"] == [str(out / "a.png")]
    assert document["interrupted"] is False
    assert "1 of 3 pictures are finished and left alone" in goes_on.stderr
    assert (out / "a.png").read_bytes() == b"left alone"
    again = _run(model, photos, mask, "--skip-existing")
    assert (again.exit_code, again.stdout) == (0, "")
    onto_themselves = _run(model, photos, mask, "--skip-existing", "-o", photos)
    assert onto_themselves.exit_code == 5  # pictures are not their own results


def test_warnings_in_a_folder_name_their_picture(model: Path, tmp_path: Path) -> None:
    for name in ("x.png", "sub/y.png"):
        _picture(tmp_path / "in" / name)
    _mask(tmp_path / "masks" / "x.png")
    _mask(tmp_path / "masks" / "sub" / "y.png", np.zeros(SHAPE, np.bool_))
    result = _run(model, tmp_path / "in", tmp_path / "masks")
    assert result.exit_code == 0, result.stderr
    assert "warning: sub/y.png: the mask is empty" in result.stderr
    _picture(tmp_path / "one" / "z.png", (9, 9))
    alone = _run(model, tmp_path / "one", tmp_path / "masks" / "x.png")
    assert alone.exit_code == 5
    assert "error: z.png: the mask is 80x60" in alone.stderr  # also where the folder holds but one


def test_mask_options(model: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    pixels = _picture(photo)
    out = tmp_path / "out.png"
    inverted = _mask(tmp_path / "inverted.png", ~HOLE)
    small = _mask(tmp_path / "small.png", HOLE[::2, ::2])
    faint = tmp_path / "faint.png"
    Image.fromarray(HOLE.astype(np.uint8)).save(faint)
    for mask, option in ((inverted, "--invert-mask"), (small, "--resize-mask"), (faint, "--mask-threshold=0")):
        assert _run(model, photo, mask, "-o", out, option).exit_code == 0
        filled = _pixels(out)
        np.testing.assert_array_equal(filled[~HOLE], pixels[~HOLE])
        assert len(np.unique(filled[HOLE], axis=0)) == 1
        out.unlink()
    refused = _run(model, photo, small, "-o", out)
    assert (refused.exit_code, out.exists()) == (1, False)
    assert "the mask is 40x30 and the picture 80x60 (width x height): give a mask of" in _one_line(refused)
    assert "brightest value is 1" in _run(model, photo, faint, "-o", out).stderr


def test_an_empty_mask_gives_the_very_file_and_a_full_one_a_warning(model: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    _picture(photo, quality=50)
    result = _run(model, photo, _mask(tmp_path / "empty.png", np.zeros(SHAPE, np.bool_)))
    assert result.exit_code == 0
    assert "warning: the mask is empty" in result.stderr
    assert (tmp_path / "photo_inpainted.jpg").read_bytes() == photo.read_bytes()
    full = _run(model, photo, _mask(tmp_path / "full.png", np.ones(SHAPE, np.bool_)), "-o", tmp_path / "full.jpg")
    assert full.exit_code == 0
    assert "warning: the mask covers the whole picture" in full.stderr


def test_transparent_parts_as_holes_become_opaque(model: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = np.dstack([rng.integers(0, 256, (*SHAPE, 3), dtype=np.uint8), np.where(HOLE, 0, 200).astype(np.uint8)])
    Image.fromarray(pixels).save(tmp_path / "cut.png")
    result = _run(model, tmp_path / "cut.png", "--mask-from-alpha")
    assert result.exit_code == 0, result.stderr
    filled = _pixels(tmp_path / "cut_inpainted.png")
    np.testing.assert_array_equal(filled[~HOLE], pixels[~HOLE])
    assert np.all(filled[HOLE][:, 3] == 255)
    assert len(np.unique(filled[HOLE], axis=0)) == 1
    _picture(tmp_path / "opaque.png")
    refused = _run(model, tmp_path / "opaque.png", "--mask-from-alpha")
    assert refused.exit_code == 1
    assert "opaque.png: the mask was to come from an alpha channel, and the picture (RGB) has" in _one_line(refused)


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["{model}", "{photo}"], 2, "Missing argument 'MASK': give a mask, or pass --mask-from-alpha."),
        (["{model}", "nowhere.png", "{mask}"], 2, "Path 'nowhere.png' does not exist"),
        (["nowhere.onnx", "{photo}", "{mask}"], 2, "File 'nowhere.onnx' does not exist"),
        (["{folder}", "{photo}", "{mask}"], 2, "is a directory"),
        (["{model}", "{photo}", "{mask}", "--strategy", "tile"], 2, "'tile' is not one of"),
        (["{model}", "{photo}", "{mask}", "--working-size", "9"], 2, "9 is not in the range x>=64"),
        (["{model}", "{photo}", "{mask}", "--nonsense"], 2, "No such option"),
        (["{model}", "{photo}", "{mask}", "--device", "gpu"], 2, "unknown device 'gpu': expected auto, cpu, cuda or"),
        (["{model}", "{photo}", "{mask}", "--device", "cuda:99"], 4, "device cuda:99 was requested"),
        (["{model}", "{photo}", "{mask}", "-o", "out.psd"], 2, "cannot write out.psd: expected a name that ends in"),
        (["{model}", "{photo}", "{mask}", "-o", "out"], 2, ".avif .heic .heif, or a folder that exists"),
        (["{model}", "{photo}", "{mask}", "--force", "--skip-existing"], 2, "contradict each other: give one of them"),
        (["{model}", "{photo}", "{mask}", "-o", "no/such/out.png"], 1, "cannot write no/such/out.png: there is no"),
        (["{model}", "{empty}", "{mask}"], 1, "holds no pictures"),
        (["{model}", "{folder}", "{mask}", "-o", "{photo}"], 1, "is a folder and the output"),
        (["{photo}", "{photo}", "{mask}"], 1, "has no suffix of a model file"),
        (["{plan}", "{photo}", "{mask}"], 1, "is a TensorRT engine, which onnxruntime cannot run"),
        (["{damaged}", "{photo}", "{mask}"], 1, "is not an ONNX file, or a damaged one"),
        (["{foreign}", "{photo}", "{mask}"], 1, "expected the inputs image [N, 3, H, W]"),
        (["{nan}", "{photo}", "{mask}"], 1, "returned NaN or infinity"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_one_line_and_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: Any, arguments: list[str], code: int, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {
        "model": model,
        "photo": tmp_path / "photo.png",
        "mask": _mask(tmp_path / "mask.png"),
        "folder": tmp_path,
        "empty": tmp_path / "empty",
        "plan": tmp_path / "best.plan",
        "damaged": tmp_path / "damaged.onnx",
        "foreign": foreign(tmp_path / "foreign.onnx"),
        "nan": constant_fill(tmp_path / "nan.onnx", float("nan")),
    }
    names["empty"].mkdir()
    _picture(names["photo"])
    names["plan"].write_bytes(b"plan")
    names["damaged"].write_bytes(model.read_bytes()[:300])
    before = _files(tmp_path)
    result = _run(*(argument.format(**names) for argument in arguments))
    assert result.exit_code == code
    assert line in _one_line(result)
    assert result.stdout == ""
    assert _files(tmp_path) == before


def test_a_read_only_folder_and_a_full_disk_leave_what_was_there(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    photo, mask = tmp_path / "photo.png", _mask(tmp_path / "mask.png")
    _picture(photo)
    target = tmp_path / "out" / "filled.png"
    target.parent.mkdir()
    target.write_bytes(b"what was there")

    def refuse(number: int) -> Any:
        def failing(self: Path, content: bytes) -> int:
            with self.open("wb") as file:
                file.write(content[:10])  # some of it got through
            raise OSError(number, os.strerror(number), str(self))

        return failing

    for number, reason in ((errno.ENOSPC, "No space left on device"), (errno.EIO, "Input/output error")):
        monkeypatch.setattr(Path, "write_bytes", refuse(number))
        result = _run(model, photo, mask, "-o", target)
        assert result.exit_code == 1
        assert _one_line(result) == f"misf-run: cannot write {target}: {reason}"
        assert _files(target.parent) == {"filled.png"}
        assert target.read_bytes() == b"what was there"
    monkeypatch.undo()
    open_file = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:  # chmod would not stop root
        if flags & os.O_CREAT and Path(path).parent == target.parent:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open_file(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    result = _run(model, photo, mask, "-o", target)
    assert _one_line(result) == f"misf-run: cannot write {target}: Read-only file system"
    assert target.read_bytes() == b"what was there"


def test_a_write_that_stops_half_way_leaves_nothing(tmp_path: Path) -> None:
    """For real: a limit on the size of files stops the write in the middle."""
    target = tmp_path / "big.bin"
    target.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=f"cannot write {target}: File too large"), written_whole(target) as temporary:
            temporary.write_bytes(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _files(tmp_path) == {"big.bin"}
    assert target.read_bytes() == b"old"


def test_writing_keeps_mode_and_links_and_refuses_what_is_no_file(tmp_path: Path) -> None:
    target, link = tmp_path / "real.bin", tmp_path / "link.bin"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    with written_whole(link) as temporary:
        temporary.write_bytes(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640
    for path, kind in ((tmp_path, "a folder"), (Path("/dev/null"), "not a regular file")):
        with pytest.raises(OSError, match=f"cannot write {path}: it is {kind}"), written_whole(path):
            pytest.fail("the block must not run")


def test_interrupted_is_130_and_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    photo, mask = tmp_path / "photo.png", _mask(tmp_path / "mask.png")
    _picture(photo)
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    result = _run(model, photo, mask)
    assert result.exit_code == 130
    assert _one_line(result) == "misf-run: interrupted"
    assert _files(tmp_path) == {"photo.png", "mask.png"}


def test_log_levels(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    photo, mask = tmp_path / "photo.png", _mask(tmp_path / "mask.png")
    _picture(photo)
    assert _run(model, photo, mask, "--force", "-q").stderr == ""
    assert "crop (0, 0, 80, 60) at 80x60" in _run(model, photo, mask, "--force", "-v").stderr
    monkeypatch.setenv("MISF_LOG_LEVEL", "warning")
    assert _run(model, photo, mask, "--force").stderr == ""
    assert "runs on" in _run(model, photo, mask, "--force", "-v").stderr  # flags win
    monkeypatch.setenv("MISF_LOG_LEVEL", "loud")
    result = _run(model, photo, mask, "--force")
    assert result.exit_code == 1
    assert result.stderr.endswith("misf-run: MISF_LOG_LEVEL is 'LOUD': expected one of DEBUG, INFO, WARNING, ERROR\n")


def test_the_device_comes_from_the_environment_and_flags_win(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    photo, mask = tmp_path / "photo.png", _mask(tmp_path / "mask.png")
    _picture(photo)
    monkeypatch.setenv("MISF_DEVICE", "cuda:98")
    assert _run(model, photo, mask).exit_code == 4
    assert _run(model, photo, mask, "--device", "cpu").exit_code == 0


def test_a_rotated_photograph_of_three_megapixels(model: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = Image.fromarray(data.astronaut()).resize((1600, 2000))
    shown.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.jpg", exif=exif, quality=92)
    hole = np.zeros((2000, 1600), np.bool_)
    hole[100:180, 200:300] = hole[950:1000, 20:60] = hole[1900:, 1500:] = True
    mask = _mask(tmp_path / "mask.png", hole)
    result = _run(model, tmp_path / "photo.jpg", mask, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["images"][0]["crops"] == 3
    with Image.open(tmp_path / "photo_inpainted.jpg") as filled:
        assert (filled.size, filled.getexif()[0x0112]) == ((2000, 1600), 6)
        upright = np.asarray(filled.transpose(Image.Transpose.ROTATE_270), np.int16)
    inner = upright[120:160, 220:280]
    assert np.abs(inner - np.median(inner, axis=(0, 1))).max() <= 2  # the tiny model's one colour
    known = np.abs(upright - np.asarray(shown, np.int16))[~hole]
    assert known.mean() < 3


def _subprocess(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_an_onnx_file_runs_without_torch_or_onnx(model: Path, tmp_path: Path) -> None:
    photo, mask = tmp_path / "photo.png", _mask(tmp_path / "mask.png")
    _picture(photo)
    code = (
        "import sys; from misf.runtime.run_cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'torch', 'onnx', 'openvino', 'scipy', 'rich', 'misf.training'} & set(sys.modules)))"
    )
    done = _subprocess(code, model, photo, mask, "--backend", "onnxruntime")
    assert done.stdout.splitlines()[-1] == "[]"
    with_openvino = _subprocess(code, model, photo, mask, "--backend", "openvino", "--force")
    assert "torch" not in with_openvino.stdout.splitlines()[-1]


def test_a_bar_on_a_terminal_and_clean_results_in_a_pipe(model: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    for name in ("x.png", "y.png"):
        _picture(tmp_path / "in" / name)
    terminal, stderr = pty.openpty()
    code = "from misf.runtime.run_cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        model,
        tmp_path / "in",
        _mask(tmp_path / "mask.png"),
        "--backend=onnxruntime",
    ]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        os.close(stderr)
        shown = b""
        while True:
            try:
                shown += os.read(terminal, 1 << 16)
            except OSError:  # the other end is closed
                break
        assert process.stdout is not None
        assert process.stdout.read() == "".join(f"{tmp_path / 'in_inpainted' / name}\n" for name in ("x.png", "y.png"))
    os.close(terminal)
    assert process.returncode == 0
    assert b"pictures" in shown
    assert b"2/2" in shown
    assert b"y.png: 80x60, original, 1 crop" in shown


def test_help_is_light(tmp_path: Path) -> None:
    code = (
        "import sys; from misf.runtime.run_cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'PIL', 'onnxruntime', 'rich', 'scipy', 'torch'} & set(sys.modules)))"
    )
    lines = _subprocess(code).stdout.splitlines()
    assert lines[-1] == "[]"
    assert "misf-run misf-small photo.jpg mask.png -o filled.jpg" in "\n".join(lines)
    assert _run("--version").stdout.startswith("misf-run 0.")
    assert _run("-h").exit_code == 0
    assert list(tmp_path.iterdir()) == []


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG file of these chunks, after PNG's own specification."""
    whole = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        whole += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return whole


def _indexed_without_palette() -> bytes:
    rows = zlib.compress(b"".join(b"\0" + bytes(SHAPE[1]) for _ in range(SHAPE[0])))
    header = struct.pack(">IIBBBBB", SHAPE[1], SHAPE[0], 8, 3, 0, 0, 0)
    return _png((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))


def test_a_mask_without_its_palette_is_one_line(model: Path, tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    mask.write_bytes(_indexed_without_palette())
    _picture(tmp_path / "a.png")
    result = _run(model, tmp_path / "a.png", mask)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"misf-run: {mask} is damaged: its pixels are indices into a palette, and the palette is missing"
    )
    with pytest.raises(MisfError, match="the palette is missing"):
        MaskFolder([mask]).read(0)


def test_no_picture_ends_a_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, mask = tmp_path / "in", _mask(tmp_path / "mask.png")
    for name in ("a.png", "m.png", "z.png"):
        _picture(folder / name)
    (folder / "b_without_palette.png").write_bytes(_indexed_without_palette())
    from misf.runtime import fill_file

    opened = fill_file.open_picture

    def failing(path: Path, write_as: str | None) -> Any:
        if path.name == "m.png":
            raise struct.error("a fault that nobody thought of")
        return opened(path, write_as)

    monkeypatch.setattr(fill_file, "open_picture", failing)
    result = _run(model, folder, mask, "-o", tmp_path / "out")
    assert result.exit_code == 5, result.output
    assert (tmp_path / "out" / "a.png").exists()
    assert (tmp_path / "out" / "z.png").exists()
    failed = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert ["b_without_palette.png" in failed[0], "m.png" in failed[1]] == [True, True], failed
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0no TIFF at all",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0\0\0\0\0",  # the orientation as text
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\xff\xff\xff\x7f\0\0\0\0",  # a rational beyond the end
    ],
    ids=["no TIFF", "text", "beyond the end"],
)
def test_damaged_exif_is_left_out_with_a_warning(model: Path, exif: bytes, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)
    header = struct.pack(">IIBBBBB", SHAPE[1], SHAPE[0], 8, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    (tmp_path / "x.png").write_bytes(_png((b"IHDR", header), (b"eXIf", exif), (b"IDAT", rows), (b"IEND", b"")))
    result = _run(model, tmp_path / "x.png", _mask(tmp_path / "mask.png"))
    assert result.exit_code == 0, result.output
    filled = np.asarray(Image.open(tmp_path / "x_inpainted.png"))
    assert np.array_equal(filled[~HOLE], pixels[~HOLE])
    assert not np.array_equal(filled[HOLE], pixels[HOLE])
