"""The ONNX node misf::DynamicFilter: its schema, and its function body in standard ops.

The body goes into the model as a local function, so that any ONNX runtime can run the file without our libraries. A
runtime that knows the op uses its implementation instead. Definition: `op.py`.
"""

from __future__ import annotations

from onnx import FunctionProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, defs, helper, inliner, parser

OP_TYPE = "DynamicFilter"
DOMAIN = "misf"
DOMAIN_VERSION = 1
OPSET = 20
"""Standard opset of the body and of our models. The body needs at least 15 (Shape with start and end, CastLike)."""

# Read by TensorRT's ONNX parser: from 10.15 on, a node with this attribute becomes the plugin of that namespace if one
# is registered, and otherwise the local function.
PLUGIN_ATTRIBUTES = {"plugin_namespace": "misf", "plugin_version": "1"}


def register_schema() -> None:
    """Register the op with onnx, so that onnx.checker and onnxscript accept it; further calls do nothing."""
    if defs.has(OP_TYPE, DOMAIN):
        return
    schema = defs.OpSchema
    defs.register_schema(
        schema(
            OP_TYPE,
            DOMAIN,
            DOMAIN_VERSION,
            doc="Every pixel of every channel is filtered with its own kernel_size x kernel_size filter.",
            inputs=[schema.FormalParameter("features", "T"), schema.FormalParameter("taps", "T")],
            outputs=[schema.FormalParameter("output", "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "float types")],
            attributes=[
                schema.Attribute("kernel_size", defs.OpSchema.AttrType.INT, "K, odd", required=True),
                schema.Attribute("share", defs.OpSchema.AttrType.INT, "taps per channel of `taps`", required=True),
                schema.Attribute("plugin_namespace", defs.OpSchema.AttrType.STRING, "for TensorRT", required=False),
                schema.Attribute("plugin_version", defs.OpSchema.AttrType.STRING, "for TensorRT", required=False),
            ],
        )
    )


def function_body(kernel_size: int) -> FunctionProto:
    """Return the op as an ONNX function for one kernel size, any `share`, channels, height and width.

    ONNX functions cannot loop over an attribute without a (slow) `Loop`, so the kernel_size**2 products are written
    out; `attach_function` refuses models whose nodes have different kernel sizes. Products are summed in float32.
    Constants are tensors, because ONNX Runtime up to 1.23 loses the shape of a `value_ints` inside a function. Pad
    lists the borders of all four dimensions, because ONNX Runtime up to 1.32 converts a Pad with `axes` to NHWC
    wrongly, which breaks 8-bit models and the WebGPU provider.
    """
    area, half = kernel_size**2, kernel_size // 2
    lines = [
        "source = Cast <to = 1> (features)",
        "weights = Cast <to = 1> (taps)",
        "zero = Constant <value = int64 {0}> ()",
        "one = Constant <value = int64 {1}> ()",
        f"area = Constant <value = int64 {{{area}}}> ()",
        "share = Constant <value_int: int = @share> ()",
        "channel_axis = Constant <value = int64[1] {0}> ()",
        "channels = Shape <start = 1, end = 2> (features)",
        "channel_count = Squeeze (channels, channel_axis)",
        "channel = Range (zero, channel_count, one)",
        "first_tap = Mul (channel, area)",
        "axes = Constant <value = int64[2] {2, 3}> ()",
        "size = Shape <start = 2, end = 4> (features)",
        f"border = Constant <value = int64[8] {{0, 0, {half}, {half}, 0, 0, {half}, {half}}}> ()",
        "nothing = Constant <value = float {0.0}> ()",
        "padded = Pad (source, border, nothing)",
    ]
    for tap in range(area):
        i, j = divmod(tap, kernel_size)
        lines += [
            f"tap{tap} = Constant <value = int64 {{{tap}}}> ()",
            f"number{tap} = Add (first_tap, tap{tap})",
            f"index{tap} = Div (number{tap}, share)",
            f"weight{tap} = Gather <axis = 1> (weights, index{tap})",
            f"start{tap} = Constant <value = int64[2] {{{i}, {j}}}> ()",
            f"stop{tap} = Add (size, start{tap})",
            f"window{tap} = Slice (padded, start{tap}, stop{tap}, axes)",
            f"product{tap} = Mul (window{tap}, weight{tap})",
            f"sum{tap} = " + (f"Add (sum{tap - 1}, product{tap})" if tap else "Identity (product0)"),
        ]
    lines.append(f"output = CastLike (sum{area - 1}, features)")
    function = parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{OP_TYPE} <kernel_size, share, plugin_namespace, plugin_version> (features, taps) => (output) {{\n"
        + "\n".join(lines)
        + "\n}"
    )
    function.doc_string = f"misf::DynamicFilter for kernel_size = {kernel_size}"
    return function


def filter_nodes(model: ModelProto) -> list[NodeProto]:
    """Return the model's DynamicFilter nodes, in graph order."""
    return [node for node in model.graph.node if node.op_type == OP_TYPE and node.domain == DOMAIN]


def filter_names(count: int) -> list[str]:
    """Return the names of a network's `count` filter nodes in our files, in execution order."""
    return ["feature_filter", "image_filter"] if count == 2 else ["filter"] * count


def for_tensorrt(model: ModelProto, with_plugin: bool) -> bytes:
    """Return the serialized model for TensorRT's parser, prepared so that all versions treat it alike.

    With the plugin, the function body is dropped: before 10.7 a body takes precedence over a plugin, later a plugin
    over a body, and without a body a missing plugin is an error. Without the plugin, the nodes are replaced by the
    body.
    """
    if not with_plugin:
        return bytes(inliner.inline_local_functions(model).SerializeToString())
    bare = ModelProto()
    bare.CopyFrom(model)
    functions = [function for function in bare.functions if function.domain != DOMAIN]
    del bare.functions[:]
    bare.functions.extend(functions)
    return bytes(bare.SerializeToString())


def attach_function(model: ModelProto) -> None:
    """Add the op's function body to `model`, and TensorRT's plugin attributes to its filter nodes, in place.

    Raises:
        ValueError: the model's filter nodes have different kernel sizes.

    """
    nodes = filter_nodes(model)
    sizes = {attribute.i for node in nodes for attribute in node.attribute if attribute.name == "kernel_size"}
    if len(sizes) > 1:
        raise ValueError(f"all DynamicFilter nodes of a model must have one kernel_size, got {sorted(sizes)}")
    for node in nodes:
        present = {attribute.name for attribute in node.attribute}
        node.attribute.extend(
            helper.make_attribute(key, value) for key, value in PLUGIN_ATTRIBUTES.items() if key not in present
        )
    remaining = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend([*remaining, *(function_body(size) for size in sizes)])
    if sizes and DOMAIN not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(OperatorSetIdProto(domain=DOMAIN, version=DOMAIN_VERSION))


def one_node_model(channels: int, kernel_size: int, share: int, elem_type: int = TensorProto.FLOAT) -> ModelProto:
    """Return a model with one filter: features N,C,H,W and taps N,M,H,W -> output N,C,H,W, all of `elem_type`.

    It is used by `misf-doctor` and the plugin's tests; runtime/checks/op_check.onnx is `one_node_model(8, 3, 4)`.
    """
    sizes = {"features": channels, "taps": channels * kernel_size**2 // share, "output": channels}
    values = [
        helper.make_tensor_value_info(name, elem_type, ["batch", size, "height", "width"])
        for name, size in sizes.items()
    ]
    node = helper.make_node(
        OP_TYPE, ["features", "taps"], ["output"], "filter", domain=DOMAIN, kernel_size=kernel_size, share=share
    )
    graph = helper.make_graph([node], "dynamic_filter", values[:2], values[2:])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    model = helper.make_model(graph, ir_version=10, producer_name="misf", opset_imports=opsets)
    attach_function(model)
    return model
