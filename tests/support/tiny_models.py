"""ONNX files small enough to make in a test, with the signature and the metadata of ours.

The fill is the mean of the known pixels of what the model sees, so a test can tell from the colour what was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper, parser

BODY = """
<ir_version: 10, opset_import: ["" : 18, "misf" : 1]>
tiny (float[N,3,H,W] image, float[N,1,H,W] mask) => (float[N,3,H,W] output)
{
  half = Constant <value = float {0.5}> ()
  one = Constant <value = float {1.0}> ()
  hole = Greater (mask, half)
  is_hole = Cast <to = 1> (hole)
  is_known = Sub (one, is_hole)
  axes = Constant <value = int64[2] {2, 3}> ()
  known = Mul (image, is_known)
  total = ReduceSum <keepdims = 1> (known, axes)
  count = ReduceSum <keepdims = 1> (is_known, axes)
  at_least_one = Max (count, one)
  mean = Div (total, at_least_one)
  prediction = misf.Local (mean)
  output = Where (hole, prediction, image)
}
<domain: "misf", opset_import: ["" : 18]>
Local (x) => (y) { y = Identity (x) }
"""


def mean_fill(path: Path, metadata: dict[str, str] | None = None) -> Path:
    """Return the path of a written model that fills a hole with the mean of the known pixels that it sees."""
    model = parser.parse_model(BODY)
    if metadata is None:
        metadata = {
            "misf.config": '{"width": 4}',
            "misf.precision": "fp32",
            "misf.checkpoint_sha256": "0" * 64,
            "misf.version": "0.1.0",
        }
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def constant_fill(path: Path, value: float) -> Path:
    """Return the path of a written model whose prediction is one number everywhere, NaN included."""
    model = parser.parse_model(BODY.replace("y = Identity (x)", "zero = Sub (x, x) y = Add (zero, x)"))
    [function] = model.functions
    constant = helper.make_node("Constant", [], ["value"], value_float=value)
    del function.node[1:]
    function.node.extend([constant, helper.make_node("Add", ["zero", "value"], ["y"])])
    helper.set_model_props(model, {"misf.config": "{}", "misf.precision": "fp32"})
    onnx.save(model, path)
    return path


def foreign(path: Path, inputs: Sequence[str] = ("input",), shape: Sequence[int | str] = ("N", 3, "H", "W")) -> Path:
    """Return the path of a written model with other inputs than ours."""
    graph = helper.make_graph(
        [helper.make_node("Identity", [inputs[0]], ["output"])],
        "foreign",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name in inputs],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, list(shape))],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path
