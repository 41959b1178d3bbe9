"""Networks for all of our engines: strongly typed, parsed from ONNX, without TF32, with one profile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...plugins.shared.errors import MisfError
from .flavors import Flavor, logger_of

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, best and largest shape of an input."""


def parsed_network(flavor: Flavor, builder: Any, model: bytes, failure: str) -> tuple[Any, Any]:
    """Return a strongly typed network of an ONNX model, and its parser, which must outlive the build.

    Raises:
        MisfError: TensorRT cannot parse the model; the message is `failure` and the parser's first error.

    """
    trt = flavor.module
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # always on in 11.x
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger_of(flavor))
    if not parser.parse(model):
        raise MisfError(f"{failure}: {parser_error(parser)}")
    return network, parser


def build_config(flavor: Flavor, builder: Any, inputs: Mapping[str, Shapes]) -> Any:
    """Return a builder config with one profile for the inputs' shapes, and detailed information for the inspector."""
    trt, config, profile = flavor.module, builder.create_builder_config(), builder.create_optimization_profile()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, but with 10 bits of mantissa it is not fp32
    for name, shapes in inputs.items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    return config


def parser_error(parser: Any) -> str:
    """Return the parser's first error as one line."""
    if not parser.num_errors:
        return "no reason given"
    error = parser.get_error(0)
    text = " ".join(error.desc().split())
    name = error.node_name()
    return f"{text} (node {name}, {error.node_operator()})" if name else text
