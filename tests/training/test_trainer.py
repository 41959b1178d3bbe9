"""Training: exact resumption after a kill, several processes, determinism, bad data, and learning."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

pytest.importorskip("lightning_fabric")

from misf.plugins.shared.errors import MisfError
from misf.training import PRESETS, NetworkConfig, load_model
from misf.training import train_cli as cli
from misf.training.dataset import Pictures, TrainingSamples, picture_paths
from misf.training.mask_drawing import RandomMasks
from misf.training.model.network import composite
from misf.training.recipe import ABLATIONS, RECIPES, Recipe
from misf.training.run_files import RunFolder
from misf.training.train_cli import main
from misf.training.trainer import StepSampler, Trainer, make_fabric, train
from misf.training.vgg19 import Vgg19

TINY = NetworkConfig(width=4, prediction_width=4, prediction_convs=1, residual_dilations=(2,))
QUICK = ["--config", "misf-tiny", "--crop", "32", "--batch", "2", "--log-every", "1", "--save-every", "3"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of the two photographs in scikit-image's wheel, as a folder of PNG files."""
    from skimage import data

    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "coffee"):
        picture = getattr(data, name)()
        for part in range(4):
            top, left = 100 * (part // 2), 150 * (part % 2)
            Image.fromarray(picture[top : top + 200, left : left + 200]).save(folder / f"{name}{part}.png")
    return folder


def samples(folder: Path, config: Recipe) -> TrainingSamples:
    return TrainingSamples(Pictures(picture_paths(folder)), RandomMasks(), crop=config.crop, seed=config.seed)


def tiny_recipe(**changes: Any) -> Recipe:
    recipe = RECIPES["paper"].without_vgg()
    return replace(recipe, **{"network": TINY, "steps": 4, "batch": 4, "crop": 32, **changes})


def log_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_s"} for line in lines]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "misf.training.train_cli", *map(str, arguments)]


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
TWO = {**ONE_THREAD, "GLOO_SOCKET_IFNAME": "lo"}


@contextmanager
def started(arguments: Sequence[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Start a process, and kill it and all of its children when the block ends."""
    process = subprocess.Popen(arguments, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def kill_while_it_saves(folder: Path) -> None:
    """Leave the files of a SIGKILL in a run's folder that comes when half of the state is written."""
    program = f"""
import os, pathlib, signal
from misf.plugins.shared.files import written_whole
with written_whole({str(folder / "state.pt")!r}) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60)
    assert done.returncode == -signal.SIGKILL


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sum in the same order here as in the processes that tests start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*arguments: str | Path) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr


def same_state(a: Any, b: Any, where: str = "state") -> None:
    """Compare two state files' contents bit for bit."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            same_state(a[name], b[name], f"{where}.{name}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            same_state(*pair, f"{where}[{index}]")
    else:
        assert a == b, where


KILLED = """
import os, signal, sys
from misf.training.run_files import RunLog
from misf.training.train_cli import main
numbers = RunLog.numbers
def dies(self, step, values):
    numbers(self, step, values)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
RunLog.numbers = dies
main(sys.argv[1:])
"""


@pytest.mark.parametrize("more", [(), ("--recipe", "fidelity", "--precision", "bf16")], ids=["paper", "muon, bf16"])
def test_killed_and_resumed_is_as_never_stopped(more: tuple[str, ...], photographs: Path, tmp_path: Path) -> None:
    arguments = ("--data", photographs, *QUICK, *more, "--steps", "10", "--device", "cpu")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*arguments, "--output", whole)
    training = [sys.executable, "-c", KILLED, *map(str, arguments), "--output", str(killed)]
    with started(training, ONE_THREAD) as process:
        errors = process.communicate(timeout=100)[1]
    assert process.returncode == -signal.SIGKILL, errors
    assert len(log_of(killed)) == 5
    kill_while_it_saves(killed)
    assert len([path for path in killed.iterdir() if path.name.startswith(".")]) == 1
    assert torch.load(killed / "state.pt", weights_only=True)["step"] == 3
    run("--resume", "--output", killed)
    assert log_of(killed) == log_of(whole)
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (killed, whole)]
    assert states[0]["step"] == 10
    same_state(*states)
    assert len(states[0]["optimizers"]) == (2 if more else 1)
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--recipe", "fidelity")], ids=["paper", "muon"])
def test_two_processes_compute_what_one_does(more: tuple[str, ...], photographs: Path, tmp_path: Path) -> None:
    arguments = ("--data", photographs, *QUICK, *more, "--steps", "3", "--batch", "4", "--device", "cpu")
    run(*arguments, "--output", tmp_path / "one")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    two = (*torchrun, *command(*arguments, "--output", tmp_path / "two")[2:])
    with started(two, TWO) as process:
        errors = process.communicate(timeout=100)[1]
    assert process.returncode == 0, errors
    for alone, together in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert alone == pytest.approx(together, rel=1e-4)
    # Predictions are compared, not weights, and only to 1e-3 (differences up to 3e-4 occur): the gradient of a bias
    # before an instance norm is only rounding, of which Adam makes full steps. The losses above are the strict check.
    image, mask = samples(photographs, tiny_recipe()).sample(5)
    with torch.no_grad():
        one, two = (load_model(tmp_path / name / "ema.safetensors")(image[None], mask[None]) for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-3)


def test_every_sample_is_used_once_however_the_work_is_split() -> None:
    config = tiny_recipe(steps=5, batch=12)
    whole = list(StepSampler(config, 0, 0, 1))
    assert whole == list(range(60))
    for accumulate, world in ((2, 1), (1, 3), (2, 3)):
        parts = [list(StepSampler(replace(config, accumulate=accumulate), 2, rank, world)) for rank in range(world)]
        per_step = 12 // world
        for step in range(3):
            used = sorted(n for part in parts for n in part[step * per_step : (step + 1) * per_step])
            assert used == whole[12 * (step + 2) : 12 * (step + 3)]
        assert all(len(part) == len(StepSampler(replace(config, accumulate=accumulate), 2, 0, world)) for part in parts)
    with pytest.raises(ValueError, match="multiple of accumulate x processes"):
        StepSampler(config, 0, 0, 5)


def losses_of(config: Recipe, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    trainer = Trainer(config, make_fabric("cpu"))
    batches = trainer.batches(samples(folder, config))
    found = [float(trainer.train_step(batches)["total"]) for _ in range(config.steps)]
    return found, trainer.average.state_dict()


def test_a_seed_decides_everything_and_accumulation_nothing(photographs: Path) -> None:
    torch.manual_seed(99)
    first, weights = losses_of(tiny_recipe(), photographs)
    torch.manual_seed(7)
    second, again = losses_of(tiny_recipe(), photographs)
    assert first == second
    same_state(dict(weights), dict(again))
    other, _ = losses_of(tiny_recipe(seed=1), photographs)
    assert other != first
    # Without the discriminator, whose spectral norms advance with every pass, accumulation only reorders sums.
    plain = {"adversarial": 0.0, "feature_matching": 0.0}
    at_once, _ = losses_of(tiny_recipe(**plain), photographs)
    in_parts, _ = losses_of(tiny_recipe(accumulate=4, **plain), photographs)
    assert in_parts == pytest.approx(at_once, rel=1e-3)


def test_bf16_is_mixed_and_learns_the_same(photographs: Path) -> None:
    """Weights, averages and losses stay float32; the loss and its gradient equal those in float32 up to rounding."""
    config = tiny_recipe(steps=1, psnr=0.1, ssim=0.5, known=1.0, perceptual=0.1, style=250.0)
    torch.manual_seed(0)
    vgg = Vgg19()
    found = []
    for precision in ("32-true", "bf16-mixed"):
        trainer = Trainer(config, make_fabric("cpu", precision), vgg=vgg)
        numbers = trainer.train_step(trainer.batches(samples(photographs, config)))
        assert {value.dtype for value in numbers.values()} == {torch.float32}, numbers
        assert all(tensor.dtype == torch.float32 for tensor in trainer.average.state_dict().values())
        gradients = [parameter.grad for parameter in trainer.network.parameters()]
        found.append(
            ({name: float(value) for name, value in numbers.items()}, torch.cat([g.flatten() for g in gradients]))
        )
    (exact, gradient), (mixed, mixed_gradient) = found
    assert mixed == pytest.approx(exact, rel=0.02)
    assert mixed != exact
    assert mixed_gradient.dtype == torch.float32
    assert torch.cosine_similarity(gradient, mixed_gradient, dim=0) > 0.99


def test_bf16_by_emulation_is_not_silent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for found, warnings in (({"avx512_bf16": True, "amx_bf16": False}, 0), ({"avx512_bf16": False, "avx2": True}, 1)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        caplog.clear()
        make_fabric("cpu", "bf16-mixed")
        assert len([record for record in caplog.records if "no bfloat16" in record.message]) == warnings


def test_one_step_is_adams_on_the_weighted_sum(photographs: Path) -> None:
    """The first step and its average: Adam with betas (0, 0.9) moves every weight by the learning rate."""
    config = tiny_recipe(steps=1, adversarial=0.0, feature_matching=0.0, learning_rate=1e-3)
    trainer = Trainer(config, make_fabric("cpu"))
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    numbers = trainer.train_step(trainer.batches(samples(photographs, config)))
    assert float(numbers["total"]) == pytest.approx(float(numbers["l1"] + numbers["hole"]))
    for name, parameter in trainer.network.named_parameters():
        assert parameter.grad is not None, name
        moved = parameter.detach() - before[name]
        expected = -1e-3 * parameter.grad / (parameter.grad.abs() + 1e-8)
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6, msg=name)
        average = before[name] + moved * (1 - 2 / 11)
        torch.testing.assert_close(trainer.average.state_dict()[name], average, rtol=1e-4, atol=1e-6, msg=name)


def test_generator_and_discriminator_learn_apart(photographs: Path) -> None:
    """Each network's loss leaves no gradient in the other network."""
    config = tiny_recipe(l1=0.0, hole=0.0, feature_matching=0.0, adversarial=1.0)
    trainer = Trainer(config, make_fabric("cpu"))
    image, mask = next(trainer.batches(samples(photographs, config)))
    trainer._pass(image, mask, last=True)
    torch.manual_seed(0)
    judge = Trainer(config, make_fabric("cpu"))
    prediction = judge.network(image, mask).detach()
    scores, _ = judge.discriminator(torch.cat([image, prediction]))
    real, fake = scores.chunk(2)
    by_hand = (torch.nn.functional.softplus(-real).mean() + torch.nn.functional.softplus(fake).mean()) / 2
    by_hand.backward()
    for (name, ours), theirs in zip(
        trainer.discriminator.module.named_parameters(), judge.discriminator.module.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_rates() -> None:
    cosine = tiny_recipe(steps=100, schedule="cosine", warm_up=9, learning_rate=1.0)
    assert cosine.rate(0) == pytest.approx(0.1)
    assert cosine.rate(9) == pytest.approx(0.98, abs=0.005)
    assert cosine.rate(50) == pytest.approx(0.5)
    assert cosine.rate(99) < 0.001
    assert tiny_recipe(learning_rate=2.0).rate(10**6) == 2.0


def test_it_learns(photographs: Path, tmp_path: Path) -> None:
    """Some hundred steps from random weights give a better picture than the start and than plain grey."""
    config = replace(RECIPES["fidelity"], network=PRESETS["misf-tiny"])
    config = replace(config, steps=150, batch=4, crop=32, learning_rate=3e-3)
    trainer = Trainer(config, make_fabric("cpu"))
    data = samples(photographs, config)
    held_out = [(image[None], mask[None]) for image, mask in map(data.sample, range(10**6, 10**6 + 8))]
    start = trainer.validate(held_out)
    folder = tmp_path / "run"
    folder.mkdir()
    train(trainer, data, RunFolder(folder), log_every=20)
    end = trainer.validate(held_out)
    errors = [composite(image, torch.full_like(image, 0.5), mask) - image for image, mask in held_out]
    grey = np.mean([-10 * np.log10(float(error.square().mean())) for error in errors])
    assert end > start + 1
    assert end > grey + 1
    network = load_model(folder / "ema.safetensors")
    with torch.no_grad():
        for image, mask in held_out[:2]:
            torch.testing.assert_close(network(image, mask), trainer.average(image, mask))
    assert list((folder / "tensorboard").iterdir())


@pytest.mark.parametrize("name", list(ABLATIONS))
def test_ablations_train(name: str, photographs: Path) -> None:
    config = tiny_recipe(network=replace(TINY, **ABLATIONS[name]), steps=1)
    trainer = Trainer(config, make_fabric("cpu"))
    trainer.train_step(trainer.batches(samples(photographs, config)))
    unused = [name for name, parameter in trainer.network.named_parameters() if parameter.grad is None]
    assert not unused


def test_a_loss_that_is_not_a_number_stops_the_run(photographs: Path, tmp_path: Path) -> None:
    config = tiny_recipe(steps=50, learning_rate=1e30)
    (tmp_path / "run").mkdir()
    trainer = Trainer(config, make_fabric("cpu"))
    with pytest.raises(MisfError, match="lower the learning rate"):
        train(trainer, samples(photographs, config), RunFolder(tmp_path / "run"), save_every=5)
    for path in (tmp_path / "run").glob("*.safetensors"):
        load_model(path)  # refuses NaN


def test_a_gradient_that_is_not_a_number_stops_the_run(photographs: Path, tmp_path: Path) -> None:
    """The loss may still be finite, but the files must be from before the bad step."""
    config = replace(RECIPES["fidelity"], network=PRESETS["misf-tiny"], steps=4, batch=2, crop=32)
    (tmp_path / "run").mkdir()
    trainer = Trainer(config, make_fabric("cpu"))
    calls = iter(range(100))
    weight = trainer.network.stem.weight
    weight.register_hook(lambda gradient: gradient * (torch.inf if next(calls) == 2 else 1))
    with pytest.raises(MisfError, match=r"the gradient norm is (inf|nan) at step 3: lower the learning rate"):
        train(trainer, samples(photographs, config), RunFolder(tmp_path / "run"), save_every=1)
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 2
    load_model(tmp_path / "run" / "ema.safetensors")  # refuses NaN


def test_switches_of_the_recipe_reach_the_samples(photographs: Path, tmp_path: Path) -> None:
    for change, shuffled in (("shuffle_colors=0", False), ("zoom_out=1.1", True)):
        output = tmp_path / change
        run("--data", photographs, *QUICK, "--recipe", "fidelity", "--set", change, "--steps", "1", "--output", output)
        settings = RunFolder(output).read_settings()
        recipe = Recipe.from_json(json.dumps(settings["recipe"]))
        assert recipe.shuffle_colors is shuffled
        assert cli._samples(settings, recipe, "cpu", 0).shuffle_colors is shuffled


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_bad_pictures_are_skipped_and_reported(photographs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    whole = sorted(photographs.iterdir())[0].read_bytes()
    (folder / "good.png").write_bytes(whole)
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not a picture")
    result = invoke("--data", folder, *QUICK, "--steps", "2", "--output", tmp_path / "run", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    for name in ("cut.png", "text.jpg"):
        assert result.stderr.count(name) == 1
    (folder / "good.png").unlink()
    result = invoke("--data", folder, *QUICK, "--steps", "2", "--output", tmp_path / "run2", "--device", "cpu")
    assert result.exit_code == 1
    assert "none of 2 pictures can be decoded" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run2").exists()
    result = invoke("--data", photographs, "--val", folder, *QUICK, "--output", tmp_path / "run3", "--device", "cpu")
    assert result.exit_code == 1
    assert "none of its pictures can be decoded" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run3").exists()


def test_the_state_is_written_last(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files must be complete if the process is killed immediately afterwards."""
    config, folder = tiny_recipe(steps=1), RunFolder(tmp_path)
    cases = [(torch.rand(1, 3, 32, 32), torch.ones(1, 1, 32, 32))]

    def killed(_state: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "write_state", killed)
    with pytest.raises(KeyboardInterrupt):
        train(Trainer(config, make_fabric("cpu")), samples(photographs, config), folder, log_every=1, cases=cases)
    assert (tmp_path / "ema.safetensors").exists()
    assert (tmp_path / "best.safetensors").exists()
    assert [sorted(line)[-1] for line in log_of(tmp_path)] == ["total", "val_psnr_db"]


def test_killed_while_it_validates_it_validates_again(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_recipe(steps=3)
    crop = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cases = [(crop, (torch.arange(32) % 2).float().expand(1, 1, 32, 32))]

    def go_on(name: str, trainer: Trainer) -> None:
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir(exist_ok=True)
        train(trainer, samples(photographs, config), folder, log_every=1, save_every=1, cases=cases)

    go_on("whole", Trainer(config, make_fabric("cpu")))
    trainer = Trainer(config, make_fabric("cpu"))
    validate = trainer.validate

    def killed(cases: Any) -> float:
        if trainer.step == 2:
            raise KeyboardInterrupt
        return validate(cases)

    monkeypatch.setattr(trainer, "validate", killed)
    with pytest.raises(KeyboardInterrupt):
        go_on("killed", trainer)
    state = RunFolder(tmp_path / "killed").read_state()
    assert state is not None
    assert state["step"] == 1
    trainer = Trainer(config, make_fabric("cpu"))
    trainer.load_state(state)
    go_on("killed", trainer)
    logs = [log_of(tmp_path / name) for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert len([line for line in logs[0] if "val_psnr_db" in line]) == 3
    best = [load_model(tmp_path / name / "best.safetensors").state_dict() for name in ("whole", "killed")]
    same_state(dict(best[0]), dict(best[1]))


def test_init_from_and_resume_rules(photographs: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    output = tmp_path / "run"
    arguments = ("--data", photographs, *QUICK[2:], "--device", "cpu", "--steps", "1", "--output", output)
    arguments = (*arguments, "--init-from", tiny_checkpoint)
    unsaid = invoke(*arguments)
    assert unsaid.exit_code == 2
    assert "does not say which recipe it was trained with: give --recipe, one of paper (450000 steps)" in unsaid.stderr
    result = invoke(*arguments, "--recipe", "paper", "--learning-rate", "1e-9", "--val", photographs)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(output / "ema.safetensors")
    trained, given = load_model(output / "ema.safetensors"), load_model(tiny_checkpoint)
    assert trained.config == given.config
    for name, tensor in given.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, atol=1e-7, rtol=0)
    assert (output / "best.safetensors").exists()
    assert "val_psnr_db" in (output / "log.jsonl").read_text()

    then = ("--data", photographs, "--init-from", output / "ema.safetensors", "--output", tmp_path / "then")
    assert invoke(*then, "--steps", "2", "--device", "cpu").exit_code == 0
    first, second = (
        Recipe.from_json(json.dumps(RunFolder(folder).read_settings()["recipe"]))
        for folder in (output, tmp_path / "then")
    )
    assert second == replace(first, steps=2)

    again = invoke(*arguments)
    assert again.exit_code == 1
    assert "already holds a run" in again.stderr
    changed = invoke("--resume", "--output", output, "--crop", "64", "--seed", "3")
    assert changed.exit_code == 2
    assert "leave out" in changed.stderr
    assert "--crop" in changed.stderr
    assert "--seed" in changed.stderr
    state = (output / "state.pt").read_bytes()
    for size in (1000, 5000, 20000):  # PyTorch raises a different exception for each
        (output / "state.pt").write_bytes(state[:size])
        damaged = invoke("--resume", "--output", output)
        assert damaged.exit_code == 1
        assert "state.pt is damaged" in damaged.stderr.splitlines()[-1]
    for position in range(60, 900, 7):
        flipped = bytearray(state)
        flipped[position] ^= 4
        (output / "state.pt").write_bytes(flipped)
        with suppress(MisfError):  # whatever the unpickler stumbles over
            RunFolder(output).read_state()
    (output / "run.json").write_text("{}")
    lacking = invoke("--resume", "--output", output)
    assert lacking.exit_code == 1
    assert "it lacks data" in lacking.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--resume",), 1, "no training run"),
        ((), 2, "--data is missing"),
        (("--data", "."), 1, "no pictures"),
        (("--data", ".", "--crop", "33"), 1, "multiple of 4"),
        (("--data", ".", "--batch", "3", "--accumulate", "2"), 1, "multiple of accumulate"),
        (("--data", ".", "--set", "style=much"), 2, "NAME=NUMBER"),
        (("--data", ".", "--set", "unknown=1"), 2, "perceptual"),
        (("--data", ".", "--set", "whole=2"), 2, "NAME=NUMBER"),
        (("--data", ".", "--optimizer", "muon"), 2, "--learning-rate"),
        (("--data", ".", "--init-from", "misf-large"), 2, "misf comes with misf-small"),
        (("--data", ".", "--masks", "nowhere"), 2, "expected random"),
        (("--data", ".", "--vgg19", "nowhere.pth"), 1, "vgg19-dcbb9e9d.pth"),
        (("--data", ".", "--recipe", "fidelity", "--vgg19", "any.pth"), 2, "leave out --vgg19"),
        (("--data", ".", "--set", "learning_rate=-1"), 1, "learning_rate must be above 0"),
        (("--data", ".", "--set", "clip=-1"), 1, "clip must be at least 0"),
        pytest.param(
            ("--data", ".", "--device", "cuda"),
            4,
            "no NVIDIA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--vgg19" in arguments:
        Image.new("RGB", (40, 40)).save("a.png")
    result = invoke("--output", tmp_path / "run", "--device", "cpu", *arguments)
    assert result.exit_code == code, result.output
    assert words in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
