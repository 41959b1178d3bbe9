"""The options of every command that reads a checkpoint. Importing this does not import PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .config import PRESETS, NetworkConfig


class ConfigChoice(click.ParamType):  # type: ignore[type-arg] # no generic before click 8.4
    """A preset's name or a JSON file, converted to a NetworkConfig."""

    name = "NAME|FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> NetworkConfig:
        """Return the config; a usage error if `value` is neither a preset nor a JSON file with a config."""
        if value in PRESETS:
            return PRESETS[value]
        path = Path(value)
        if not path.is_file():
            self.fail(f"expected one of {', '.join(PRESETS)}, or a JSON file that exists, got {value!r}", param, ctx)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            recipe = content.get("recipe", content)  # a training run's run.json
            return NetworkConfig.from_json(json.dumps(recipe.get("network", recipe)))
        except (ValueError, AttributeError) as error:
            self.fail(f"{path} holds no network config: {error}", param, ctx)


config_option = click.option(
    "--config",
    type=ConfigChoice(),
    help="Network of a file that holds weights alone: a preset, a JSON file of its config, or the run.json of a run."
    "  [default: the preset that fits]",
)
official_option = click.option("--official", is_flag=True, expose_value=False, hidden=True, help="No longer needed.")
