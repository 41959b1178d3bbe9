"""Chooses the layers that run in float16, by calibration on pictures, and types the graph accordingly.

TensorRT 11 has no precision flags, so the types in the ONNX file are the precision. Instance norm stays float32 (sums
of squares over a picture overflow float16), as do layers whose values come near float16's maximum, 65504, on the
calibration pictures. The dynamic filter accumulates in float32 by definition.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, inliner

from ..plugins.dynamic_filter import onnx_op

FLOAT32_OPS = frozenset({"InstanceNormalization", "ReduceMean"})
"""Always float32: both sum over the whole picture, and TensorRT does not guarantee the precision of its sums."""

RANGE_LIMIT = 8192.0
"""Layers that output or read larger values on the calibration pictures stay float32; an eighth of float16's range."""

_UNTYPED_INPUTS = {"Resize": {1, 2}}
"""Inputs that are always float32: Resize's roi and scales."""

_UNTYPED_OPS = frozenset({"Cast", "Shape", "Size"})
"""Ops that accept any type and whose output type does not depend on it."""


def value_ranges(core: ModelProto, inputs: Iterable[NDArray[np.float32]]) -> dict[str, float]:
    """Return the largest absolute value over the inputs of every float32 tensor that the nodes of `core` output.

    Args:
        core: float32 graph with one input, which runs on ONNX Runtime's CPU provider.
        inputs: N,4,H,W float32 each.

    """
    import onnxruntime as ort

    graph = _surgeon(core)
    names = [tensor.name for node in graph.nodes for tensor in node.outputs if tensor.dtype == np.float32]
    tensors, graph.outputs = graph.tensors(), []
    for index, name in enumerate(names):
        size, largest = (gs.Variable(f"probe{index}{suffix}", np.float32) for suffix in ("_abs", ""))
        graph.nodes.append(gs.Node("Abs", inputs=[tensors[name]], outputs=[size]))
        graph.nodes.append(gs.Node("ReduceMax", attrs={"keepdims": 0}, inputs=[size], outputs=[largest]))
        graph.outputs.append(largest)
    probe = gs.export_onnx(graph)
    onnx_op.attach_function(probe)
    options = ort.SessionOptions()
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ranges = np.zeros(len(names))
    for value in inputs:
        found = session.run(None, {graph.inputs[0].name: value})
        # maximum() propagates NaN, so that a layer with NaN does not count as small.
        ranges = np.maximum(ranges, np.array(found, dtype=np.float64))
    return dict(zip(names, ranges.tolist(), strict=True))


def float32_layers(core: ModelProto, ranges: dict[str, float], limit: float = RANGE_LIMIT) -> dict[str, float]:
    """Return the nodes that must stay float32 because of their values: name -> the largest value output or read.

    Instance norms, which always stay float32, are not included.
    """
    kept = {}
    for node in _surgeon(core).nodes:
        touched = [*_typed_inputs(node).values(), *node.outputs]
        values = [_largest(tensor, ranges) for tensor in touched]
        largest = max(values, default=0.0, key=lambda value: np.nan_to_num(value, nan=np.inf))
        if node.op not in FLOAT32_OPS and not largest <= limit:
            kept[node.name] = largest
    return kept


def to_float16(core: ModelProto, keep_float32: Iterable[str] = ()) -> ModelProto:
    """Return `core` typed float16, with casts around the nodes that stay float32; input and output stay float32.

    Args:
        core: a graph whose floating-point tensors are all float32; integers and Booleans keep their types.
        keep_float32: names of nodes to leave in float32, in addition to the instance norms.

    """
    kept = set(keep_float32)
    graph = _surgeon(core)
    nodes: list[gs.Node] = []
    made: dict[tuple[str, type], gs.Tensor] = {}

    def as_type(tensor: gs.Tensor, wanted: type) -> gs.Tensor:
        """Return the tensor in the wanted type, making the cast or the converted weight once."""
        if tensor.dtype == wanted:
            return tensor
        key = tensor.name, wanted
        if key not in made:
            suffix = np.dtype(wanted).name
            name = f"{tensor.name}.{suffix}"
            if isinstance(tensor, gs.Constant):
                made[key] = gs.Constant(name, tensor.values.astype(wanted))
            else:
                made[key] = gs.Variable(name, wanted)
                to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(wanted))
                nodes.append(gs.Node("Cast", f"{tensor.name}.to_{suffix}", {"to": to}, [tensor], [made[key]]))
        return made[key]

    for node in list(graph.nodes):
        wanted = np.float32 if node.op in FLOAT32_OPS or node.name in kept else np.float16
        floats = _typed_inputs(node)
        for index, tensor in enumerate(node.inputs):
            if index in floats:
                node.inputs[index] = as_type(tensor, wanted)
            elif tensor.dtype == np.float16 and node.op not in _UNTYPED_OPS:
                node.inputs[index] = as_type(tensor, np.float32)
        for tensor in node.outputs:
            if floats and tensor.dtype == np.float32:
                tensor.dtype = wanted
        nodes.append(node)
    [result] = graph.outputs
    if result.dtype == np.float16:
        name, result.name = result.name, f"{result.name}.float16"
        finished = gs.Variable(name, np.float32, result.shape)
        cast = {"to": TensorProto.FLOAT}
        nodes.append(gs.Node("Cast", f"{name}.to_float32", cast, [result], [finished]))
        graph.outputs = [finished]
    graph.nodes = nodes
    typed: ModelProto = gs.export_onnx(graph.cleanup())
    return typed


def _surgeon(core: ModelProto) -> gs.Graph:
    """Return a copy of `core` in which every tensor has a type and Constant nodes are weights."""
    complete = ModelProto()
    complete.CopyFrom(core)
    onnx_op.attach_function(complete)
    # Functions are inlined because onnx uses the schema of registered ops, and ours does not infer types.
    inferred = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(complete)).graph.value_info
    types = {value.name: value.type.tensor_type.elem_type for value in inferred}
    graph = gs.import_onnx(core).fold_constants().cleanup()
    for name, tensor in graph.tensors().items():
        if isinstance(tensor, gs.Variable) and name in types:
            tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(types[name])
        elif isinstance(tensor, gs.Constant) and tensor.dtype == np.float64:  # graphsurgeon reads value_float as this
            tensor.values = tensor.values.astype(np.float32)
    return graph


def _typed_inputs(node: gs.Node) -> dict[int, gs.Tensor]:
    """Return the inputs of a node that have its computing precision, by index."""
    if node.op in _UNTYPED_OPS:
        return {}
    untyped = _UNTYPED_INPUTS.get(node.op, set())
    floats = (np.float32, np.float16)
    return {index: t for index, t in enumerate(node.inputs) if index not in untyped and t.dtype in floats}


def _largest(tensor: gs.Tensor, ranges: dict[str, float]) -> float:
    if isinstance(tensor, gs.Constant):
        return float(np.abs(tensor.values).max(initial=0))
    return ranges.get(tensor.name, 0.0)
