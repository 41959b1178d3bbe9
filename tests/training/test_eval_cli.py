"""misf-eval: crops, seeded masks, every kind of model, and bad data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from click.testing import CliRunner, Result
from PIL import Image

from misf.training.dataset import Pictures, picture_paths
from misf.training.judging.eval_cli import main
from misf.training.judging.evaluate import Case, Method, cases, centre_crop, evaluate, model_fill
from misf.training.judging.metrics import psnr_db
from misf.training.mask_drawing import BANDS, KINDS, MaskFolder, band_name

from .efficientnet_lite import LITE0, LITE2, random_weights, reference_distance
from .golden.make_official import GOLDEN, official_weights, picture_and_mask


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs, one smaller than the crop."""
    data = tmp_path_factory.mktemp("data")
    for name, width in (("astronaut", 160), ("chelsea", 120), ("coffee", 50)):
        picture = Image.fromarray(getattr(skimage.data, name)())
        picture.resize((width, width * picture.height // picture.width)).save(data / f"{name}.png")
    return data


def all_cases(folder: Path, **settings: Any) -> list[Case]:
    return list(cases(Pictures(picture_paths(folder)), size=64, **settings))


def test_cases(folder: Path) -> None:
    found = all_cases(folder)
    assert [(case.name, case.group) for case in found] == [
        (f"{name}.png", band_name(band)) for name in ("astronaut", "chelsea", "coffee") for band in BANDS
    ]
    for case, band in zip(found, 3 * BANDS, strict=True):
        assert (case.truth.shape, case.hole.shape) == ((64, 64, 3), (64, 64))
        assert band[0] <= case.hole.mean() <= band[1]
        assert (case.damaged[case.hole] == 0).all()
        assert np.array_equal(case.damaged[~case.hole], case.truth[~case.hole])
    whole = np.asarray(Image.open(folder / "astronaut.png"))
    assert np.array_equal(found[0].truth, whole[48:112, 48:112])


def test_masks_depend_on_seed_and_picture_alone(folder: Path) -> None:
    first, again, other = all_cases(folder), all_cases(folder), all_cases(folder, seed=1)
    assert all(np.array_equal(a.hole, b.hole) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a.hole, b.hole) for a, b in zip(first, other, strict=True))
    assert len({case.hole.tobytes() for case in first}) == 9
    # A subset has the same masks as the whole set.
    subset = all_cases(folder, per_band=2)
    assert [case.name for case in subset[::3]] == ["astronaut.png", "coffee.png"]
    assert all(np.array_equal(a.hole, b.hole) for a, b in zip(subset, first[:3] + first[6:], strict=True))
    assert len(all_cases(folder, per_band=1)) == 3
    assert len(all_cases(folder, per_band=99)) == 9


def test_kinds_of_masks_take_the_place_of_the_bands(folder: Path) -> None:
    found, again, other = (all_cases(folder, by="kind", seed=seed) for seed in (0, 0, 1))
    assert [case.group for case in found] == [*KINDS] * 3
    assert all(np.array_equal(a.hole, b.hole) for a, b in zip(found, again, strict=True))
    for a, b in zip(found, other, strict=True):
        assert np.array_equal(a.hole, b.hole) == (a.group == "centre box")
    assert len({case.hole.tobytes() for case in found}) == 3 * 3 + 1


def test_centre_crop_enlarges_small_pictures() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    expected = Image.fromarray(picture[:, 10:40]).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(centre_crop(picture, 64), np.asarray(expected))
    assert np.array_equal(centre_crop(picture, 21), picture[4:25, 14:35])
    expected = Image.fromarray(picture[:, 10:40]).resize((21, 21), Image.Resampling.LANCZOS)
    assert np.array_equal(centre_crop(picture, 21, resize=True), np.asarray(expected))


def test_mask_files_are_grouped_by_their_area(folder: Path, tmp_path: Path) -> None:
    for percent in (10, 15, 50, 90):
        grey = np.zeros((100, 100), np.uint8)
        grey[:percent] = 255
        Image.fromarray(grey).save(tmp_path / f"{percent}.png")
    found = all_cases(folder, masks=MaskFolder(picture_paths(tmp_path)))
    shares = [(case.group, round(100 * case.hole.mean())) for case in found]
    # No mask has 20-40 %, and 90 % is in no band; the two small masks take turns.
    small = [share for band, share in shares if band == "0-20%"]
    assert small == pytest.approx([10, 15, 10], abs=1)
    assert [band for band, _ in shares] == ["0-20%", "40-60%"] * 3


def test_methods_are_measured_on_the_composite(folder: Path) -> None:
    def fill(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
        assert (picture[hole] == 0).all()
        return np.full(picture.shape, 0.5, np.float32)

    method = Method("grey", fill)
    for case, (result,) in evaluate([method], all_cases(folder)):
        assert np.array_equal(result[~case.hole], case.truth[~case.hole])
        assert (result[case.hole] == 128).all()
        assert method.rows[-1]["psnr_db"] == psnr_db(case.truth, result)
    report = method.report()
    assert [report["bands"][band]["pictures"] for band in ("0-20%", "20-40%", "40-60%")] == [3, 3, 3]
    rows = [row["psnr_db"] for row in method.details() if row["band"] == "20-40%"]
    assert report["bands"]["20-40%"]["psnr_db"] == pytest.approx(np.mean(rows))
    assert "lpips" not in report["all"]  # absent, not a constant


def test_a_broken_model_is_named(folder: Path) -> None:
    method = Method("broken.onnx", lambda picture, hole: np.full(picture.shape, np.nan))  # noqa: ARG005
    with pytest.raises(ValueError, match=r"broken\.onnx on astronaut\.png: .*not finite"):
        list(evaluate([method], all_cases(folder)))


def test_checkpoint_and_onnx_agree(folder: Path, tiny_checkpoint: Path, tiny_onnx: Path) -> None:
    case = all_cases(folder)[1]
    checkpoint, where = model_fill(tiny_checkpoint)
    assert where.startswith("pytorch")
    onnx, where = model_fill(tiny_onnx, backend="onnxruntime", device="cpu")
    assert where == "onnxruntime cpu fp32"
    pictures = [fill(case.damaged, case.hole)[case.hole] for fill in (checkpoint, onnx)]
    assert np.ptp(pictures[0].astype(float)) > 0.05
    assert np.abs(pictures[0].astype(float) - pictures[1].astype(float)).max() < 1e-4


def test_command(folder: Path, tiny_checkpoint: Path, tiny_onnx: Path) -> None:
    arguments = ("--checkpoint", tiny_checkpoint, "--model", tiny_onnx, "--peers", "--data", folder, "--size", 64)
    result = run(*arguments, "--backend", "onnxruntime", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    names = [method["name"] for method in document["methods"]]
    assert names == [tiny_checkpoint.name, tiny_onnx.name, "telea", "navier-stokes", "biharmonic"]
    torch_, onnx, telea = (document["methods"][i]["bands"]["40-60%"] for i in range(3))
    assert torch_["psnr_db"] == pytest.approx(onnx["psnr_db"], abs=0.01)
    assert telea["psnr_db"] > torch_["psnr_db"] + 1  # the metric separates untrained weights from a classical method
    assert str(folder) not in result.stdout
    again = json.loads(run(*arguments, "--backend", "onnxruntime", "--json").stdout)
    for one, two in zip(document["methods"], again["methods"], strict=True):
        assert one["details"] == two["details"]


def test_table(folder: Path) -> None:
    result = run("--peers", "--data", folder, "--size", 32, "--per-band", 1)
    assert result.exit_code == 0
    for text in ("0-20% (1)", "20-40% (1)", "40-60% (1)", "navier-stokes", "PSNR dB", "SSIM"):
        assert text in result.stdout
    assert "LPIPS" not in result.stdout


def test_results_by_kind(folder: Path) -> None:
    arguments = ("--peers", "--data", folder, "--size", 32, "--per-band", 2, "--by", "kind")
    shown = run(*arguments).stdout
    assert all(f"{kind} (2)" in shown for kind in ("strokes", "boxes", "centre box", "outlines"))
    assert "20-40%" not in shown
    document = json.loads(run(*arguments, "--json").stdout)
    assert document["settings"]["by"] == "kind"
    for method in document["methods"]:
        assert "bands" not in method
        for kind, means in method["kinds"].items():
            rows = [row["hole_psnr_db"] for row in method["details"] if row["kind"] == kind]
            assert len(rows) == means["pictures"] == 2
            assert means["hole_psnr_db"] == pytest.approx(np.mean(rows))


def test_feature_distance_is_that_of_the_composite(folder: Path, tmp_path: Path) -> None:
    state = random_weights(LITE2)
    torch.save(state, tmp_path / "weights.pth")
    arguments = ("--peers", "--data", folder, "--size", 64, "--feature-distance", tmp_path / "weights.pth")
    result = run(*arguments, "--json")
    telea = json.loads(result.stdout)["methods"][0]["details"]
    for case, row in zip(all_cases(folder), telea, strict=True):
        filled = cv2.inpaint(case.damaged, case.hole.astype(np.uint8), 3, cv2.INPAINT_TELEA)
        filled[~case.hole] = case.truth[~case.hole]
        pair = [torch.from_numpy(x.transpose(2, 0, 1)[None] / np.float32(255)) for x in (case.truth, filled)]
        assert row["lite2"] == pytest.approx(float(reference_distance(state, LITE2, *pair)[0]), rel=1e-3)
        assert "lpips" not in row
    assert "Lite2" in run(*arguments).stdout
    assert "flatters" not in result.stderr
    torch.save(random_weights(LITE0), tmp_path / "weights.pth")
    result = run(*arguments, "--per-band", 1)
    assert "Lite0" in result.stdout
    assert result.stderr.count("EfficientNet-lite0, with which misf-train trains") == 1


def test_resize_reaches_the_crops(folder: Path) -> None:
    telea = []
    for flags in ((), ("--resize",)):
        document = json.loads(run("--peers", "--data", folder, "--size", 32, "--json", *flags).stdout)
        assert document["settings"]["resize"] == bool(flags)
        telea.append(document["methods"][0]["all"]["psnr_db"])
    assert telea[0] != telea[1]


def test_bad_pictures_end_in_exit_code_5(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "good.png").write_bytes((folder / "chelsea.png").read_bytes())
    result = run("--peers", "--data", tmp_path, "--size", 32, "--json")
    assert result.exit_code == 5
    assert [bad["name"] for bad in json.loads(result.stdout)["data"]["bad"]] == ["broken.jpg"]
    assert result.stderr.count("broken.jpg") == 1
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    result = run("--peers", "--data", tmp_path, "--size", 32, "--json")
    assert [bad["name"] for bad in json.loads(result.stdout)["data"]["bad"]] == ["broken.jpg", "more/broken.jpg"]
    (tmp_path / "good.png").unlink()
    result = run("--peers", "--data", tmp_path)
    assert result.exit_code == 1
    assert "nothing was measured" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("--data", "{data}"), 2, "nothing to measure"),
        (("--peers",), 2, "--data"),
        (("--peers", "--data", "{data}", "--backend", "foo"), 2, "'foo' is not one of"),
        (("--peers", "--data", "{data}", "--precision", "fp8"), 2, "'fp8' is not one of"),
        (("--peers", "--data", "{data}/missing"), 2, "missing"),
        (("--peers", "--data", "{data}", "--invert-mask"), 2, "--masks FOLDER"),
        (("--peers", "--data", "{data}", "--size", "8"), 2, "--size"),
        (("--peers", "--data", "{data}", "--masks", "{data}/none"), 1, "found nothing"),
        (("--model", "{data}/chelsea.png", "--data", "{data}"), 1, "chelsea.png"),
        (("--checkpoint", "{data}/chelsea.png", "--data", "{data}"), 1, "chelsea.png"),
        (("--peers", "--data", "{data}", "--lpips", "{data}/chelsea.png"), 1, "alexnet-owt-7be5be79.pth"),
        (("--peers", "--data", "{data}", "--feature-distance", "{data}/chelsea.png"), 1, "of an EfficientNet-Lite"),
        (("--peers", "--data", "{data}", "--feature-distance", "lite7"), 1, "expected lite0, lite1, lite2"),
        (("--peers", "--data", "{data}", "--by", "kind", "--masks", "{data}"), 2, "omit --masks"),
    ],
)
def test_mistakes_are_one_line(folder: Path, arguments: tuple[str, ...], code: int, complaint: str) -> None:
    result = run(*(argument.format(data=folder) for argument in arguments))
    assert result.exit_code == code
    assert complaint in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.slow
def test_official_checkpoints(tmp_path: Path) -> None:
    """The result is the official network's stored output, up to the rounding of an 8-bit input."""
    with np.load(GOLDEN) as golden:
        shapes = {
            str(name): tuple(int(side) for side in shape if side)
            for name, shape in zip(golden["names"], golden["shapes"], strict=True)
        }
        patch = golden["patch"]
    torch.save({"iteration": 1, "generator": official_weights(shapes)}, tmp_path / "places2_InpaintingModel_gen.pth")
    picture, mask = (tensor[0].numpy() for tensor in picture_and_mask())
    fill, where = model_fill(tmp_path / "places2_InpaintingModel_gen.pth")
    assert where.startswith("pytorch")
    hole = mask[0] > 0
    damaged = np.where(hole[:, :, None], 0, np.round(picture.transpose(1, 2, 0) * 255)).astype(np.uint8)
    filling = fill(damaged, hole)[120:160, 180:220].transpose(2, 0, 1)
    filled = hole[120:160, 180:220]
    assert np.sqrt(np.mean((filling.astype(float) - patch)[:, filled] ** 2)) < 0.1 * patch.std()
