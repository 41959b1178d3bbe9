"""The op against NumPy written from the formula, numerical gradients, ONNX's reference evaluator and ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from misf.plugins.dynamic_filter import dynamic_filter, onnx_op

# N, C, H, W, K, share: one pixel, a picture smaller than the filter, MISF's two uses, odd shares, no full group.
CASES = [
    (1, 1, 1, 1, 1, 1),
    (2, 8, 5, 7, 3, 4),
    (1, 3, 9, 4, 3, 1),
    (1, 2, 2, 1, 5, 1),
    (3, 4, 3, 8, 5, 2),
    (1, 6, 4, 4, 3, 27),
    (2, 3, 1, 6, 3, 3),
    (1, 2, 3, 3, 7, 98),
]
# Largest allowed error relative to the sum of the products' absolute values: one rounding of inputs and output to the
# storage type, plus the float32 sum of up to 49 products.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-13}


def numpy_filter(features: np.ndarray, taps: np.ndarray, k: int, share: int) -> np.ndarray:
    """Return the filter by definition: a loop over all output channels and taps, in float64."""
    n, channels, height, width = features.shape
    padded = np.pad(features.astype(np.float64), ((0, 0), (0, 0), (k // 2,) * 2, (k // 2,) * 2))
    output = np.zeros((n, channels, height, width))
    for c in range(channels):
        for i in range(k):
            for j in range(k):
                weight = taps[:, (c * k * k + i * k + j) // share].astype(np.float64)
                output[:, c] += padded[:, c, i : i + height, j : j + width] * weight
    return output


def make_inputs(case: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    n, c, h, w, k, share = case
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, c, h, w)).astype(np.float32)
    return features, rng.standard_normal((n, c * k * k // share, h, w)).astype(np.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "strided"])
def test_matches_numpy(case: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    k, share = case[4:]
    features, taps = (torch.from_numpy(array).to(dtype) for array in make_inputs(case))
    if layout == "channels_last":
        features, taps = (t.contiguous(memory_format=torch.channels_last) for t in (features, taps))
    elif layout == "strided":  # every second column of something larger
        features, taps = (torch.repeat_interleave(t, 2, dim=3)[..., ::2] for t in (features, taps))
    output = dynamic_filter(features, taps, k, share)
    assert output.dtype == dtype
    assert output.stride() == torch.empty_like(features).stride()
    f, t = features.double().numpy(), taps.double().numpy()
    scale = numpy_filter(np.abs(f), np.abs(t), k, share)
    assert np.all(np.abs(output.double().numpy() - numpy_filter(f, t, k, share)) <= TOLERANCE[dtype] * (scale + 1e-3))


def test_float16_accumulates_in_float32() -> None:
    """Sums of products of 30000 overflow float16 midway; the final float32 sum is in its range again."""
    features = torch.full((1, 1, 3, 3), 200.0, dtype=torch.float16)
    taps = torch.tensor([150.0] * 5 + [-150.0] * 4, dtype=torch.float16).view(1, 9, 1, 1).expand(1, 9, 3, 3)
    assert dynamic_filter(features, taps)[0, 0, 1, 1].item() == 30000.0


def test_image_border_is_zero_and_there_is_no_flip() -> None:
    features = torch.arange(1.0, 10).view(1, 1, 3, 3)
    taps = torch.zeros(1, 9, 3, 3)
    taps[:, 1] = 1  # row 0, column 1: the pixel above
    assert dynamic_filter(features, taps).tolist() == [[[[0, 0, 0], [1, 2, 3], [4, 5, 6]]]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case: tuple[int, ...]) -> None:
    features, taps = (torch.from_numpy(array).double().requires_grad_() for array in make_inputs(case))
    assert torch.autograd.gradcheck(lambda f, t: dynamic_filter(f, t, *case[4:]), (features, taps), fast_mode=True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(memory_format: torch.memory_format) -> None:
    arrays = make_inputs((2, 8, 5, 7, 3, 4))
    features, taps = (torch.from_numpy(a).contiguous(memory_format=memory_format).requires_grad_() for a in arrays)
    torch.library.opcheck(torch.ops.misf.dynamic_filter.default, (features, taps, 3, 4))
    grad = torch.ones_like(features)
    inputs = (grad, features.detach(), taps.detach(), 3, 4)
    torch.library.opcheck(torch.ops.misf.dynamic_filter_backward.default, inputs)


def test_autocast_joins_two_types() -> None:
    features, taps = (torch.from_numpy(array) for array in make_inputs((1, 4, 3, 3, 3, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        assert dynamic_filter(features, taps.bfloat16(), 3, 4).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="dtype of features"):
        dynamic_filter(features, taps.bfloat16(), 3, 4)


@pytest.mark.parametrize(
    ("features", "taps", "k", "share", "message"),
    [
        ((1, 4, 2, 2), (1, 9, 2, 2), 2, 4, "odd"),
        ((1, 4, 2, 2), (1, 9, 2, 2), 3, 0, "share must be positive"),
        ((1, 4, 2, 2), (1, 9, 2, 2), 3, 5, "divide"),
        ((1, 4, 2, 2), (1, 8, 2, 2), 3, 4, "= 9 channels, got 8"),
        ((1, 4, 2, 2), (1, 9, 2, 3), 3, 4, "agree in N, H and W"),
        ((4, 2, 2), (1, 9, 2, 2), 3, 4, "N,C,H,W"),
    ],
)
def test_wrong_sizes_are_named(
    features: tuple[int, ...], taps: tuple[int, ...], k: int, share: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dynamic_filter(torch.zeros(features), torch.zeros(taps), k, share)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_onnx_function_body(case: tuple[int, ...]) -> None:
    onnx_op.register_schema()
    model = onnx_op.one_node_model(case[1], *case[4:])
    onnx.checker.check_model(model, full_check=True)
    features, taps = make_inputs(case)
    expected = numpy_filter(features, taps, *case[4:])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for run in (session.run, ReferenceEvaluator(model).run):
        np.testing.assert_allclose(run(None, {"features": features, "taps": taps})[0], expected, rtol=1e-5, atol=2e-5)


def test_onnx_function_body_in_float16_accumulates_in_float32() -> None:
    features = np.full((1, 1, 3, 3), 200, np.float16)
    taps = np.array([150] * 5 + [-150] * 4, np.float16).reshape(1, 9, 1, 1) * np.ones((1, 1, 3, 3), np.float16)
    model = onnx_op.one_node_model(1, 3, 1, TensorProto.FLOAT16)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    output = session.run(None, {"features": features, "taps": taps})[0]
    assert output.dtype == np.float16
    assert output[0, 0, 1, 1] == 30000


def test_onnx_nodes_must_agree_on_kernel_size() -> None:
    model = onnx_op.one_node_model(2, 3, 1)
    model.graph.node.append(
        helper.make_node("DynamicFilter", ["output", "taps2"], ["p"], domain="misf", kernel_size=5, share=1)
    )
    with pytest.raises(ValueError, match=r"one kernel_size, got \[3, 5\]"):
        onnx_op.attach_function(model)


def test_onnx_plugin_attributes_are_there() -> None:
    """TensorRT 10.15 and later only uses the plugin instead of the body with these attributes."""
    (node,) = onnx_op.filter_nodes(onnx_op.one_node_model(4, 3, 4))
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert attributes == {"kernel_size": 3, "share": 4, "plugin_namespace": b"misf", "plugin_version": b"1"}


def test_onnx_function_body_suits_older_runtimes() -> None:
    """ONNX Runtime up to 1.23 loses the shape of `value_ints` constants inside functions (seen with 1.18 to 1.23)."""
    body = onnx_op.function_body(3)
    assert not [node for node in body.node for attribute in node.attribute if attribute.name == "value_ints"]
