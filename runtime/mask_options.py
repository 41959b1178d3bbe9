"""The options about masks, the same for every command. Light to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Values(click.ParamType):  # type: ignore[type-arg] # no generic before click 8.4
    """Whole numbers with commas between them, converted to a tuple."""

    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the numbers; a usage error where they are none."""
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            numbers = (-1,)
        if min(numbers) < 0:
            self.fail(f"expected whole numbers such as 3 or 3,7, got {value!r}", param, ctx)
        return numbers


def _alone(ctx: click.Context, parameter: click.Parameter, value: tuple[int, ...] | None) -> Any:
    """Return the values; a usage error beside the options that contradict them, which click reads first."""
    given = ctx.get_parameter_source("mask_threshold") is click.core.ParameterSource.COMMANDLINE
    if value is not None and given:
        raise click.BadParameter(
            "--mask-threshold is for masks of light and dark: leave one of them out", ctx, parameter
        )
    if value is not None and ctx.params.get("mask_from_alpha"):
        raise click.BadParameter("--mask-from-alpha looks at the alpha channel: leave one of them out", ctx, parameter)
    return value


READING = (
    click.option(
        "--mask-threshold",
        type=click.IntRange(0, 254),
        default=127,
        show_default=True,
        is_eager=True,
        help="Mask values above this are holes.",
    ),
    click.option("--invert-mask", is_flag=True, help="Black marks the hole instead of white."),
    click.option(
        "--mask-value",
        "mask_values",
        type=Values(),
        callback=_alone,
        help="Holes are the pixels with these values of an indexed or grey mask: label maps.",
    ),
)
"""For commands that read mask files."""
FITTING = (
    click.option("--resize-mask", is_flag=True, help="Accept a mask of another size and resize it to the picture."),
    click.option(
        "--grow-mask",
        type=click.IntRange(min=0),
        default=0,
        metavar="PIXELS",
        help="Grow the hole by this many pixels, to cover the soft edge of an object.",
    ),
    click.option(
        "--feather",
        type=click.IntRange(min=0),
        default=0,
        metavar="PIXELS",
        help="Blend the fill into the known pixels over this many pixels around the hole; they change, then.",
    ),
    click.option(
        "--mask-from-alpha",
        is_flag=True,
        is_eager=True,
        help="Transparent pixels are the hole: those of MASK, or of IMAGE if no MASK is given.",
    ),
)
"""For commands that fill pictures."""


def mask_options(*groups: tuple[Callable[[Any], Any], ...]) -> Callable[[Decorated], Decorated]:
    """Return a decorator that adds the options of these groups."""

    def add(function: Decorated) -> Decorated:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return add
