"""The exported file, checked by onnx, ONNX's reference evaluator, ONNX Runtime and PyTorch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnxruntime import quantization

from misf import training
from misf.export import exporter, precision
from misf.export.export_cli import main
from misf.export.model_types import float_types
from misf.export.onnx_model import complete_model, core_model
from misf.plugins.dynamic_filter import onnx_op
from misf.runtime.checks import accuracy
from misf.training import PRESETS, load_model
from misf.training.model.checkpoint import load_checkpoint, save_checkpoint
from misf.training.model.network import InpaintingNetwork, composite, initialize

TINY = PRESETS["misf-tiny"]
# N, H, W: smaller than the network's minimum, one row, sides that are not multiples of four, a non-square batch.
SIZES = [(1, 5, 7), (3, 1, 30), (1, 57, 91), (2, 48, 64)]


def run(path: Path | bytes, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    source = path if isinstance(path, bytes) else str(path)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"image": image, "mask": mask})[0]
    return result


def picture_and_mask(n: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(height)
    image = rng.random((n, 3, height, width), dtype=np.float32)
    return image, (rng.random((n, 1, height, width)) > 0.7).astype(np.float32)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size_equals_pytorch(tiny_onnx: Path, tiny_checkpoint: Path, size: tuple[int, int, int]) -> None:
    image, mask = picture_and_mask(*size)
    network = load_model(tiny_checkpoint)
    hole = torch.from_numpy(mask)
    with torch.inference_mode():
        expected = composite(torch.from_numpy(image), network(torch.from_numpy(image), hole), hole).numpy()
    output = run(tiny_onnx, image, mask)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4)
    known = np.broadcast_to(mask == 0, image.shape)
    assert np.array_equal(output[known], image[known])


def test_reference_evaluator_runs_the_file(tiny_onnx: Path) -> None:
    """ONNX's reference evaluator, which has neither our op nor ONNX Runtime's inlining."""
    image, mask = picture_and_mask(1, 13, 18)
    model = onnx.load(tiny_onnx)
    result = ReferenceEvaluator(model).run(None, {"image": image, "mask": mask})[0]
    np.testing.assert_allclose(result, run(tiny_onnx, image, mask), rtol=0, atol=1e-4)


def test_the_small_network_in_eight_bits_runs(tmp_path: Path) -> None:
    """ONNX Runtime computes 8-bit convolutions in NHWC, and extends this layout into the filter's body."""
    network = load_model(Path(training.__file__).parent / "weights" / "misf-small.safetensors")
    float32, eight_bits = tmp_path / "float32.onnx", tmp_path / "eight_bits.onnx"
    onnx.save(complete_model(core_model(network), network.config), float32)
    # As in a user's process, the schema is not registered; with it, onnx would not infer types through the body.
    onnx.defs.deregister_schema(onnx_op.OP_TYPE, onnx_op.DOMAIN_VERSION, onnx_op.DOMAIN)
    image, mask = picture_and_mask(1, 48, 64)
    feeds = iter([{"image": image, "mask": mask}])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(feeds, None)

    # Weights of seven bits: processors without VNNI add pairs of 8-bit products in 16 bits, which overflow.
    types = {"activation_type": quantization.QuantType.QUInt8, "quant_format": quantization.QuantFormat.QDQ}
    quantization.quantize_static(float32, eight_bits, Reader(), reduce_range=True, **types)
    difference = np.abs(run(eight_bits, image, mask) - run(float32, image, mask))[:, :, mask[0, 0] > 0.5]
    assert 0 < difference.mean() < 0.02


def test_nan_under_the_mask_does_not_spread(tiny_onnx: Path) -> None:
    image, mask = picture_and_mask(1, 32, 32)
    broken = np.where(mask > 0.5, np.float32(np.nan), image)
    assert np.array_equal(run(tiny_onnx, image, mask), run(tiny_onnx, broken, mask))


def test_the_file_is_as_designed(tiny_onnx: Path, tiny_checkpoint: Path) -> None:
    model = onnx.load(tiny_onnx)
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        value.name: [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "image": ["batch", 3, "height", "width"],
        "mask": ["batch", 1, "height", "width"],
        "output": ["batch", 3, "height", "width"],
    }
    checkpoint = load_checkpoint(tiny_checkpoint)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["misf.config"] == checkpoint.config.to_json()
    assert (metadata["misf.precision"], metadata["misf.checkpoint_sha256"]) == ("fp32", checkpoint.sha256)
    assert [function.name for function in model.functions] == ["DynamicFilter"]
    assert all(entry.version >= 18 for entry in model.opset_import if not entry.domain)
    # The tracer's metadata contains local paths.
    assert b"site-packages" not in tiny_onnx.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"feature_filter_level": 0, "image_filter": False},
        {"feature_filter_level": 1, "kernel_size": 5, "share": 2},
    ],
    ids=str,
)
def test_other_configs(change: dict[str, Any]) -> None:
    torch.manual_seed(1)
    network = InpaintingNetwork(replace(TINY, **change)).eval()
    initialize(network)
    model = complete_model(core_model(network), network.config)
    onnx.checker.check_model(model, full_check=True)
    image, mask = picture_and_mask(2, 30, 41)
    expected = accuracy.torch_reference(network)(image, mask)
    np.testing.assert_allclose(run(model.SerializeToString(), image, mask), expected, rtol=0, atol=1e-4)


def toy_core() -> onnx.ModelProto:
    """conv_a -> norm -> conv_b, with weights that make conv_a's output 1000 times the mean of its input."""
    rng = np.random.default_rng(0)
    weights = {
        "a": (np.full((2, 4, 1, 1), 250.0) + rng.random((2, 4, 1, 1))).astype(np.float32),
        "b": rng.random((3, 2, 1, 1)).astype(np.float32),
        "scale": np.ones(2, np.float32),
        "shift": np.zeros(2, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["y"], "conv_a"),
        helper.make_node("InstanceNormalization", ["y", "scale", "shift"], ["z"], "norm"),
        helper.make_node("Conv", ["z", "b"], ["out"], "conv_b"),
    ]
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, "h", "w"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 3, "h", "w"])
    graph = helper.make_graph(nodes, "toy", [x], [out], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every tensor from ONNX's type inference, which fails if types conflict."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    return {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}


def test_calibration_finds_what_float16_cannot_hold() -> None:
    core = toy_core()
    picture = np.random.default_rng(0).random((1, 4, 8, 8), dtype=np.float32)
    ranges = precision.value_ranges(core, [picture, 0.5 * picture])
    by_hand = np.einsum("oc,nchw->nohw", onnx.numpy_helper.to_array(core.graph.initializer[0])[:, :, 0, 0], picture)
    assert ranges["y"] == pytest.approx(np.abs(by_hand).max(), rel=1e-5)
    assert list(precision.float32_layers(core, ranges, limit=500.0)) == ["conv_a"]
    assert precision.float32_layers(core, ranges, limit=5000.0) == {}
    # NaN does not count as a small value.
    assert list(precision.float32_layers(core, {**ranges, "out": float("nan")}, limit=5000.0)) == ["conv_b"]


def test_float16_typing() -> None:
    half, full = TensorProto.FLOAT16, TensorProto.FLOAT
    typed = precision.to_float16(toy_core())
    onnx.checker.check_model(typed, full_check=True)
    types = types_of(typed)
    assert (types["y"], types["z"]) == (half, full)
    assert float_types(typed) == {"fp16": 2}
    assert [value.type.tensor_type.elem_type for value in (*typed.graph.input, *typed.graph.output)] == [full, full]
    kept = precision.to_float16(toy_core(), ["conv_a"])
    assert types_of(kept)["y"] == full
    assert float_types(kept) == {"fp32": 1, "fp16": 1}
    # There is no cast between a float32 layer and a norm.
    assert [node.op_type for node in kept.graph.node] == ["Conv", "InstanceNormalization", "Cast", "Conv", "Cast"]


def test_integers_and_constant_nodes_keep_their_types() -> None:
    core = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        toy (float[n, 4, h, w] x) => (float[n, 4, h, w] out) {
            two = Constant <value = float {2.0}> ()
            million = Constant <value_float = 1e6> ()
            axes = Constant <value_ints = [2, 3]> ()
            size = Shape <start = 2> (x)
            sides = Cast <to = 1> (size)
            half = Div (sides, two)
            small = Cast <to = 7> (half)
            doubled = Mul (x, two)
            shrunk = Resize <mode = "nearest", axes = [2, 3]> (doubled, , , small)
            grown = Resize <mode = "nearest", axes = [2, 3]> (shrunk, , , size)
            mean = ReduceMean (grown, axes)
            large = Mul (mean, million)
            positive = Greater (large, two)
            out = Where (positive, grown, mean)
        }
    """)
    for node in core.graph.node:
        node.name = node.output[0]
    x = np.random.default_rng(0).random((2, 4, 6, 10), dtype=np.float32)
    ranges = precision.value_ranges(core, [x])
    assert ranges["doubled"] == 2 * x.max()
    assert not {"size", "small", "positive"} & set(ranges)
    kept = precision.float32_layers(core, ranges)
    assert list(kept) == ["large", "positive"]  # positive reads it
    typed = precision.to_float16(core, kept)
    onnx.checker.check_model(typed, full_check=True)
    types = types_of(typed)
    wanted = {"size": "INT64", "small": "INT64", "positive": "BOOL", "shrunk": "FLOAT16", "large": "FLOAT"}
    assert {name: TensorProto.DataType.Name(types[name]) for name in wanted} == wanted
    expected, found = (ReferenceEvaluator(model).run(None, {"x": x})[0] for model in (core, typed))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)


def test_building_engines_needs_only_what_its_extra_brings() -> None:
    code = "import sys, misf.export.engine.builder; print({'torch', 'onnx_graphsurgeon'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_export_to_float16(tiny_fp16: tuple[Path, dict[str, Any]]) -> None:
    output, report = tiny_fp16
    assert report["precision"] == "fp16"
    assert set(report["convolutions"]) == {"fp16"}
    assert all(case["finite"] and case["psnr_hole_db"] >= 50 for case in report["check"])
    model = onnx.load(output)
    types = types_of(model)
    norms = [node.output[0] for node in model.graph.node if node.op_type == "InstanceNormalization"]
    assert norms
    assert all(types[name] == TensorProto.FLOAT for name in norms)
    filters = [node.output[0] for node in model.graph.node if node.op_type == "DynamicFilter"]
    assert len(filters) == 2
    assert all(types[name] == TensorProto.FLOAT16 for name in filters)


@pytest.mark.slow
def test_layers_out_of_range_are_kept_and_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    weights = dict(checkpoint.weights)
    weights["prediction.down.0.0.weight"] = weights["prediction.down.0.0.weight"] * 1e6
    weights["prediction.feature_taps.weight"] = weights["prediction.feature_taps.weight"] * 1e-6
    weights["prediction.image_taps.weight"] = weights["prediction.image_taps.weight"] * 1e-6
    path = tmp_path / "large.safetensors"
    save_checkpoint(path, checkpoint.config, weights)
    report = exporter.export_onnx(load_checkpoint(path), tmp_path / "large.onnx", "fp16")
    assert {"prediction.down.0.0", "prediction.down.1.0", "prediction.feature_taps"} <= set(report.float32_layers)
    assert not {"stem", "head", "middle.0.conv1"} & set(report.float32_layers)
    assert all(result.finite for result in report.results)


def test_a_miss_writes_nothing(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing export: one weight differs from PyTorch's."""
    output = tmp_path / "best.onnx"
    output.write_bytes(b"precious")
    core = core_model(load_model(tiny_checkpoint))
    (head,) = (tensor for tensor in core.graph.initializer if tensor.name == "head.weight")
    head.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(head) * np.float32(1.01), head.name))
    monkeypatch.setattr(exporter, "core_model", lambda _network: core)
    result = invoke("--checkpoint", tiny_checkpoint, "-o", output)
    assert result.exit_code == 3
    assert "differs too much from PyTorch, so it was not written" in result.stderr
    assert output.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--checkpoint", "absent.pt"], 2, "absent.pt"),
        (["--checkpoint", "."], 2, "is a directory"),
        (["--checkpoint", "text.pt"], 1, "not a PyTorch checkpoint"),
        (["--checkpoint", "tiny.safetensors"], 1, "tiny.onnx exists: give --force"),
        (["--checkpoint", "tiny.safetensors", "-o", "x.txt"], 2, "ends in .onnx"),
        (["--checkpoint", "tiny.safetensors", "-o", "missing/x.onnx"], 1, "missing/x.onnx: No such file"),
        (["--checkpoint", "tiny.safetensors", "--fp16", "--precision", "fp32"], 2, "contradict"),
        (["--checkpoint", "misf-smal"], 2, "misf comes with misf-small"),
        (["--checkpoint", "tiny.safetensors", "--config", "misf-small", "-o", "x.onnx"], 1, "leave out --config"),
        (["--checkpoint", "tiny.safetensors", "--config", "misf-large", "-o", "x.onnx"], 2, "expected one of misf"),
        (["--checkpoint", "tiny.safetensors", "-o", "x.onnx", "--calibration", "empty"], 1, "found none"),
        ([], 2, "--checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_arguments(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.pt").write_text("weights go here")
    Path("tiny.safetensors").symlink_to(tiny_checkpoint)
    Path("tiny.onnx").write_bytes(b"precious")
    Path("empty").mkdir()
    before = sorted(tmp_path.iterdir())
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == before
    assert Path("tiny.onnx").read_bytes() == b"precious"


@pytest.mark.slow
def test_the_published_network_in_onnx_runtime(tmp_path: Path) -> None:
    """Published sizes, with the weights and stored outputs of the official generator."""
    from ..training.golden.make_official import GOLDEN, official_weights, picture_and_mask, stored

    with np.load(GOLDEN) as golden:
        shapes = {str(n): tuple(int(s) for s in shape if s) for n, shape in zip(golden["names"], golden["shapes"])}  # noqa: B905
        torch.save({"iteration": 1, "generator": official_weights(shapes)}, tmp_path / "gen.pth")
        network = load_model(tmp_path / "gen.pth")
        model = complete_model(core_model(network), network.config).SerializeToString()
        picture, mask = (tensor.numpy() for tensor in picture_and_mask())
        output = torch.from_numpy(run(model, picture, mask))
        hole = np.broadcast_to(mask > 0.5, picture.shape)
        for part, value in stored(output).items():
            inside = stored(torch.from_numpy(hole.astype(np.float32)))[part] > 0.5
            np.testing.assert_allclose(value[inside], golden[part][inside], rtol=0, atol=1e-4)


def test_inlined_functions_are_plain_nodes_with_the_same_result(
    tiny_onnx: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "plain.onnx"
    result = CliRunner().invoke(main, ["--checkpoint", str(tiny_checkpoint), "-o", str(output), "--inline-functions"])
    assert result.exit_code == 0, result.output
    model = onnx.load(output)
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    inputs = {"image": np.full((1, 3, 64, 48), 0.3, np.float32), "mask": np.zeros((1, 1, 64, 48), np.float32)}
    inputs["mask"][..., 20:40, 10:30] = 1
    expected, found = (onnxruntime.InferenceSession(path).run(None, inputs)[0] for path in (tiny_onnx, output))
    np.testing.assert_array_equal(found, expected)
