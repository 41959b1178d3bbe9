"""Learning from the fills of another network, judged by what both networks fill when they are asked directly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

pytest.importorskip("lightning_fabric")

from misf.plugins.shared.errors import MisfError
from misf.training import NetworkConfig, load_model
from misf.training.model.network import InpaintingNetwork
from misf.training.recipe import RECIPES, Recipe
from misf.training.train_cli import main
from misf.training.trainer import Batch, Trainer, make_fabric

TINY = NetworkConfig(width=4, prediction_width=4, prediction_convs=1, residual_dilations=(2,))
ALONE = replace(
    RECIPES["fidelity"], network=TINY, psnr=0.0, ssim=0.0, teacher=1.0, crop=32, batch=4, steps=150, learning_rate=1e-2
)


def batch(seed: int, count: int) -> Batch:
    """Smooth pictures with a box as the hole, and noise for a truth that nothing may learn from."""
    random = torch.Generator().manual_seed(seed)
    image = torch.nn.functional.interpolate(torch.rand(count, 3, 5, 5, generator=random), size=32, mode="bicubic")
    mask = torch.zeros(count, 1, 32, 32)
    mask[..., 8:20, 6 + seed % 5 : 24] = 1
    return torch.where(mask > 0, torch.rand(image.shape, generator=random), image.clamp(0, 1)), mask


def l1_in_hole(
    network: InpaintingNetwork, teacher: InpaintingNetwork, image: torch.Tensor, mask: torch.Tensor
) -> float:
    with torch.no_grad():
        fills = [net(image, mask).double().numpy() for net in (network, teacher)]
    hole = np.broadcast_to(mask.numpy() > 0, fills[0].shape)
    return float(np.abs(fills[0][hole] - fills[1][hole]).mean())


@pytest.mark.parametrize(("precision", "accumulate"), [("32-true", 1), ("bf16-mixed", 2)])
def test_the_student_moves_towards_the_teacher(precision: str, accumulate: int, tiny_checkpoint: Path) -> None:
    teacher = load_model(tiny_checkpoint)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    recipe = replace(ALONE, accumulate=accumulate)
    trainer = Trainer(recipe, make_fabric("cpu", precision), teacher=teacher)
    held_out = batch(10**6, 8)
    start = l1_in_hole(trainer.network, teacher, *held_out)
    batches = (batch(seed, 4 // accumulate) for seed in range(10**4))
    for _ in range(recipe.steps):
        numbers = trainer.train_step(batches)
    assert numbers.keys() == {"teacher", "total", "gradient"}
    end, fill = (
        l1_in_hole(trainer.network, teacher, *held_out),
        teacher(*held_out)[held_out[1].expand(-1, 3, -1, -1) > 0],
    )
    assert end < 0.6 * start
    assert end < 0.8 * float((fill - fill.median()).abs().mean())  # what a constant colour would reach
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_the_loss_is_the_l1_of_the_fills_and_zero_for_the_student_itself(tiny_checkpoint: Path) -> None:
    teacher = load_model(tiny_checkpoint)
    recipe = replace(ALONE, hole_squared=0.0, hole_coarse=0.0, steps=1)
    trainer = Trainer(recipe, make_fabric("cpu"), teacher=teacher)
    image, mask = batch(1, 4)
    expected = l1_in_hole(trainer.network, teacher, image, mask)
    assert float(trainer.train_step(iter([(image, mask)]))["teacher"]) == pytest.approx(expected, rel=1e-4)
    itself = replace(recipe, network=teacher.config)
    student = Trainer(itself, make_fabric("cpu"), weights=teacher.state_dict(), teacher=teacher)
    numbers = student.train_step(iter([(image, mask)]))
    assert float(numbers["teacher"]) == 0
    assert float(numbers["gradient"]) == 0
    with pytest.raises(MisfError, match="give --teacher"):
        Trainer(recipe, make_fabric("cpu"))


def command(output: Path, *options: str | Path) -> Result:
    fixed = ["--config", "misf-tiny", "--crop", "32", "--batch", "2", "--steps", "1", "--device", "cpu"]
    return CliRunner().invoke(main, [*fixed, "--output", str(output), *map(str, options)])


def test_weights_of_the_loss(tmp_path: Path, tiny_checkpoint: Path) -> None:
    from PIL import Image
    from skimage import data

    (tmp_path / "data").mkdir()
    Image.fromarray(data.coffee()).save(tmp_path / "data/coffee.png")

    def weight(name: str, *options: str | Path) -> float:
        result = command(tmp_path / name, "--data", tmp_path / "data", *options)
        assert result.exit_code == 0, result.stderr
        settings = json.loads((tmp_path / name / "run.json").read_text())
        return Recipe.from_json(json.dumps(settings["recipe"])).teacher

    assert weight("default", "--teacher", tiny_checkpoint) == 1
    assert weight("small", "--teacher", "misf-small", "--set", "teacher=3", "--recipe", "fidelity") == 3
    start = ("--init-from", tmp_path / "small/ema.safetensors")
    assert weight("again", *start, "--teacher", tiny_checkpoint) == 3
    assert weight("alone", *start) == 0
    for options, said in (
        (("--set", "teacher=2"), "give --teacher"),
        (("--set", "teacher=0", "--teacher", tiny_checkpoint), "leave one of them out"),
        (("--teacher", "misf-large"), "misf comes with misf-small"),
    ):
        result = command(tmp_path / "never", "--data", tmp_path / "data", *options)
        assert result.exit_code == 2
        assert said in result.stderr.splitlines()[-1]
