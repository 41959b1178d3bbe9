"""misf-explain: networks whose filters are set by hand show what they do, and the parts add up to the prediction."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from misf.runtime import Inpainter
from misf.training import PRESETS, NetworkConfig
from misf.training.judging.explain import PictureFilter, chosen_points, explain
from misf.training.judging.explain_cli import main
from misf.training.model.checkpoint import save_checkpoint
from misf.training.model.network import InpaintingNetwork, initialize

TINY = PRESETS["misf-tiny"]
SMALL = replace(PRESETS["misf-small"], width=4, prediction_width=4, residual_dilations=(2,), detail=4)
UNFILTERED = replace(TINY, feature_filter_level=0, image_filter=False)


def network_of(config: NetworkConfig, noise: float = 0.05) -> InpaintingNetwork:
    """Return a network with initial weights, and `noise` on them so that every part does something."""
    torch.manual_seed(0)
    network = InpaintingNetwork(config)
    initialize(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    return network.eval()


def set_taps(layer: torch.nn.Conv2d, taps: np.ndarray) -> None:
    """Make a layer that predicts taps give these K x K to every pixel of every channel; none of them shared."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.from_numpy(np.tile(taps.ravel(), len(layer.bias) // taps.size)))


def picture_and_hole(height: int = 64, width: int = 80) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).random((height, width, 3), np.float32)
    hole = np.zeros((height, width), np.bool_)
    hole[16:40, 24:56] = True
    return image, hole


@pytest.mark.parametrize(("config", "factor"), [(TINY, 1), (SMALL, 4)], ids=["tiny", "detail"])
def test_taps_that_shift_show_the_shift(config: NetworkConfig, factor: int) -> None:
    network = network_of(config)
    taps = np.zeros((3, 3), np.float32)
    taps[0, 2] = -0.5  # one up, one right; the sign does not matter
    set_taps(network.prediction.image_taps, taps)
    found = explain(network, *picture_and_hole()).picture_filter
    assert found.taps.shape == (64 // factor, 80 // factor, 3, 3, 3)
    assert np.allclose(found.offset, (factor, -factor))
    assert np.allclose(found.spread, 0, atol=1e-3)
    taps[2, 0] = 0.5  # as much from the opposite side: the middle, sqrt(2) pixels from both
    set_taps(network.prediction.image_taps, taps)
    found = explain(network, *picture_and_hole()).picture_filter
    assert np.allclose(found.offset, 0)
    assert np.allclose(found.spread, factor * np.sqrt(2))
    nothing = PictureFilter(factor, np.zeros_like(found.taps))
    assert not nothing.offset.any()
    assert not nothing.spread.any()


def test_the_picture_before_and_after_a_shift() -> None:
    network = network_of(TINY)
    taps = np.zeros((3, 3), np.float32)
    taps[1, 2] = 1
    set_taps(network.prediction.image_taps, taps)
    layers, shifted = explain(network, *picture_and_hole()).parts
    assert (layers.name, shifted.name) == ("layers", "picture's filter")
    assert np.allclose(shifted.picture[:, :-1], layers.picture[:, 1:], atol=1e-6)
    assert np.allclose(shifted.picture[:, -1], 0.5)  # zeros from outside, half way between -1 and 1


@pytest.mark.parametrize("size", [(64, 80), (59, 71)])
@pytest.mark.parametrize(
    ("config", "names"),
    [
        (TINY, ["layers", "picture's filter"]),
        (SMALL, ["smooth fill", "layers", "picture's filter", "detail head", "clipping"]),
        (replace(SMALL, image_filter=False), ["smooth fill", "layers", "detail head", "clipping"]),
        (replace(TINY, feature_filter_level=2), ["layers", "picture's filter"]),
        (UNFILTERED, ["layers"]),
    ],
    ids=["tiny", "detail", "detail-unfiltered", "level-2", "unfiltered"],
)
def test_parts_add_up_to_the_prediction(config: NetworkConfig, names: list[str], size: tuple[int, int]) -> None:
    network = network_of(config)
    image, hole = picture_and_hole(*size)
    given: list[torch.Tensor] = []  # the picture that the head was really given
    if config.detail:
        network.detail.register_forward_hook(lambda _module, inputs, _output: given.append(inputs[2][0]))
    found = explain(network, image, hole)
    with torch.no_grad():
        mask = torch.from_numpy(hole[None, None].astype(np.float32))
        expected = network(torch.from_numpy(image.transpose(2, 0, 1)[None].copy()), mask)[0].permute(1, 2, 0).numpy()
    assert [part.name for part in found.parts] == names
    assert np.allclose(image[~hole].mean(0) + sum(part.change for part in found.parts), expected, atol=1e-5)
    if config.detail:
        real = given[0][0, :, : size[0], : size[1]].permute(1, 2, 0).numpy()
        assert np.allclose(found.parts[-3].picture, real, atol=1e-5)
    assert all(np.abs(part.change[hole]).max() > 1e-3 for part in found.parts if part.name != "clipping")
    assert (found.feature_filter is None) == (config.feature_filter_level == 0)
    assert (found.picture_filter is None) == (not config.image_filter)


def test_an_untrained_network_is_its_smooth_fill() -> None:
    """The layers and the detail head start at zero, as training needs, and an identity filter adds nothing."""
    network = network_of(SMALL, noise=0)
    taps = np.zeros((3, 3), np.float32)
    taps[1, 1] = 1
    set_taps(network.prediction.image_taps, taps)
    found = explain(network, *picture_and_hole())
    change = {part.name: np.abs(part.change[found.hole]).max() for part in found.parts}
    assert change.pop("smooth fill") > 0.01
    assert max(change.values()) < 1e-6


@pytest.mark.parametrize("config", [TINY, SMALL], ids=["tiny", "detail"])
def test_an_identity_filter_leaves_the_picture_as_the_layers_made_it(config: NetworkConfig) -> None:
    network = network_of(config)
    taps = np.zeros((3, 3), np.float32)
    taps[1, 1] = 1
    set_taps(network.prediction.image_taps, taps)
    parts = {part.name: part for part in explain(network, *picture_and_hole()).parts}
    assert np.abs(parts["layers"].change).max() > 0.01
    assert np.abs(parts["picture's filter"].change).max() < 1e-5


@pytest.mark.parametrize("gain", [1, 2])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_energy_of_the_features(level: int, gain: int) -> None:
    network = network_of(replace(TINY, share=1, feature_filter_level=level, normalize=False))
    taps = np.zeros((3, 3), np.float32)
    taps[1, 1] = gain
    set_taps(network.prediction.feature_taps, taps)
    image, hole = picture_and_hole()
    found = explain(network, image, hole).feature_filter
    factor = 2 ** (level - 1)
    assert (found.factor, found.before.shape) == (factor, (64 // factor, 80 // factor))
    assert np.allclose(found.after, gain**2 * found.before)
    assert (np.abs(found.left_out).max() > 1e-3) == (gain == 2)
    inside = hole[::factor, ::factor]  # the hole's sides are multiples of the factor
    for place, cells in (("hole", inside), ("known", ~inside)):
        assert found.means[place]["before"] == pytest.approx(found.before[cells].mean())
        assert found.means[place]["after"] == pytest.approx(found.after[cells].mean())


def test_a_picture_without_known_pixels() -> None:
    image, hole = picture_and_hole()
    found = explain(network_of(TINY), image, np.ones_like(hole))
    assert found.known_mean.tolist() == [0.5] * 3
    assert found.feature_filter.means["known"] == {"before": None, "after": None}
    assert found.feature_filter.means["hole"]["before"] == pytest.approx(found.feature_filter.before.mean())


def test_chosen_points() -> None:
    hole = np.zeros((64, 80), np.bool_)
    hole[10:51, 20:61] = True
    taps = np.zeros((64, 80, 3, 3, 3), np.float32)
    taps[..., 1, 1] = 1
    taps[40, 25, :, 1, 1], taps[40, 25, :, 1, 0] = 0, 1  # the farthest shift in the hole
    taps[40, 55] = 1  # the widest spread
    taps[5, 5, :, 1, 1], taps[5, 5, :, 0, 0] = 0, 1  # outside
    points = {point.why: (point.x, point.y) for point in chosen_points(hole, PictureFilter(1, taps))}
    assert points.pop("deepest in the hole") == (40, 30)
    assert points.pop("at the hole's edge") in [(40, 10), (40, 50), (20, 30), (60, 30)]
    assert points == {"farthest shift": (25, 40), "widest spread": (55, 40)}
    one = np.zeros((64, 80), np.bool_)
    one[3, 4] = True
    assert [(point.x, point.y) for point in chosen_points(one, PictureFilter(1, taps))] == [(4, 3)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 200x150 with its mask, an empty mask, one of another size, and a network without filters."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (150, 200, 3), np.uint8)).save(folder / "photo.png")
    mask = np.zeros((150, 200), np.uint8)
    mask[30:60, 100:140] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(0 * mask).save(folder / "empty.png")
    Image.fromarray(mask[:100]).save(folder / "short.png")
    network = network_of(UNFILTERED)
    save_checkpoint(folder / "unfiltered.safetensors", network.config, network.state_dict())
    return folder


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_command(files: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = (tiny_checkpoint, files / "photo.png", files / "mask.png", "-o", tmp_path / "new" / "page")
    result = run(*arguments, "--size", 100, "--at", "120,45", "--at", "0,149")
    assert result.exit_code == 0, result.stderr
    page = tmp_path / "new" / "page" / "index.html"
    assert result.stdout == f"{page}\n"
    text = page.read_text()
    assert "<script" not in text
    assert "http" not in text
    shown = set(re.findall(r'src="([^"]+)"', text))
    numbers = json.loads((page.parent / "numbers.json").read_text())
    assert (
        {path.name for path in page.parent.iterdir()} == {"index.html", "numbers.json", *shown} == {*numbers["files"]}
    )
    width, height = numbers["size"]["width"], numbers["size"]["height"]
    assert (width, height) == (115, 87)  # 200x150 at the area of 100x100
    for name in shown:
        with Image.open(page.parent / name) as picture:
            assert (picture.mode, picture.size) == ("RGB", (width, height))
    points = [(point["x"], point["y"]) for point in numbers["picture_filter"]["points"]]
    assert points == [(120 * 115 // 200, 45 * 87 // 150), (0, 149 * 87 // 150)]
    assert f"{numbers['parts'][0]['mean']:.2f}" in text

    again = run(*arguments, "--json", "--invert-mask")  # replaces the result, with other points
    assert again.exit_code == 0, again.stderr
    numbers = json.loads(again.stdout)
    assert numbers["hole_pixels"] == 150 * 200 - 30 * 40
    assert numbers == json.loads((page.parent / "numbers.json").read_text())
    assert sorted(path.name for path in page.parent.iterdir()) == numbers["files"]
    assert [path.name for path in page.parent.parent.iterdir()] == ["page"]
    inpaint = Inpainter(tiny_checkpoint, strategy="resize", invert_mask=True)
    with Image.open(page.parent / "filled.png") as filled, Image.open(files / "photo.png") as photo:
        assert np.array_equal(np.asarray(filled), np.asarray(inpaint(photo, files / "mask.png")))


@pytest.mark.parametrize("size", [(300, 100), (150, 100), (240, 225)], ids=str)
def test_coarse_maps_lie_where_the_picture_does(size: tuple[int, int], tmp_path: Path) -> None:
    """A value of the shipped network's features is a square of pixels, whatever the size."""
    width, height = size
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / "photo.png")
    mask = np.zeros((height, width), np.uint8)
    mask[40:60, 60:90] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    network = network_of(PRESETS["misf-small"])
    save_checkpoint(tmp_path / "small.safetensors", network.config, network.state_dict())
    arguments = (tmp_path / "small.safetensors", tmp_path / "photo.png", tmp_path / "mask.png")
    result = run(*arguments, "-o", tmp_path / "page")
    assert result.exit_code == 0, result.stderr
    factor = PRESETS["misf-small"].scale << (PRESETS["misf-small"].feature_filter_level - 1)
    energy = np.asarray(Image.open(tmp_path / "page" / "energy-after.png")).astype(int)
    energy[38:62, 58:92] = 0  # the hole's outline
    rows = np.flatnonzero(np.abs(np.diff(energy[:, :50], axis=0)).sum((1, 2))) + 1
    columns = np.flatnonzero(np.abs(np.diff(energy[:36], axis=1)).sum((0, 2))) + 1
    assert len(rows)
    assert len(columns)
    assert not (rows % factor).any()
    assert not (columns % factor).any()


def test_a_network_without_filters(files: Path, tmp_path: Path) -> None:
    arguments = (files / "unfiltered.safetensors", files / "photo.png", files / "mask.png", "-o", tmp_path / "page")
    numbers = json.loads(run(*arguments, "--json").stdout)
    assert (numbers["feature_filter"], numbers["picture_filter"]) == (None, None)
    assert "filter of" not in (tmp_path / "page" / "index.html").read_text()
    result = run(*arguments, "--at", "1,1")
    assert (result.exit_code, result.stderr.count("has none")) == (2, 1)


@pytest.mark.parametrize(
    ("picture", "mask", "options", "code", "complaint"),
    [
        ("photo.png", None, (), 2, "Missing argument 'MASK'"),
        ("photo.png", None, ("--mask-from-alpha",), 1, "alpha channel"),
        ("photo.png", "empty.png", (), 1, "empty.png marks no hole"),
        ("photo.png", "short.png", (), 1, "--resize-mask"),
        ("photo.png", "mask.png", ("--at", "5"), 2, "X,Y"),
        ("photo.png", "mask.png", ("--at", "5,-1"), 2, "whole numbers"),
        ("photo.png", "mask.png", ("--at", "200,0"), 2, "X up to 199"),
        ("photo.png", "mask.png", ("--size", "8"), 2, "--size"),
        ("unfiltered.safetensors", "mask.png", (), 1, "unfiltered.safetensors"),
    ],
)
def test_mistakes_are_one_line(
    files: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    picture: str,
    mask: str | None,
    options: tuple[str, ...],
    code: int,
    complaint: str,
) -> None:
    paths = [files / name for name in (picture, mask) if name]
    result = run(tiny_checkpoint, *paths, "-o", tmp_path / "page", *options)
    assert result.exit_code == code
    assert complaint in result.stderr
    assert len([line for line in result.stderr.splitlines() if "WARNING" not in line]) == 1
    assert (result.stdout, list(tmp_path.iterdir())) == ("", [])


def test_folders_of_others_are_left_alone(files: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = (tiny_checkpoint, files / "photo.png", files / "mask.png", "-o", tmp_path / "page")
    (tmp_path / "page").mkdir()
    assert run(*arguments).exit_code == 0  # an empty folder will do
    (tmp_path / "page" / "notes.txt").write_text("mine")
    before = sorted((tmp_path / "page").iterdir())
    result = run(*arguments)
    assert (result.exit_code, "notes.txt" in result.stderr) == (1, True)
    assert sorted((tmp_path / "page").iterdir()) == before
    for content in ("mine", "{}", '{"tool": "misf-explain", "files": 3}'):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "numbers.json").write_text(content)
        result = run(*arguments[:-1], tmp_path / "other")
        assert (result.exit_code, "numbers.json" in result.stderr) == (1, True)
        assert (tmp_path / "other" / "numbers.json").read_text() == content
    result = run(*arguments[:-1], files / "photo.png")
    assert (result.exit_code, "not a folder" in result.stderr) == (1, True)
