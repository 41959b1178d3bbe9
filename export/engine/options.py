"""The options of an engine, shared by misf-build and by misf-export -o X.plan."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...plugins.shared.command import HxW

if TYPE_CHECKING:
    from .builder import EngineOptions, EngineReport

NAMES = (
    "backend",
    "min_shape",
    "opt_shape",
    "max_shape",
    "max_batch",
    "workspace",
    "opt_level",
    "timing_cache",
    "plugin",
    "no_plugin",
    "device",
)
"""Names of the parameters that `engine_options` adds."""


_OPTIONS = (
    click.option(
        "--backend",
        type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
        default="auto",
        show_default=True,
        help="TensorRT, or TensorRT for RTX (builds without a GPU, no plugin); auto: the first one installed.",
    ),
    click.option("--min-shape", type=HxW(), default="64x64", show_default=True, help="Smallest picture size."),
    click.option(
        "--opt-shape", type=HxW(), help="Picture size to optimise for.  [default: the network's working size]"
    ),
    click.option("--max-shape", type=HxW(), default="1024x1024", show_default=True, help="Largest picture size."),
    click.option("--max-batch", type=click.IntRange(min=1), default=1, show_default=True, help="Largest batch."),
    click.option(
        "--workspace",
        type=click.FloatRange(min=0, min_open=True),
        help="Memory that the build may use, in GiB.  [default: all]",
    ),
    click.option(
        "--opt-level", type=click.IntRange(0, 5), help="Optimisation level of the builder.  [default: TensorRT's, 3]"
    ),
    click.option(
        "--timing-cache",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Timing cache to read and update.  [default: in the cache folder, TensorRT only]",
    ),
    click.option(
        "--plugin",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Plugin library for the filter.  [default: MISF_PLUGIN, or what misf-plugin build installed]",
    ),
    click.option(
        "--no-plugin", is_flag=True, help="Build the filter from standard layers: slower, but no library is needed."
    ),
    click.option("--device", help="GPU to build for: cuda or cuda:N.  [default: MISF_DEVICE, or the first]"),
)


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of an engine to a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def given(ctx: click.Context) -> list[str]:
    """Return the engine options that the user gave, as flags."""
    source = click.core.ParameterSource.COMMANDLINE
    return [f"--{name.replace('_', '-')}" for name in NAMES if ctx.get_parameter_source(name) is source]


def parse_engine_options(values: dict[str, Any], precision: str | None) -> EngineOptions:
    """Return the engine options in a command's parameters; click.UsageError if they contradict each other."""
    from ...runtime.backends.contract import device_index, parse_device
    from ...runtime.engines.side_car import Limits
    from .builder import EngineOptions

    if values["plugin"] and values["no_plugin"]:
        raise click.UsageError("--plugin and --no-plugin contradict each other: give one of them")
    chosen = values["opt_shape"]  # None: the builder uses the network's working size
    shapes = [values["min_shape"], chosen or values["min_shape"], values["max_shape"]]
    for axis, side in enumerate(("height", "width")):
        sides = [shape[axis] for shape in shapes]
        if sides != sorted(sides):
            low, best, high = sides
            raise click.UsageError(
                f"--min-shape, --opt-shape and --max-shape must be in ascending order, got {side} {low}, {best}, {high}"
            )
    (h0, w0), (h1, w1), (h2, w2) = shapes
    batch = values["max_batch"]
    device = parse_device(values["device"] or os.environ.get("MISF_DEVICE") or "auto")
    if device == "cpu":
        raise click.UsageError("engines run on GPUs only: give --device cuda or cuda:N, or leave it out")
    return EngineOptions(
        backend=values["backend"],
        limits=Limits((1, h0, w0), (batch, h1, w1), (batch, h2, w2)),
        opt_by_network=chosen is None,
        precision=precision,
        workspace_gib=values["workspace"],
        opt_level=values["opt_level"],
        timing_cache=values["timing_cache"],
        plugin=values["plugin"],
        without_plugin=values["no_plugin"],
        device=0 if device == "auto" else device_index(device),
    )


def summary(report: EngineReport) -> str:
    """Return a one-line summary of the engine."""
    info, (n, height, width) = report.info, report.info.limits.max
    layers = ", ".join(f"{count} {kind}" for kind, count in sorted(info.convolutions.items()))
    return (
        f"{info.precision_obtained} ({layers} convolutions, according to the {info.precision_proof}), up to {n} of "
        f"{height}x{width}, {'with plugin ' + info.plugin if info.plugin else 'without plugin'}, "
        f"{info.plan_bytes / 1e6:.1f} MB"
    )


def layer_lines(report: EngineReport) -> list[str]:
    """Return the inspector's findings about the engine's layers as text; empty if there was no inspection."""
    layers = report.info.layers
    if not layers:
        return []
    kinds = ", ".join(f"{count} {kind}" for kind, count in layers["kinds"].items())
    filters = [f"filter {name}: {'; '.join(formats)}" for name, formats in layers["filters"].items()]
    return [f"layers: {kinds}; {layers['reformats']} of them only change a tensor's format", *filters]


def document(report: EngineReport) -> dict[str, Any]:
    """Return the report for --json."""
    from dataclasses import asdict

    return {"engine": str(report.path), **asdict(report.info), "commands": report.commands}
