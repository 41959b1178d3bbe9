"""The floating-point types in an ONNX file; separate from precision.py, which engine building does not need."""

from __future__ import annotations

from onnx import ModelProto, TensorProto


def float_types(model: ModelProto) -> dict[str, int]:
    """Return the number of convolutions in each floating-point type, by the types of their weights."""
    names = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    counts: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            name = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}[names[node.input[1]]]
            counts[name] = counts.get(name, 0) + 1
    return counts
