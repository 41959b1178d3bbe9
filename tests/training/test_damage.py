"""Pictures that are damaged themselves: nothing that is learned may depend on what the damaged pixels look like."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor

pytest.importorskip("lightning_fabric")

from misf.plugins.shared.errors import MisfError
from misf.runtime.pictures.masks import MaskSettings
from misf.training import PRESETS, NetworkConfig
from misf.training.damage import DamageMasks, resized_damage
from misf.training.dataset import Pictures, TrainingSamples, picture_paths
from misf.training.efficientnet import FeatureDistance
from misf.training.losses import without_damage
from misf.training.mask_drawing import RandomMasks
from misf.training.recipe import RECIPES, Recipe
from misf.training.resident import ResidentSamples
from misf.training.run_files import RunLog
from misf.training.train_cli import main
from misf.training.trainer import Compared, Trainer, make_fabric
from misf.training.vgg19 import Vgg19

TINY = NetworkConfig(width=4, prediction_width=4, prediction_convs=1, residual_dilations=(2,))
MAGENTA = (255, 0, 255)
EVERY_LOSS = dict.fromkeys(
    ("l1", "hole", "psnr", "ssim", "known", "distance", "grid", "perceptual", "style", "adversarial"), 1.0
)
EVERY_LOSS |= {"feature_matching": 1.0}


def scratches(height: int, width: int) -> np.ndarray:
    """A stain and a diagonal scratch two pixels wide, bool H,W."""
    rows, columns = np.mgrid[:height, :width]
    stain = (rows - 0.3 * height) ** 2 + (columns - 0.6 * width) ** 2 < (0.12 * height) ** 2
    return stain | (abs(rows - columns * height / width) < 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `magenta` and `noise`, the same three pictures with other garbage, and their `damage`."""
    from skimage import data

    rng = np.random.default_rng(0)
    for number, name in enumerate(("astronaut", "coffee", "chelsea")):
        picture = getattr(data, name)()[50:218, 60 : 240 + 8 * number]
        damaged = scratches(*picture.shape[:2]) & (name != "chelsea")
        noise = rng.integers(0, 256, picture.shape, np.uint8)
        for garbage, pixels in (("magenta", np.broadcast_to(np.uint8(MAGENTA), picture.shape)), ("noise", noise)):
            path = tmp_path / garbage / ("sub" if number else ".") / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.where(damaged[..., None], pixels, picture)).save(path)
        if damaged.any():
            mask = tmp_path / "damage" / ("sub/coffee_mask1.png" if number else "astronaut.bmp")
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(damaged).save(mask)
    return tmp_path


def damage_of(folder: Path, garbage: str) -> DamageMasks:
    return DamageMasks(picture_paths(folder / garbage), folder / garbage, folder / "damage")


def make_samples(
    folder: Path, garbage: str, crop: int, *, resident: bool = False, zoom_out: float = 1.5, damage: bool = True
) -> TrainingSamples | ResidentSamples:
    pictures, known = Pictures(picture_paths(folder / garbage)), damage_of(folder, garbage) if damage else None
    if resident:
        return ResidentSamples(pictures, RandomMasks(), stock=4, crop=crop, zoom_out=zoom_out, damage=known)
    return TrainingSamples(pictures, RandomMasks(), crop=crop, zoom_out=zoom_out, damage=known)


def make_trainer(recipe: Recipe) -> Trainer:
    torch.manual_seed(0)
    return Trainer(recipe, make_fabric("cpu"), vgg=Vgg19() if recipe.needs_vgg else None, distances=_distances(recipe))


def _distances(recipe: Recipe) -> list[FeatureDistance]:
    return [FeatureDistance("lite0")] if recipe.distance else []


def trained(recipe: Recipe, samples: TrainingSamples | ResidentSamples) -> dict[str, Tensor]:
    """Return all weights after the recipe's steps; every number logged must be finite."""
    trainer = make_trainer(recipe)
    batches = trainer.batches(samples)
    for _ in range(recipe.steps):
        assert all(bool(number.isfinite()) for number in trainer.train_step(batches).values())
    state = trainer.state()
    return {
        f"{name}.{key}": value
        for name in ("generator", "average", "discriminator")
        for key, value in state.get(name, {}).items()
    }


QUICK = {"network": TINY, "steps": 3, "batch": 3, "crop": 48}
CASES = {
    "paper": (replace(RECIPES["paper"], **QUICK), False),
    "paper without VGG, lsgan": (replace(RECIPES["paper"].without_vgg(), adversarial_kind="lsgan", **QUICK), True),
    "fidelity, misf-small": (
        replace(RECIPES["fidelity"], network=PRESETS["misf-small"], steps=2, batch=2, crop=144),
        False,
    ),
    "looks": (replace(RECIPES["looks"], adversarial_from=0.0, **QUICK), True),
    "everything": (replace(RECIPES["paper"], **QUICK, **EVERY_LOSS, accumulate=3), False),
}


@pytest.mark.parametrize("case", list(CASES))
def test_weights_do_not_depend_on_damaged_pixels(case: str, folder: Path) -> None:
    recipe, resident = CASES[case]

    def weights(garbage: str, damage: bool = True) -> dict[str, Tensor]:
        return trained(recipe, make_samples(folder, garbage, recipe.crop, resident=resident, damage=damage))

    magenta, noise, unmasked = weights("magenta"), weights("noise"), weights("magenta", damage=False)
    assert magenta.keys() == noise.keys()
    for name, tensor in magenta.items():
        assert torch.equal(tensor, noise[name]), name
    assert not all(torch.equal(tensor, unmasked[name]) for name, tensor in magenta.items())


@pytest.mark.parametrize("name", list(EVERY_LOSS))
def test_no_gradient_reaches_damaged_pixels(name: str) -> None:
    """Neither towards the truth nor towards the zeros or fills that stand for it."""
    alone = dict.fromkeys(EVERY_LOSS, 0.0) | {name: 1.0} | ({"adversarial": 1e-9} if name == "feature_matching" else {})
    trainer = make_trainer(replace(RECIPES["paper"], **QUICK | alone))
    random = torch.Generator().manual_seed(1)
    side = 96 if name == "grid" else 48
    prediction, image = torch.rand(2, 2, 3, side, side, generator=random)
    damaged = torch.from_numpy(scratches(side, side)).expand(2, 1, side, side).float()
    mask = damaged.clone()
    mask[..., side // 8 : -side // 8, 10 : side - 8] = 1
    prediction.requires_grad_()
    seen, truth, hole = without_damage(prediction, image, mask, damaged)
    compared = Compared(seen, truth, mask, hole, damaged)
    _, features = trainer._judge(compared, 1.0, True) if trainer.discriminator else (None, None)
    trainer._generator_terms(compared, features)[name].backward()
    assert prediction.grad is not None
    strength = prediction.grad.abs().sum(dim=1, keepdim=True)
    assert strength[damaged > 0].max() == 0
    assert strength[hole > 0].min() > 0 if name not in ("known", "grid", "adversarial") else strength.max() > 0


def test_losses_are_means_over_the_pixels_that_are_whole() -> None:
    some = dict.fromkeys(EVERY_LOSS, 0.0) | {"known": 1.0, "psnr": 1.0}
    trainer = make_trainer(replace(RECIPES["paper"], **QUICK | some))
    random = torch.Generator().manual_seed(1)
    prediction, image = torch.rand(2, 1, 3, 48, 48, generator=random)
    damaged = torch.from_numpy(scratches(48, 48))[None, None].float()
    mask = damaged.clone()
    mask[..., 10:40, 20:30] = 1
    seen, truth, hole = without_damage(prediction, image, mask, damaged)
    found = trainer._generator_terms(Compared(seen, truth, mask, hole, damaged), None)
    error = (prediction - image)[0].numpy()
    drawn = np.zeros((48, 48), bool)
    drawn[10:40, 20:30] = True
    filled, known = drawn & ~scratches(48, 48), ~drawn & ~scratches(48, 48)
    assert float(found["psnr"]) == pytest.approx(np.log(np.square(error[:, filled]).mean() + 2e-4), rel=1e-5)
    assert float(found["known"]) == pytest.approx(np.abs(error[:, known]).mean(), rel=1e-5)


@pytest.mark.parametrize("recipe", ["everything", "fidelity, misf-small"])
def test_a_picture_that_is_all_damage_teaches_nothing_and_breaks_nothing(recipe: str, folder: Path) -> None:
    for path in picture_paths(folder / "damage"):
        with Image.open(path) as mask:
            Image.new("1", mask.size, 1).save(path)
    config, _ = CASES[recipe]
    trained(config, make_samples(folder, "magenta", config.crop))


@pytest.mark.parametrize("resident", [False, True])
def test_damage_moves_with_the_picture(resident: bool, folder: Path) -> None:
    """The pixels marked are those that are magenta, and those of the picture without a mask are none."""
    samples = make_samples(folder, "magenta", 48, resident=resident, zoom_out=1.0)
    plain = make_samples(folder, "magenta", 48, resident=resident, zoom_out=1.0, damage=False)
    shares = []
    for number in range(30):
        if isinstance(samples, ResidentSamples):
            (image, mask, damaged), others = (each[0] for each in samples.batch(number, 1)), plain.batch(number, 1)  # type: ignore[union-attr]
            image_alone, hole = (each[0] for each in others)
        else:
            image, mask, damaged = samples.sample(number)
            image_alone, hole = plain.sample(number)  # type: ignore[union-attr]
        assert torch.equal(image, image_alone)
        magenta = (image == torch.tensor(MAGENTA).div(255)[:, None, None]).all(dim=0, keepdim=True)
        assert torch.equal(damaged > 0, magenta)
        assert torch.equal(mask > 0, magenta | (hole > 0))
        shares.append(float(damaged.mean()))
    assert min(shares) == 0
    assert max(shares) > 0.05


@pytest.mark.parametrize("size", [(61, 80), (30, 97), (200, 131), (45, 45)])
def test_all_that_resizing_smears_is_damage(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    damaged = np.zeros((97, 110), bool)
    damaged[[0, 40, 41, 96], [3, 50, 50, 109]] = True
    pictures = [rng.integers(0, 256, (97, 110, 3), np.uint8) for _ in range(8)]
    whole = rng.integers(0, 256, (97, 110, 3), np.uint8)
    resized = [
        np.asarray(
            Image.fromarray(np.where(damaged[..., None], garbage, whole)).resize(size[::-1], Image.Resampling.LANCZOS)
        )
        for garbage in pictures
    ]
    smeared = (np.ptp(np.stack(resized), axis=0) > 0).any(axis=2)
    marked = resized_damage(damaged, size)
    assert smeared.any()
    assert not (smeared & ~marked).any()
    assert marked.sum() < 3 * smeared.sum()


def test_masks_beside_the_pictures_are_no_pictures(folder: Path) -> None:
    root = folder / "magenta"
    shutil.copy(folder / "damage/sub/coffee_mask1.png", root / "sub/coffee_mask1.png")
    beside = DamageMasks(picture_paths(root), root, root)
    assert [path.name for path in beside.pictures] == ["astronaut.png", "chelsea.png", "coffee.png"]
    assert len(beside) == 1
    shutil.copytree(folder / "damage", root / "damage")
    Image.new("1", (9, 9)).save(root / "damage/stray.png")
    (root / "sub/coffee_mask1.png").unlink()
    below = DamageMasks(picture_paths(root), root, root / "damage", MaskSettings(invert=True))
    assert [path.name for path in below.pictures] == ["astronaut.png", "chelsea.png", "coffee.png"]
    assert len(below) == 2
    size = (168, 180)
    assert np.array_equal(below.of(root / "astronaut.png", size), ~scratches(*size))


def command(folder: Path, output: str, *options: str | Path) -> Result:
    fixed = ("--data", folder / "magenta", "--damage", folder / "damage", "--config", "misf-tiny", "--crop", "48")
    fixed = (*fixed, "--batch", "2", "--steps", "4", "--log-every", "1", "--save-every", "2", "--device", "cpu")
    return CliRunner().invoke(main, [*map(str, fixed), "--output", str(folder / output), *map(str, options)])


def test_masks_that_do_not_fit_are_one_line(folder: Path) -> None:
    mask = folder / "damage/astronaut.bmp"
    Image.new("L", (50, 40)).save(mask)
    wrong = command(folder, "run")
    assert wrong.exit_code == 1
    said = "astronaut.bmp is 50x40 and its picture astronaut.png 180x168 (width x height)"
    assert said in wrong.stderr.splitlines()[-1]
    mask.write_bytes(b"no picture")
    broken = command(folder, "run", "--resident", "3")
    assert broken.exit_code == 1
    assert "astronaut.bmp" in broken.stderr.splitlines()[-1]
    assert not (folder / "run").exists()
    shutil.copy(folder / "magenta/astronaut.png", folder / "damage/astronaut.png")
    with pytest.raises(MisfError, match=r"2 masks for astronaut.png: astronaut.bmp, astronaut.png; expected one"):
        damage_of(folder, "magenta")
    shutil.rmtree(folder / "damage")
    (folder / "damage").mkdir()
    with pytest.raises(MisfError, match=r"no mask for any of 3 pictures: expected astronaut\.\* or"):
        damage_of(folder, "magenta")


def test_interrupted_and_resumed_is_as_never_stopped(
    folder: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--teacher", tiny_checkpoint, "--set", "teacher=0.5")
    whole = command(folder, "whole", *options)
    assert whole.exit_code == 0, whole.stderr
    assert "of 2 pictures; 1 have none" in whole.stderr
    numbers = RunLog.numbers

    def interrupted(self: RunLog, step: int, values: dict[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt
        numbers(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "numbers", interrupted)
        assert command(folder, "halted", *options).exit_code == 130
    resumed = CliRunner().invoke(main, ["--resume", "--output", str(folder / "halted"), "--device", "cpu"])
    assert resumed.exit_code == 0, resumed.stderr
    one, two = (torch.load(folder / name / "state.pt", weights_only=True) for name in ("whole", "halted"))
    assert one["step"] == two["step"] == 4
    for part in ("generator", "average", "discriminator"):
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])
