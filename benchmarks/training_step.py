"""A training step of misf compared with a plain implementation: images per second and peak memory.

    python benchmarks/training_step.py --config misf --size 128 --batch 4

`misf` is one step of `misf-train` (L1, adversarial, feature matching): channels-last on a GPU, a filter that only saves
its inputs for the backward pass, real and fake pictures in one pass of the discriminator, and no unused gradients.
`misf, bf16` is the same with --precision bf16, if the device computes in bfloat16.
`plain` has the same networks and losses in the published code's order of operations, in float32: NCHW, nine shifted
copies stacked and multiplied by the expanded taps, and separate calls of the discriminator for real pictures, fake
pictures and the generator's loss. Every measurement is a separate process, and the variants take turns. The results are
the medians of the steps' times, and the peak memory of the process minus its memory before the first step.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional as F

VARIANTS = {"plain": "32-true", "misf": "32-true", "misf, bf16": "bf16-mixed"}
"""Name -> Fabric's precision."""


def plain_filter(features: Tensor, taps: Tensor, kernel_size: int = 3, share: int = 1) -> Tensor:
    """Return the dynamic filter by K*K shifted copies of the features and the taps expanded to one per copy."""
    height, width = features.shape[2:]
    padded = F.pad(features, (kernel_size // 2,) * 4)
    copies = [padded[:, :, i : i + height, j : j + width] for i in range(kernel_size) for j in range(kernel_size)]
    expanded = taps.repeat_interleave(share, dim=1).unflatten(1, (features.shape[1], kernel_size**2))
    return (torch.stack(copies, dim=2) * expanded).sum(dim=2)


def plain_step(config: Any) -> Callable[[Tensor, Tensor], None]:
    """Return the step in the published code's order of operations, after patching the modules of this process."""
    from misf.training import losses
    from misf.training.discriminator import PatchDiscriminator
    from misf.training.model import network

    network.dynamic_filter = plain_filter
    generator = network.InpaintingNetwork(config.network)
    network.initialize(generator)
    for module in generator.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
    judge = PatchDiscriminator()
    optimizer = torch.optim.Adam(generator.parameters(), config.learning_rate, betas=config.betas)
    judging = torch.optim.Adam(judge.parameters(), config.learning_rate / 10, betas=config.betas)

    def step(image: Tensor, mask: Tensor) -> None:
        prediction = generator(image, mask)
        of_image, real_features = judge(image)
        of_fake, _ = judge(prediction.detach())
        judging.zero_grad()
        loss = losses.adversarial_loss(of_image, True) + losses.adversarial_loss(of_fake, False)
        (loss / 2).backward()
        judging.step()
        optimizer.zero_grad()
        scores, features = judge(prediction)
        total = losses.l1_over_mask(prediction, image, mask) + losses.hole_loss(prediction, image, mask)
        total = total + config.adversarial * losses.adversarial_loss(scores, True, for_generator=True)
        total = total + config.feature_matching * losses.feature_matching_loss(features, real_features)
        total.backward()
        optimizer.step()

    return step


def our_step(config: Any, precision: str) -> Callable[[Tensor, Tensor], None]:
    """Return the step of misf-train."""
    from misf.training.trainer import Trainer, make_fabric

    trainer = Trainer(config, make_fabric("auto", precision))
    device = trainer.fabric.device

    def step(image: Tensor, mask: Tensor) -> None:
        image = image.to(device, memory_format=trainer.layout)
        trainer.train_step(iter([(image, mask.to(device))]))

    return step


def measure(variant: str, name: str, size: int, batch: int, steps: int) -> dict[str, float]:
    """Return one process's median seconds per step and peak memory in MB."""
    from dataclasses import replace

    from misf.training.model.config import PRESETS
    from misf.training.recipe import RECIPES

    config = replace(RECIPES["paper"].without_vgg(), network=PRESETS[name], crop=size, batch=batch, ema_decay=0.999)
    step = plain_step(config) if variant == "plain" else our_step(config, VARIANTS[variant])
    image = torch.rand(batch, 3, size, size)
    mask = (torch.rand(batch, 1, size // 8, size // 8) > 0.7).float()
    mask = F.interpolate(mask, size=(size, size))
    before = memory_mb()
    step(image, mask)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step(image, mask)
        times.append(time.perf_counter() - start)
    return {"s": statistics.median(times), "peak_mb": memory_mb() - before}


def memory_mb() -> float:
    """Return this process's peak memory so far in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@click.command()
@click.option("--config", "name", default="misf", show_default=True, help="Preset of the network.")
@click.option("--size", default=128, show_default=True, help="Side of the crops in pixels.")
@click.option("--batch", default=4, show_default=True)
@click.option("--steps", default=3, show_default=True, help="Steps per process, after one for warm-up.")
@click.option("--rounds", default=2, show_default=True, help="Processes per variant.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file for the results.")
@click.option("--only", type=click.Choice(list(VARIANTS)), hidden=True)
def main(name: str, size: int, batch: int, steps: int, rounds: int, output: Path | None, only: str | None) -> None:
    """Measure the variants and print a table."""
    if only:
        click.echo(json.dumps(measure(only, name, size, batch, steps)))
        return
    from misf.training.trainer import computes_bf16

    with_bf16 = torch.cuda.is_available() or computes_bf16()
    variants = [variant for variant, precision in VARIANTS.items() if with_bf16 or precision == "32-true"]
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    sizes = ["--config", name, "--size", str(size), "--batch", str(batch), "--steps", str(steps)]
    for _ in range(rounds):
        for variant in variants:
            command = [sys.executable, __file__, *sizes, "--only", variant]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
    rows = {
        variant: {
            "images_per_s": batch / statistics.median(run["s"] for run in runs),
            "peak_mb": statistics.median(run["peak_mb"] for run in runs),
        }
        for variant, runs in found.items()
    }
    processor = torch.backends.cpu.get_cpu_capability()
    click.echo(f"{name}, {batch} x {size}x{size}, torch {torch.__version__}, {processor}\n")
    click.echo("| | images/s | / plain | peak memory of a step, MB | / plain |\n| --- | ---: | ---: | ---: | ---: |")
    for variant, row in rows.items():
        speed, memory = (row[name] / rows["plain"][name] for name in ("images_per_s", "peak_mb"))
        click.echo(f"| {variant} | {row['images_per_s']:.2f} | {speed:.2f} | {row['peak_mb']:.0f} | {memory:.2f} |")
    if output:
        settings = {"config": name, "size": size, "batch": batch, "threads": torch.get_num_threads()}
        document = {"settings": settings, "torch": torch.__version__, "results": rows, "runs": found}
        output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
