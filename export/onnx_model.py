"""The network as one ONNX graph: any batch, height and width; the dynamic filter as a custom op with a function body.

The traced network requires sides that are multiples of some number of pixels (`NetworkConfig.multiple`). A few nodes
around it do what `InpaintingNetwork.forward` and `composite` do in PyTorch: set the hole to 0, pad the picture by
reflection, crop the prediction, and paste it into the hole.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from onnx import ModelProto, NodeProto, helper, parser
from torch import Tensor, nn

from ..plugins.dynamic_filter import onnx_op
from ..training.model.config import NetworkConfig
from ..training.model.network import InpaintingNetwork

IR_VERSION = 10
"""This version is supported by ONNX Runtime 1.19 and TensorRT 10.3's parser."""

INPUT, OUTPUT = "network_input", "prediction"


class _Core(nn.Module):
    """The module to trace: the bare network, `InpaintingNetwork.predict`."""

    def __init__(self, network: InpaintingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, network_input: Tensor) -> Tensor:
        return self.network.predict(network_input)


def core_model(network: InpaintingNetwork) -> ModelProto:
    """Return the float32 graph of `network.predict`: network_input N,4,H,W -> prediction N,3,H,W.

    N is dynamic, and H and W are dynamic multiples of `config.multiple`. Layers have the names of their parameters in
    the checkpoint.
    """
    onnx_op.register_schema()
    import onnxscript

    opset = onnxscript.values.Opset(onnx_op.DOMAIN, onnx_op.DOMAIN_VERSION)

    def dynamic_filter(features: Any, taps: Any, kernel_size: int, share: int) -> Any:
        return opset.DynamicFilter(features, taps, kernel_size=kernel_size, share=share)

    multiple = network.config.multiple
    side = network.config.minimum_side // multiple
    dims = {name: torch.export.Dim(name, min=max(side, 2), max=1 << 14) for name in ("rows", "columns")}
    batch = torch.export.Dim("batch", min=1, max=1 << 12)
    example = torch.zeros(2, 4, multiple * (side + 2), multiple * (side + 3))
    with _quiet():
        program = torch.onnx.export(
            _Core(network).eval(),
            (example,),
            dynamo=True,
            opset_version=onnx_op.OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: batch, 2: dims["rows"] * multiple, 3: dims["columns"] * multiple}},
            custom_translation_table={torch.ops.misf.dynamic_filter.default: dynamic_filter},
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model: ModelProto = program.model_proto
    model.ir_version = IR_VERSION
    _tidy(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which reports a missing torchvision, deprecations inside torch, and progress on stdout."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _tidy(model: ModelProto) -> None:
    """Drop the tracer's metadata, which contains local paths, and name layers and tensors after the parameters."""
    graph = model.graph
    del model.metadata_props[:], graph.value_info[:]
    graph.name, graph.doc_string = "misf", ""
    model.producer_name, model.producer_version, model.doc_string = "misf", "", ""
    renamed = {name.name: name.name.removeprefix("network.") for name in graph.initializer}
    for initializer in graph.initializer:
        initializer.name = renamed[initializer.name]
    taken: set[str] = set()
    filters = iter(onnx_op.filter_names(len(onnx_op.filter_nodes(model))))
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        node.input[:] = [renamed.get(name, name) for name in node.input]
        if node.op_type == onnx_op.OP_TYPE:
            node.name = next(filters)
        elif node.op_type in ("Conv", "ConvTranspose"):
            node.name = _unused(node.input[1].removesuffix(".weight"), taken)
        else:
            node.name = node.name.removeprefix("node_")


def _unused(name: str, taken: set[str]) -> str:
    """Return `name`, with a number added if a node already has it (nodes may share weights), and add it to `taken`."""
    numbered = (f"{name}.{number}" for number in itertools.count(2))
    unused = next(found for found in itertools.chain([name], numbered) if found not in taken)
    taken.add(unused)
    return unused


def complete_model(core: ModelProto, config: NetworkConfig) -> ModelProto:
    """Return the file's graph: image N,3,H,W and mask N,1,H,W in, the finished picture `output` N,3,H,W out.

    All three are float32 in [0,1]; mask values above 0.5 are hole. Known pixels are exactly those of the image. N, H
    and W are dynamic. `core` may compute in float32 or float16; its input and output are float32.
    """
    prepare = parser.parse_graph(_prepare_text(config))
    finish = parser.parse_graph(_FINISH_TEXT)
    nodes: list[NodeProto] = []
    for prefix, graph in (("prepare", prepare), ("", core.graph), ("finish", finish)):
        for index, node in enumerate(graph.node):
            if prefix:
                node.name = f"{prefix}.{index}_{node.op_type}"
            nodes.append(node)
    graph = helper.make_graph(
        nodes,
        "misf",
        list(prepare.input),
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        initializer=list(core.graph.initializer),
    )
    model = helper.make_model(graph, ir_version=IR_VERSION, producer_name="misf", opset_imports=list(core.opset_import))
    onnx_op.attach_function(model)
    return model


def _prepare_text(config: NetworkConfig) -> str:
    """Return the nodes from image and mask to the network's input, with the formula of `reflect_to` in network.py."""
    lines = [
        "hole = Greater (mask, half)",
        "emptied = Where (hole, nothing, image)",
        "hole_as_float = Cast <to = 1> (hole)",
        "input_0 = Concat <axis = 1> (emptied, hole_as_float)",
    ]
    for step, (axis, side) in enumerate(((2, "height"), (3, "width"))):
        lines += [
            f"{side} = Shape <start = {axis}, end = {axis + 1}> (image)",
            f"{side}_more = Add ({side}, multiple_less_one)",
            f"{side}_blocks = Div ({side}_more, multiple)",
            f"{side}_rounded = Mul ({side}_blocks, multiple)",
            f"{side}_padded = Max ({side}_rounded, minimum_side)",
            f"{side}_less_one = Sub ({side}, one)",
            f"{side}_twice = Mul ({side}_less_one, two)",
            f"{side}_period = Max ({side}_twice, one)",
            f"{side}_end = Squeeze ({side}_padded)",
            f"{side}_positions = Range (zero, {side}_end, step)",
            f"{side}_forward = Mod ({side}_positions, {side}_period)",
            f"{side}_backward = Sub ({side}_period, {side}_forward)",
            f"{side}_index = Min ({side}_forward, {side}_backward)",
            f"{INPUT if step else 'input_1'} = Gather <axis = {axis}> (input_{step}, {side}_index)",
        ]
    constants = {"one": 1, "two": 2, "multiple": config.multiple, "multiple_less_one": config.multiple - 1}
    constants["minimum_side"] = config.minimum_side
    declared = [f"{name} = Constant <value_ints = [{value}]> ()" for name, value in constants.items()]
    declared += [f"{name} = Constant <value = int64 {{{value}}}> ()" for name, value in (("zero", 0), ("step", 1))]
    declared += [f"{name} = Constant <value = float {{{value}}}> ()" for name, value in (("half", 0.5), ("nothing", 0))]
    return (
        "prepare (float[batch,3,height,width] image, float[batch,1,height,width] mask) => "
        f"(float[batch,4,padded_height,padded_width] {INPUT}) {{\n" + "\n".join(declared + lines) + "\n}"
    )


_FINISH_TEXT = f"""
finish (float[batch,3,h,w] {OUTPUT}) => (float[batch,3,height,width] output) {{
    corner = Constant <value_ints = [0, 0]> ()
    picture_axes = Constant <value_ints = [2, 3]> ()
    picture_size = Shape <start = 2, end = 4> (image)
    cropped = Slice ({OUTPUT}, corner, picture_size, picture_axes)
    output = Where (hole, cropped, image)
}}
"""
