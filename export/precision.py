"""Which layers run in float16: a calibration over pictures, and a typed graph that states the result.

TensorRT 11 has no precision flags: the types in the ONNX file are the precision. Instance norm stays float32 (sums of
squares over a picture leave float16's range), the dynamic filter accumulates in float32 by definition, and so stay
layers whose values come near float16's largest, 65504, on the calibration pictures.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..plugins.dynamic_filter import onnx_op

FLOAT32_OPS = frozenset({"InstanceNormalization", "ReduceMean"})
"""Always float32: both sum over the whole picture, and how wide TensorRT's sums are is nowhere promised."""

RANGE_LIMIT = 8192.0
"""Layers that make or read larger values on the calibration pictures stay float32: an eighth of float16's range."""

# Inputs that are float32 (or integers) whatever the type of the rest: Resize's roi and scales.
_UNTYPED_INPUTS = {"Resize": {1, 2}}


def value_ranges(core: ModelProto, inputs: Iterable[NDArray[np.float32]]) -> dict[str, float]:
    """Return the largest absolute value of every tensor that the nodes of `core` make, over the calibration inputs.

    Args:
        core: float32 graph with one input; run on ONNX Runtime's CPU provider.
        inputs: N,4,H,W float32 each.

    """
    import onnxruntime as ort

    probe = ModelProto()
    probe.CopyFrom(core)
    onnx_op.attach_function(probe)
    tensors = [name for node in core.graph.node for name in node.output]
    for index, name in enumerate(tensors):
        probe.graph.node.extend(
            [
                helper.make_node("Abs", [name], [f"probe{index}_abs"]),
                helper.make_node("ReduceMax", [f"probe{index}_abs"], [f"probe{index}"], keepdims=0),
            ]
        )
    del probe.graph.output[:]
    probe.graph.output.extend(
        helper.make_tensor_value_info(f"probe{index}", TensorProto.FLOAT, []) for index in range(len(tensors))
    )
    options = ort.SessionOptions()
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    largest = np.zeros(len(tensors))
    for value in inputs:
        found = session.run(None, {core.graph.input[0].name: value})
        # maximum() keeps NaN: a layer that makes NaN has no range and must not pass for small.
        largest = np.maximum(largest, np.array(found, dtype=np.float64))
    return dict(zip(tensors, largest.tolist(), strict=True))


def float32_layers(core: ModelProto, ranges: dict[str, float], limit: float = RANGE_LIMIT) -> dict[str, float]:
    """Return the nodes that must stay float32 because of their values: name -> the largest value made or read.

    Instance norms, which always stay, are not among them.
    """
    weights = {tensor.name: float(np.abs(numpy_helper.to_array(tensor)).max(initial=0)) for tensor in _floats(core)}
    ranges = {**ranges, **weights}
    kept = {}
    for node in core.graph.node:
        untyped = _UNTYPED_INPUTS.get(node.op_type, set())
        touched = [name for index, name in enumerate(node.input) if index not in untyped] + list(node.output)
        largest = max((ranges.get(name, 0.0) for name in touched), key=lambda value: np.nan_to_num(value, nan=np.inf))
        if node.op_type not in FLOAT32_OPS and not largest <= limit:
            kept[node.name] = largest
    return kept


def to_float16(core: ModelProto, keep_float32: Iterable[str] = ()) -> ModelProto:
    """Return `core` typed float16, with casts around the nodes that stay float32; input and output stay float32.

    Args:
        core: a float32 graph of one type of floating point.
        keep_float32: names of nodes to leave in float32, besides the instance norms.

    """
    kept = set(keep_float32)
    typed = ModelProto()
    typed.CopyFrom(core)
    graph = typed.graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in _floats(core)}
    types = {value.name: TensorProto.FLOAT for value in graph.input} | dict.fromkeys(weights, TensorProto.FLOAT)
    others = [tensor for tensor in core.graph.initializer if tensor.name not in weights]
    initializers: dict[str, TensorProto] = {}
    casts: dict[tuple[str, int], str] = {}
    nodes: list[NodeProto] = []

    def as_type(name: str, wanted: int) -> str:
        """Return the name of tensor `name` in the wanted type, making the cast or the converted weight once."""
        if name not in types:
            return name  # integers
        if name in weights:
            converted = name if wanted == TensorProto.FLOAT else f"{name}.float16"
            value = weights[name] if wanted == TensorProto.FLOAT else weights[name].astype(np.float16)
            initializers[converted] = numpy_helper.from_array(np.ascontiguousarray(value), converted)
            return converted
        if types[name] == wanted:
            return name
        if (name, wanted) not in casts:
            suffix = "float32" if wanted == TensorProto.FLOAT else "float16"
            casts[name, wanted] = f"{name}.{suffix}"
            nodes.append(helper.make_node("Cast", [name], [f"{name}.{suffix}"], f"{name}.to_{suffix}", to=wanted))
        return casts[name, wanted]

    for node in graph.node:
        float32 = node.op_type in FLOAT32_OPS or node.name in kept
        wanted = TensorProto.FLOAT if float32 else TensorProto.FLOAT16
        untyped = _UNTYPED_INPUTS.get(node.op_type, set())
        node.input[:] = [
            as_type(name, TensorProto.FLOAT if index in untyped else wanted) if name else name
            for index, name in enumerate(node.input)
        ]
        types |= dict.fromkeys(node.output, wanted)
        nodes.append(node)
    result = graph.output[0].name
    if types[result] != TensorProto.FLOAT:
        for node in nodes:
            node.input[:] = [f"{result}.float16" if name == result else name for name in node.input]
            node.output[:] = [f"{result}.float16" if name == result else name for name in node.output]
        nodes.append(helper.make_node("Cast", [f"{result}.float16"], [result], f"{result}.to_float32", to=1))
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*others, *initializers.values()])
    return typed


def float_types(model: ModelProto) -> dict[str, int]:
    """Return how many convolutions run in each floating-point type, by the types of their weights."""
    names = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    counts: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            name = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}[names[node.input[1]]]
            counts[name] = counts.get(name, 0) + 1
    return counts


def _floats(model: ModelProto) -> list[TensorProto]:
    return [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT]
