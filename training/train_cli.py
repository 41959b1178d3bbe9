"""misf-train."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..plugins.shared.command import command, print_line
from ..plugins.shared.errors import MisfError
from ..plugins.shared.extras import need
from ..plugins.shared.progress import progress
from ..plugins.shared.shipped import ModelFile
from ..runtime.mask_options import READING, mask_options
from .model.config import PRESETS
from .model.options import official_option
from .recipe import ABLATIONS, ADVERSARIAL, OPTIMIZERS, RECIPES, SCHEDULES, TEACHER_WEIGHT, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from .dataset import TrainingSamples
    from .efficientnet import FeatureDistance
    from .model.checkpoint import Checkpoint
    from .model.network import InpaintingNetwork
    from .resident import ResidentSamples
    from .run_files import RunFolder
    from .vgg19 import Vgg19

log = logging.getLogger(__name__)

EXISTING = click.Path(exists=True, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
PACE = ("log_every", "save_every", "picture_every")
"""Options that --resume takes from the run, unless they are given again."""
ANY_TIME = ("output", "resume", "auto_resume", "device", "workers", "stop_after", *PACE)
"""Options that do not change what a run computes, and are therefore allowed with --resume."""
PATHS = ("data", "damage", "val", "init_from", "vgg19", "teacher")
"""Options that run.json keeps as absolute paths, or null."""
ADDED = ("mask_values", "damage", "teacher")
"""Settings that run.json of older versions lacks: None."""
PLAIN = ("invert_mask", "mask_threshold", "mask_values", "precision", "resident", "perceptual_backbone")
"""Options that run.json keeps unchanged."""
STARTED = time.monotonic()


@command("misf-train")
@click.option(
    "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for the run's files."
)
@click.option("--resume", is_flag=True, help="Continue the run in --output with the settings it was started with.")
@click.option(
    "--auto-resume", is_flag=True, help="Continue the run in --output if there is one: for launchers that restart."
)
@click.option("--data", type=EXISTING, help="Folder or list of pictures.")
@click.option("--masks", default="random", show_default=True, help="random, or a folder or list of mask files.")
@mask_options(READING)
@click.option(
    "--damage",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of masks of what is damaged in the pictures of --data, found by their names as misf-run finds masks.",
)
@click.option(
    "--val",
    type=EXISTING,
    help="Folder or list of pictures to validate on; the best weights are kept as best.safetensors.",
)
@click.option(
    "--config", type=click.Choice(list(PRESETS)), default="misf", show_default=True, help="The network to train."
)
@click.option(
    "--filters",
    type=click.Choice(list(ABLATIONS)),
    help="Which dynamic filters the network has, as in the paper's ablations.",
)
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    help="Losses, optimizer and schedule.  [default: the recipe of --init-from, or paper]",
)
@click.option(
    "--init-from",
    type=ModelFile(weights=True),
    help="Checkpoint to start from, or misf-small. Its network and its recipe are the defaults of --config and "
    "--recipe; of another --config, the layers that fit get its weights.",
)
@official_option
@click.option("--vgg19", type=click.Path(path_type=Path), help="torchvision's VGG-19 weights, for the paper's losses.")
@click.option(
    "--perceptual-backbone",
    metavar="NAME|FILE",
    multiple=True,
    default=["lite0"],
    show_default=True,
    help="EfficientNet for the recipe's feature distance: lite0 (extra `looks`), or a file of its weights. "
    "If repeated, the networks take turns.",
)
@click.option(
    "--teacher",
    type=ModelFile(weights=True),
    help="Checkpoint whose fills are learned from too, or misf-small; --set teacher=NUMBER weighs that loss.  "
    f"[default weight: {TEACHER_WEIGHT:g}]",
)
@click.option("--steps", type=click.IntRange(min=1), help="Number of training steps.  [default: the recipe's]")
@click.option("--batch", type=click.IntRange(min=1), help="Samples per step, over all processes.")
@click.option(
    "--accumulate", type=click.IntRange(min=1), help="Split each batch into this many passes (gradient accumulation)."
)
@click.option("--crop", type=click.IntRange(min=8), help="Side of the square crops in pixels.")
@click.option(
    "--zoom-out",
    type=click.FloatRange(min=1),
    help="Cut squares of up to this many times --crop and shrink them to --crop.",
)
@click.option("--whole", is_flag=True, help="Train on each picture's middle square, resized, instead of crops.")
@click.option(
    "--optimizer",
    type=click.Choice(OPTIMIZERS),
    help="Optimizer of the generator; muon needs a higher learning rate (4e-3).",
)
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), help="Learning rate of the generator.")
@click.option("--schedule", type=click.Choice(SCHEDULES), help="Schedule of the learning rate.")
@click.option("--adversarial-kind", type=click.Choice(ADVERSARIAL), help="The adversarial loss.")
@click.option("--set", "changes", multiple=True, metavar="NAME=NUMBER", help="Set any other number of the recipe.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of weights, crops and masks.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="bf16 is mixed precision.",
)
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that load pictures."
)
@click.option(
    "--resident",
    type=click.IntRange(min=1),
    metavar="MASKS",
    help="Keep all pictures and this many masks in the memory of the device.",
)
@click.option(
    "--stop-after",
    type=click.IntRange(min=1),
    metavar="SECONDS",
    help="Save and stop after this time; --resume continues.",
)
@click.option(
    "--log-every", type=click.IntRange(min=1), default=50, show_default=True, help="Steps between log entries."
)
@click.option(
    "--save-every", type=click.IntRange(min=1), default=500, show_default=True, help="Steps between saved states."
)
@click.option(
    "--picture-every",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Steps between picture grids in TensorBoard.",
)
def main(output: Path, resume: bool, auto_resume: bool, **options: Any) -> None:
    """Train a network. The run can be killed at any moment and resumed exactly.

    OUTPUT gets state.pt (for --resume), ema.safetensors (for misf-export and misf-eval), best.safetensors (with --val),
    run.json, log.jsonl and TensorBoard curves. Several GPUs: start it with torchrun.

    \b
    Examples:
        misf-train --data photographs/ --config misf-small --recipe fidelity --output runs/small
        misf-train --resume --output runs/small
        misf-train --data mine/ --init-from misf-small --steps 2000 --output runs/mine
        torchrun --nproc-per-node 4 -m misf.training.train_cli --data places/ --output runs/full --precision bf16
    """
    need("misf-train", "train", "torch", "cv2", "lightning_fabric")
    from .run_files import RunFolder

    folder = RunFolder(output)
    if resume:
        _refuse_changes()
    resume = resume or (auto_resume and folder.exists)  # on every process before rank 0 can have written anything
    if resume:
        settings = {**dict.fromkeys(ADDED), **folder.read_settings()}
        needed = {"recipe", *PATHS, *PLAIN, "masks", *PACE}
        if lacking := needed - settings.keys():
            raise MisfError(
                f"{folder.settings} is damaged or from another version: it lacks {', '.join(sorted(lacking))}"
            )
        options |= {name: settings[name] for name in PACE if not _given(name)}
    if not resume:
        if folder.exists:
            raise MisfError(
                f"{output} already holds a run: continue it with --resume, or start another from its weights with "
                f"--init-from {folder.weights} --output ANOTHER"
            )
        if options["data"] is None:
            raise click.UsageError("--data is missing: give a folder or a list of pictures")
        settings = _settings(options)
    _run(folder, settings, options, resume)


def _given(name: str) -> bool:
    """Return whether the user gave the option."""
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _refuse_changes() -> None:
    parameters = click.get_current_context().command.params
    fixed = [parameter for parameter in parameters if parameter.name and parameter.name not in ANY_TIME]
    given = [parameter.opts[0] for parameter in fixed if parameter.name and _given(parameter.name)]
    given = [option for option in given if option not in ("-v", "-q", "--version")]
    if given:
        raise click.UsageError(
            f"--resume continues with the settings of the run: leave out {', '.join(given)}, or start another run "
            "from its weights with --init-from"
        )


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of run.json: the recipe, and where everything is."""
    import json

    recipe = _recipe(options)
    if options["masks"] != "random" and not Path(options["masks"]).exists():
        raise click.UsageError(f"--masks {options['masks']}: expected random, or a folder or list of mask files")
    files = options["masks"] != "random" or options["damage"]
    if not files and (options["invert_mask"] or options["mask_values"]):
        raise click.UsageError("--invert-mask and --mask-value are for mask files: give --masks FOLDER")
    return {
        "recipe": json.loads(recipe.to_json()),
        **{name: options[name] and str(options[name].resolve()) for name in PATHS},
        "masks": options["masks"] if options["masks"] == "random" else str(Path(options["masks"]).resolve()),
        **{name: options[name] for name in (*PLAIN, *PACE)},
    }


def _recipe(options: dict[str, Any]) -> Recipe:
    """Return the recipe that the options describe."""
    network, start = PRESETS[options["config"]], None
    if options["init_from"]:
        from .model.checkpoint import load_checkpoint

        if options["filters"]:
            raise click.UsageError("--filters would change the network of --init-from: leave one of them out")
        start = load_checkpoint(options["init_from"])
        if not _given("config"):
            network = start.config
    elif options["filters"]:
        network = replace(network, **ABLATIONS[options["filters"]])
    recipe = _base_recipe(options["recipe"], start)
    if recipe.needs_vgg and not options["vgg19"]:
        recipe = recipe.without_vgg()
        log.info("no --vgg19: features of the discriminator replace those of VGG (see docs/training.md)")
    names = (
        "steps",
        "batch",
        "accumulate",
        "crop",
        "zoom_out",
        "optimizer",
        "learning_rate",
        "schedule",
        "adversarial_kind",
        "seed",
    )
    chosen: dict[str, Any] = {name: options[name] for name in names if options[name] is not None}
    if options["whole"]:
        chosen["whole"] = True
    if options["optimizer"] not in (None, recipe.optimizer) and options["learning_rate"] is None:
        raise click.UsageError(
            f"--optimizer {options['optimizer']} needs another learning rate than the recipe's "
            f"{recipe.learning_rate:g}: give --learning-rate too (muon about 4e-3, adamw about 1e-4)"
        )
    chosen |= _numbers(options["changes"])
    chosen["teacher"] = _teacher_weight(options["teacher"], recipe, chosen.get("teacher"))
    recipe = replace(recipe, network=network, **chosen)
    if options["vgg19"] and not recipe.needs_vgg:
        raise click.UsageError("the recipe does not use VGG-19 features: leave out --vgg19")
    return recipe


def _teacher_weight(teacher: Path | None, recipe: Recipe, chosen: float | None) -> float:
    """Return the weight of the loss `teacher`: the one `chosen` by --set, the recipe's, or the default."""
    if teacher is None:
        if chosen:
            raise click.UsageError(f"--set teacher={chosen:g} is the weight of a teacher's fills: give --teacher")
        return 0.0  # also where the weights of --init-from were trained with a teacher
    if chosen == 0:
        raise click.UsageError("--set teacher=0 leaves nothing to learn from --teacher: leave one of them out")
    return chosen or recipe.teacher or TEACHER_WEIGHT


def _base_recipe(name: str | None, start: Checkpoint | None) -> Recipe:
    """Return the recipe of that name or, without one, the recipe that the weights of `start` were trained with."""
    if name or start is None:
        return RECIPES[name or "paper"]
    if not start.recipe:
        named = ", ".join(f"{name} ({recipe.steps} steps)" for name, recipe in RECIPES.items())
        raise click.UsageError(
            f"{start.path} does not say which recipe it was trained with: give --recipe, one of {named}"
        )
    recipe = Recipe.from_json(start.recipe)
    log.info(
        "using the recipe that %s was trained with; --recipe, --steps and other options change it", start.path.name
    )
    return recipe


def _numbers(changes: tuple[str, ...]) -> dict[str, float | int | bool]:
    """Return the values of --set by name: the recipe's numbers and switches (0 or 1)."""
    kinds: dict[str, Callable[[str], float | int | bool]] = {
        "float": float,
        "int": int,
        "bool": lambda text: {"0": False, "1": True}[text],
    }
    known = {item.name: kinds[str(item.type)] for item in fields(Recipe) if item.type in kinds}
    found: dict[str, float | int | bool] = {}
    for change in changes:
        name, _, text = change.partition("=")
        try:
            found[name] = known[name](text)
            if found[name] != found[name]:
                raise ValueError("not a number")
        except (KeyError, ValueError):
            raise click.UsageError(
                f"--set {change}: expected NAME=NUMBER with a name out of {', '.join(known)}"
            ) from None
    return found


def _run(folder: RunFolder, settings: dict[str, Any], options: dict[str, Any], resume: bool) -> None:
    import json

    from .dataset import TrainingSamples
    from .trainer import Trainer, make_fabric, train

    recipe = Recipe.from_json(json.dumps(settings["recipe"]))
    fabric = make_fabric(options["device"], {"fp32": "32-true", "bf16": "bf16-mixed"}[settings["precision"]])
    if not fabric.is_global_zero:
        logging.getLogger("misf").setLevel(logging.ERROR)
    samples = _samples(settings, recipe, fabric.device, options["workers"])
    trainer = Trainer(
        recipe,
        fabric,
        vgg=_vgg(settings, recipe),
        distances=_feature_distances(settings, recipe),
        weights=_weights(settings),
        teacher=_teacher(settings),
    )
    cases = _cases(settings, fabric.device) if fabric.is_global_zero else None
    if isinstance(samples, TrainingSamples):
        samples.sample(0)  # fail before the folder is created if no picture or no mask is usable
    state = folder.read_state() if resume else None
    if state is not None:
        trainer.load_state(state)
    elif fabric.is_global_zero:
        folder.write_settings(settings)
    parameters = sum(parameter.numel() for parameter in trainer.average.parameters())
    log.info(
        "%.2f M parameters, %d pictures, %s x %d, from step %d to %d",
        *(parameters / 1e6, len(samples), fabric.device, fabric.world_size, trainer.step, recipe.steps),
    )
    parts = ("seconds", int(recipe.seconds), int(trainer.elapsed_s))
    if not recipe.seconds:
        parts = ("steps", recipe.steps, trainer.step)
    try:
        with progress(*parts, lines=fabric.is_global_zero) as step:
            train(
                trainer,
                samples,
                folder,
                workers=options["workers"],
                log_every=options["log_every"],
                save_every=options["save_every"],
                picture_every=options["picture_every"],
                stop_at=STARTED + options["stop_after"] if options["stop_after"] else math.inf,
                cases=cases,
                progress=lambda done, text: (
                    step(int(trainer.elapsed_s), text=f"step {done}, {text}")
                    if recipe.seconds
                    else step(done, text=text)
                ),
            )
    except KeyboardInterrupt:
        saved = (
            "no state has been saved yet" if not folder.state.exists() else f"the last saved state is {folder.state}"
        )
        log.info("stopped at step %d; %s (--save-every), and --resume continues from there", trainer.step, saved)
        raise
    trainer.close()
    if fabric.is_global_zero:
        log.info("done; the weights are in")
        print_line(str(folder.weights))


def _samples(settings: dict[str, Any], recipe: Recipe, device: Any, workers: int) -> TrainingSamples | ResidentSamples:
    from ..runtime.pictures.masks import MaskSettings
    from .damage import DamageMasks
    from .dataset import MaskSource, Pictures, TrainingSamples, picture_paths
    from .mask_drawing import MaskFolder, RandomMasks

    masks: MaskSource = RandomMasks()
    values = settings["mask_values"]
    reading = MaskSettings(
        settings["mask_threshold"], settings["invert_mask"], values=None if values is None else tuple(values)
    )
    if settings["masks"] != "random":
        masks = MaskFolder(picture_paths(settings["masks"]), reading)
    paths: Sequence[Path] = picture_paths(settings["data"])
    damage = None
    if settings["damage"]:
        source = Path(settings["data"])
        damage = DamageMasks(paths, source if source.is_dir() else source.parent, Path(settings["damage"]), reading)
        paths = damage.pictures
    pictures = Pictures(paths)
    pictures.preload()
    if damage is not None:
        damage.check(pictures)
    if settings["resident"]:
        from .resident import ResidentSamples

        return ResidentSamples(
            pictures,
            masks,
            stock=settings["resident"],
            crop=recipe.crop,
            seed=recipe.seed,
            zoom_out=recipe.zoom_out,
            shuffle_colors=recipe.shuffle_colors,
            device=device,
            workers=workers,
            damage=damage,
        )
    return TrainingSamples(
        pictures,
        masks,
        crop=recipe.crop,
        seed=recipe.seed,
        zoom_out=recipe.zoom_out,
        whole=recipe.whole,
        shuffle_colors=recipe.shuffle_colors,
        damage=damage,
    )


def _vgg(settings: dict[str, Any], recipe: Recipe) -> Vgg19 | None:
    if not recipe.needs_vgg:
        return None
    from .vgg19 import load_vgg19

    return load_vgg19(settings["vgg19"])


def _feature_distances(settings: dict[str, Any], recipe: Recipe) -> list[FeatureDistance]:
    if not recipe.distance:
        return []
    from .efficientnet import JUDGE, load_feature_distance

    found = [load_feature_distance(source) for source in settings["perceptual_backbone"]]
    if any(distance.variant == JUDGE for distance in found):
        log.warning("--perceptual-backbone %s: misf-eval judges with it, and flatters what it trained", JUDGE)
    return found


def _teacher(settings: dict[str, Any]) -> InpaintingNetwork | None:
    if not settings["teacher"]:
        return None
    from .model.checkpoint import load_model

    return load_model(settings["teacher"])


def _weights(settings: dict[str, Any]) -> dict[str, Tensor] | None:
    if not settings["init_from"]:
        return None
    from .model.checkpoint import load_checkpoint

    return load_checkpoint(settings["init_from"]).weights


def _cases(settings: dict[str, Any], device: Any) -> list[tuple[Tensor, ...]] | None:
    """Return up to 8 validation pictures per mask band, cropped to 256x256; the choice is always the same."""
    if not settings["val"]:
        return None
    import torch

    from .dataset import Pictures, picture_paths
    from .judging.evaluate import cases

    found: list[tuple[Tensor, ...]] = []
    for case in cases(Pictures(picture_paths(settings["val"])), size=256, seed=0, per_band=8):
        image = torch.from_numpy(case.truth.transpose(2, 0, 1).copy()).float().div_(255)
        mask = torch.from_numpy(case.hole.astype("float32"))
        found.append((image[None].to(device), mask[None, None].to(device)))
    if not found:
        raise MisfError(f"--val {settings['val']}: none of its pictures can be decoded")
    return found


if __name__ == "__main__":
    main()
