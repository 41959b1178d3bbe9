"""Engines, really built: by TensorRT for RTX, which needs no GPU to build. TensorRT's own builder does need one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from misf.export import export_cli as export_cli
from misf.export.engine import builder as engine_module
from misf.export.engine.build_cli import main as build_command
from misf.export.engine.builder import EngineOptions, build_engine, other_tools, prove_precision
from misf.export.engine.monitor import cancellable, make_monitor
from misf.plugins.dynamic_filter.onnx_op import filter_nodes, for_tensorrt
from misf.plugins.shared.errors import AccuracyError, EnvironmentMismatch, MisfError
from misf.plugins.shared.files import sha256
from misf.runtime.engines import flavors as tensorrt_api
from misf.runtime.engines.cudart import CudaRuntime
from misf.runtime.engines.flavors import Flavor
from misf.runtime.engines.inspector import inspected_layers, inspected_proof, inspected_types
from misf.runtime.engines.network import parser_error
from misf.runtime.engines.side_car import MAGICS, Limits, read_info, side_car, write_engine

from ..support.fake_gpu import FakeCudart

trt = pytest.importorskip("tensorrt_rtx")
SMALL = ("--min-shape", "32x40", "--opt-shape", "64x64", "--max-shape", "96x128")


def build(*arguments: str | Path) -> Any:
    return CliRunner().invoke(build_command, [str(argument) for argument in arguments])


def export(checkpoint: Path, *arguments: str | Path) -> Any:
    return CliRunner().invoke(export_cli.main, ["--checkpoint", *map(str, (checkpoint, *arguments))])


@pytest.fixture(scope="module")
def fp16(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The whole way by command: checkpoint -> fp16 ONNX -> engine."""
    folder = tmp_path_factory.mktemp("fp16")
    result = export(tiny_checkpoint, "--fp16", "-o", folder / "best.plan", *SMALL, "--max-batch", "4")
    return SimpleNamespace(result=result, folder=folder, plan=folder / "best.plan", onnx=folder / "best.onnx")


def test_from_checkpoint_to_fp16_engine(fp16: Any, tiny_checkpoint: Path) -> None:
    assert fp16.result.exit_code == 0, fp16.result.stderr
    assert fp16.result.stdout == f"{fp16.plan}\n"
    assert sorted(path.name for path in fp16.folder.iterdir()) == ["best.onnx", "best.plan", "best.plan.json"]
    assert fp16.plan.read_bytes()[:4] in MAGICS
    info = read_info(fp16.plan)
    assert (info.flavor, info.version, info.gpu) == ("tensorrt-rtx", trt.__version__, None)
    assert (info.precision_asked, info.precision_obtained, info.precision_proof) == ("fp16", "fp16", "network")
    assert info.convolutions["fp16"] > info.convolutions.get("fp32", 0)
    assert info.limits == Limits((1, 32, 40), (4, 64, 64), (4, 96, 128))
    assert (info.plugin, info.onnx, info.onnx_sha256) == (None, "best.onnx", sha256(fp16.onnx))
    assert info.checkpoint_sha256 == sha256(tiny_checkpoint)
    assert (info.plan_bytes, info.plan_sha256) == (fp16.plan.stat().st_size, sha256(fp16.plan))


def test_the_onnx_file_of_an_engine_stays(
    fp16: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model of its name is not replaced unasked; the same one, exported anew, is no reason to stop."""
    kept, plan = tmp_path / "best.onnx", tmp_path / "best.plan"
    arguments = ["--fp16", "-o", plan, *SMALL]
    shutil.copy(fp16.onnx, kept)
    assert export(tiny_checkpoint, *arguments).exit_code == 0
    assert sha256(kept) == sha256(fp16.onnx)
    monkeypatch.setattr(export_cli, "_export", lambda *how: shutil.copy(fp16.onnx, how[2]))
    plan.write_bytes(b"old")
    kept.write_bytes(b"precious")
    result = export(tiny_checkpoint, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{kept}, from which the engine is built, exists and is another model: give --force" in result.stderr
    assert (kept.read_bytes(), plan.read_bytes()) == (b"precious", b"old")
    assert export(tiny_checkpoint, *arguments, "--force").exit_code == 0
    assert sha256(kept) == read_info(plan).onnx_sha256 == sha256(fp16.onnx)


def test_fp32_engine(tiny_plan: Path, fp16: Any) -> None:
    info = read_info(tiny_plan)
    assert (info.precision_obtained, set(info.convolutions)) == ("fp32", {"fp32"})
    assert sum(info.convolutions.values()) == sum(read_info(fp16.plan).convolutions.values())
    assert info.config == read_info(fp16.plan).config


def test_json_says_what_the_side_car_says(fp16: Any, tmp_path: Path) -> None:
    result = build(
        fp16.onnx, "-o", tmp_path / "x.engine", *SMALL, "--fp16", "--opt-level", 1, "--workspace", 0.5, "--json"
    )
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    written = json.loads((tmp_path / "x.engine.json").read_text())
    assert written.pop("format") == 1
    assert {key: document[key] for key in written} == written
    assert document["settings"] == {"workspace_gib": 0.5, "opt_level": 1}
    assert document["engine"] == str(tmp_path / "x.engine")


def test_a_precision_that_does_not_come_out(tiny_onnx: Path, fp16: Any, tmp_path: Path) -> None:
    target = tmp_path / "best.plan"
    target.write_bytes(b"precious")
    for source, asked, came in ((tiny_onnx, "fp16", "fp32"), (fp16.onnx, "fp32", "fp16")):
        result = build(source, "-o", target, "--precision", asked, *SMALL)
        assert (result.exit_code, result.stdout) == (3, "")
        assert f"{asked} was requested but the engine is {came}" in result.stderr
        assert f"misf-export --precision {asked}" in result.stderr
    assert target.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [target]


def test_types_that_the_parser_changed(tmp_path: Path) -> None:
    prove_precision("fp16", {"fp16": 3, "fp32": 1}, {"fp16": 3, "fp32": 1}, tmp_path)
    with pytest.raises(AccuracyError, match="changed the types"):
        prove_precision("fp16", {"fp16": 3, "fp32": 1}, {"fp16": 4}, tmp_path)


def broken_weight(model: onnx.ModelProto) -> None:
    """A convolution whose weight has a channel too few."""
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    values = numpy_helper.to_array(weight)[:, :-1]
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), weight.name))


def mixed_types(model: onnx.ModelProto) -> None:
    """A sum of float32 and float16, which a weakly typed builder would let pass."""
    (last,) = (node for node in model.graph.node if node.output[0] == "output")
    last.output[0] = "before"
    half = numpy_helper.from_array(np.zeros(1, np.float16), "half_zero")
    model.graph.initializer.append(half)
    model.graph.node.append(helper.make_node("Add", ["before", "half_zero"], ["output"], "mixed"))


def unknown_op(model: onnx.ModelProto) -> None:
    """An op that no TensorRT knows and for which no plugin is registered."""
    (last,) = (node for node in model.graph.node if node.output[0] == "output")
    last.output[0] = "before"
    model.graph.node.append(helper.make_node("Mystery", ["before"], ["output"], "mystery_node", domain="elsewhere"))
    model.opset_import.append(helper.make_opsetid("elsewhere", 1))


@pytest.mark.parametrize("spoil", [broken_weight, mixed_types, unknown_op])
def test_a_wrong_graph_fails(tiny_onnx: Path, tmp_path: Path, spoil: Any) -> None:
    model = onnx.load(tiny_onnx)
    spoil(model)
    onnx.save(model, tmp_path / "wrong.onnx")
    result = build(tmp_path / "wrong.onnx", *SMALL)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("misf-build:")]
    assert "cannot parse" in line or "did not build" in line
    if spoil is unknown_op:
        assert "mystery_node" in line
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.onnx"]


def test_other_files(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", value[:1], value[1:])
    onnx.save(helper.make_model(graph), "other.onnx")
    Path("cut.onnx").write_bytes(tiny_onnx.read_bytes()[:3000])
    Path("empty.onnx").touch()
    Path("folder.onnx").mkdir()
    shutil.copy(tiny_onnx, "good.onnx")
    Path("good.plan").write_bytes(b"precious")
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, code, message in (
        (["other.onnx"], 1, "other.onnx is not one of our ONNX files"),
        (["cut.onnx"], 1, "cut.onnx is not an ONNX file, or a damaged one"),
        (["empty.onnx"], 1, "empty.onnx is not one of our ONNX files"),
        (["folder.onnx"], 1, "folder.onnx is a folder"),
        (["absent.onnx"], 1, "absent.onnx does not exist"),
        (["good.onnx"], 1, "good.plan exists: give --force"),
        (["good.onnx", "-o", "x.onnx"], 2, "expected a name that ends in .plan"),
        (["good.onnx", "-o", "missing/x.plan", *SMALL], 1, "cannot write missing/x.plan: No such file"),
        (["good.onnx", "-o", "x.plan", "--min-shape", "64"], 2, "expected HxW"),
        (["good.onnx", "-o", "x.plan", "--plugin", "a.so", "--no-plugin"], 2, "contradict"),
        (["good.onnx", "-o", "x.plan", "--plugin", "a.so"], 1, "has no plugins"),
        (["good.onnx", "-o", "x.plan", "--device", "cpu"], 2, "engines run on GPUs only"),
        (["good.onnx", "-o", "x.plan", "--fp16", "--precision", "fp32"], 2, "contradict"),
    ):
        backend = ["--backend", "tensorrt-rtx"] if code != 2 else []
        result = build(*arguments, *backend)
        assert (result.exit_code, result.stdout) == (code, ""), arguments
        assert message in result.stderr.splitlines()[-1], arguments
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert Path("good.plan").read_bytes() == b"precious"


def test_engine_options_are_for_engines(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", tiny_checkpoint, "-o", tmp_path / "x.onnx", "--max-shape", "96x96", "--no-plugin"]
    result = CliRunner().invoke(export_cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    assert "--max-shape, --no-plugin: only for engines, and x.onnx is not one" in result.stderr


def test_both_files_or_neither(tiny_plan: Path, tmp_path: Path) -> None:
    info = read_info(tiny_plan)
    plan = tmp_path / "x.plan"
    side_car(plan).mkdir()
    with pytest.raises(OSError, match="it is a folder"):
        write_engine(plan, b"data", info)
    assert [path.name for path in tmp_path.iterdir()] == ["x.plan.json"]
    side_car(plan).rmdir()
    plan.mkdir()
    side_car(plan).write_text("precious")
    with pytest.raises(OSError, match="it is a folder"):
        write_engine(plan, b"data", info)
    assert side_car(plan).read_text() == "precious"
    plan.rmdir()
    write_engine(plan, tiny_plan.read_bytes(), info)
    assert read_info(plan) == info


def test_what_the_parser_gets(tiny_onnx: Path) -> None:
    """Without the plugin: standard ops only, same numbers. With it: nodes with their attributes and no body."""
    model = onnx.load(tiny_onnx)
    assert len(filter_nodes(model)) == 2
    plain = onnx.load_from_string(for_tensorrt(model, with_plugin=False))
    assert not plain.functions
    assert {node.domain for node in plain.graph.node} <= {"", "ai.onnx"}
    rng = np.random.default_rng(0)
    feed = {"image": rng.random((2, 3, 34, 45), np.float32), "mask": np.ones((2, 1, 34, 45), np.float32)}
    outputs = [
        onnxruntime.InferenceSession(source.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for source in (model, plain)
    ]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-6)
    bare = onnx.load_from_string(for_tensorrt(model, with_plugin=True))
    assert not bare.functions
    assert len(filter_nodes(bare)) == 2
    assert len(model.functions) == 1  # ours is untouched
    network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.INTERNAL_ERROR))
    assert not parser.parse(bare.SerializeToString())  # a plugin that is missing is an error, not a quiet slow path
    assert "Plugin not found" in parser_error(parser)


def test_tensorrt_needs_a_gpu_and_a_plugin(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flavor = Flavor("tensorrt", trt, "10.3.0")
    monkeypatch.setattr(engine_module, "load_flavor", lambda _name: flavor)
    monkeypatch.setenv("MISF_HOME", str(tmp_path))
    monkeypatch.delenv("MISF_PLUGIN", raising=False)

    def no_gpu() -> Any:
        return SimpleNamespace(device_count=lambda: 0)

    monkeypatch.setattr(engine_module, "CudaRuntime", no_gpu)
    with pytest.raises(EnvironmentMismatch, match="there are 0 GPUs"):
        build_engine(tiny_onnx, tmp_path / "x.plan")
    one = SimpleNamespace(device_count=lambda: 1, compute_capability=lambda _: "8.7", set_device=lambda _: None)
    monkeypatch.setattr(engine_module, "CudaRuntime", lambda: one)
    with pytest.raises(EnvironmentMismatch, match=r"libmisf_trt10.so.*--no-plugin"):
        build_engine(tiny_onnx, tmp_path / "x.plan")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tensorrt_on_the_second_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """TensorRT's side of misf-build: RTX's builder, parser and config under its name, and a fake loader and inspector.

    What it makes must be made, and run, on cuda:1.
    """
    library = FakeCudart(gpus=2)

    class Builder:
        def __init__(self, logger: Any):
            assert library.current == 1
            self._real = trt.Builder(logger)

        def __getattr__(self, name: str) -> Any:
            assert library.current == 1
            return getattr(self._real, name)

    context = SimpleNamespace(set_input_shape=lambda name, shape: shape == (1, {"image": 3, "mask": 1}[name], 64, 64))

    class Inspector:
        execution_context = None

        def get_engine_information(self, _layout: Any) -> str:
            assert self.execution_context is context
            return json.dumps(DYNAMIC)

    def load(_plan: bytes) -> Any:
        assert library.current == 1
        return SimpleNamespace(
            create_execution_context=lambda strategy: context if strategy.name == "USER_MANAGED" else None,
            create_engine_inspector=Inspector,
        )

    runtime = SimpleNamespace(Builder=Builder, Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=load))
    module = SimpleNamespace(**{**vars(trt), **vars(runtime)})
    monkeypatch.setattr(engine_module, "load_flavor", lambda _name: Flavor("tensorrt", module, "10.13.3"))
    monkeypatch.setattr(engine_module, "CudaRuntime", lambda: CudaRuntime(library))
    monkeypatch.setattr(engine_module, "_timing_cache", lambda *_: contextlib.nullcontext())  # RTX's config takes none
    return library


def test_tensorrt_build_on_another_gpu(tensorrt_on_the_second_gpu: Any, fp16: Any, tmp_path: Path) -> None:
    """-v says what the inspector said, the side-car keeps it; its N/A for dynamic shapes fails nothing."""
    assert tensorrt_on_the_second_gpu.current == 0
    plan = tmp_path / "x.plan"
    result = build(fp16.onnx, "-o", plan, *SMALL, "--no-plugin", "--device", "cuda:1", "-v")
    assert result.exit_code == 0, result.stderr
    assert "layers: 1 CaskConvolution, 1 Reformat, 1 PluginV3; 1 of them only change a tensor's format" in result.stderr
    assert f"filter filter: {NO_ANSWER}; Channel major FP16 format where channel % 8 == 0" in result.stderr
    info = read_info(plan)
    assert info.layers == inspected_layers(json.dumps(DYNAMIC))
    assert (info.compute_capability, info.precision_proof) == ("8.9", "engine")
    assert "layers:" not in build(fp16.onnx, "-o", plan, *SMALL, "--no-plugin", "--device", "cuda:1").stderr


def test_what_the_builder_is_asked_for() -> None:
    """By RTX's own config; that it then builds is in all other tests."""
    flavor = Flavor("tensorrt-rtx", trt, trt.__version__)
    builder = trt.Builder(tensorrt_api.logger_of(flavor))
    assert builder.create_builder_config().get_flag(trt.BuilderFlag.TF32)
    config = engine_module._config(flavor, builder, EngineOptions())
    assert config.num_optimization_profiles == 1
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert config.get_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10)


def test_lines_for_other_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module.library, "find_library", lambda *_, **__: tmp_path / "twin.so")
    limits = Limits((1, 64, 64), (2, 256, 320), (4, 512, 512))
    files = Path("b.onnx"), "fp16", Path("b.plan"), limits
    lines = other_tools(Flavor("tensorrt", None, "10.3.0"), *files, Path("/p/libmisf_trt10.so"))
    assert lines["trtexec"] == (
        "trtexec --loadEngine=b.plan --shapes=image:2x3x256x320,mask:2x1x256x320 --dynamicPlugins=/p/libmisf_trt10.so"
    )
    assert lines["triton"].endswith(f"--backend-config=tensorrt,plugins={tmp_path}/twin.so")
    assert lines["polygraphy"] == (
        "polygraphy run b.onnx --onnxrt --trt --strongly-typed "
        "--input-shapes 'image:[2,3,256,320]' 'mask:[2,1,256,320]' --atol 0.01 --plugins /p/libmisf_trt10.so"
    )
    without = other_tools(Flavor("tensorrt", None, "11.0.0"), *files, None)
    assert not any("lugin" in line for line in without.values())


def test_polygraphy_understands_its_line(tiny_onnx: Path, tmp_path: Path) -> None:
    """All of it but TensorRT, in whose place ONNX Runtime runs a second time."""
    limits = Limits((1, 64, 64), (1, 64, 80), (4, 512, 512))
    line = other_tools(Flavor("tensorrt", None, "10.3.0"), tiny_onnx, "fp32", tmp_path / "b.plan", limits, None)
    script = "import sys; from polygraphy.tools import main; sys.exit(main())"
    command = [sys.executable, "-c", script, *shlex.split(line["polygraphy"].replace("--trt ", "--onnxrt "))[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout


INSPECTED = {
    # Shortened from the layouts in NVIDIA's documents; no engine of ours has been inspected yet (docs/gpu-status.md).
    "TensorRT 10": {
        "Layers": [
            {
                "Name": "stem",
                "LayerType": "CaskConvolution",
                "Inputs": [
                    {"Name": "a", "Dimensions": [1, 4, 64, 64], "Format/Datatype": "Row major linear FP16 format"}
                ],
                "Outputs": [{"Name": "b", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
            },
            {"Name": "norm", "Inputs": [{"Name": "b", "Format/Datatype": "Row major linear FP32"}], "Outputs": []},
        ],
        "Bindings": ["image", "mask", "output"],
    },
    "TensorRT 11": {
        "Layers": [
            {
                "Name": "stem",
                "Inputs": [{"Name": "a", "Format": "LINEAR", "DataType": "HALF"}],
                "Outputs": [{"Name": "b", "Format": "HWC8", "DataType": "Half"}],
            },
            {"Name": "norm", "Inputs": [{"Name": "b", "Format": "LINEAR", "DataType": "FLOAT"}], "Outputs": []},
        ],
        "I/O Tensors": [],
    },
    "names only": {"Layers": ["stem", "norm"], "Bindings": []},
}
NO_ANSWER = "N/A due to dynamic shapes"
DYNAMIC = {  # as in public logs of TensorRT 8 to 10 for engines with a dynamic profile, which ours all are
    "Layers": [
        {
            "Name": "stem",
            "LayerType": "CaskConvolution",
            "Inputs": [
                {"Name": "a", "Location": "Device", "Dimensions": [-1, 4, -1, -1], "Format/Datatype": NO_ANSWER}
            ],
            "Outputs": [
                {"Name": "b", "Location": "Device", "Dimensions": [-1, 8, -1, -1], "Format/Datatype": NO_ANSWER}
            ],
        },
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to filter",
            "LayerType": "Reformat",
            "Inputs": [{"Name": "b", "Format/Datatype": NO_ANSWER}],
            "Outputs": [{"Name": "c", "Format/Datatype": NO_ANSWER}],
        },
        {
            "Name": "filter",
            "LayerType": "PluginV3",
            "Inputs": [{"Name": "c", "Format/Datatype": NO_ANSWER}],
            "Outputs": [{"Name": "d", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
        },
    ],
    "Bindings": ["image", "mask", "output"],
}


def test_inspector() -> None:
    for name in ("TensorRT 10", "TensorRT 11"):
        text = json.dumps(INSPECTED[name])
        assert inspected_types(text) == {"fp16": 2, "fp32": 1}
        assert inspected_proof("fp16", text, "x.plan") == "engine"
        with pytest.raises(AccuracyError, match="fp16 was requested but no layer"):
            inspected_proof("fp16", re.sub("(?i)fp16|half", "fp32", text), "x.plan")
    text = json.dumps(INSPECTED["names only"])
    assert (inspected_types(text), inspected_layers(text)) == ({}, {})
    assert inspected_proof("fp16", text, "x.plan") == "network"


def test_inspector_that_does_not_know() -> None:
    """Unknown is not wrong: the types of the network are the proof then, unless weights or kernels tell."""
    unknown = json.loads(json.dumps(DYNAMIC).replace("Channel major FP16 format where channel % 8 == 0", NO_ANSWER))
    assert inspected_types(json.dumps(unknown)) == {"unknown": 6}
    for asked in ("fp16", "fp32"):
        assert inspected_proof(asked, json.dumps(unknown), "x.plan") == "network"
    unknown["Layers"][0] |= {"Weights": {"Type": "Float", "Count": 12}, "Bias": {"Type": "Float", "Count": 3}}
    assert inspected_proof("fp16", json.dumps(unknown), "x.plan") == "network"
    for told in (
        {"Weights": {"Type": "Half", "Count": 9408}},
        {"TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckcrs_nhwc_tilesize128x64x64"},
    ):
        unknown["Layers"][0] |= told
        assert inspected_proof("fp16", json.dumps(unknown), "x.plan") == "engine"


def test_inspected_layers() -> None:
    assert inspected_layers(json.dumps(DYNAMIC)) == {
        "kinds": {"CaskConvolution": 1, "Reformat": 1, "PluginV3": 1},
        "reformats": 1,
        "filters": {"filter": [NO_ANSWER, "Channel major FP16 format where channel % 8 == 0"]},
    }


def test_progress_and_cancellation_inside_a_build(tiny_onnx: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A bar gets TensorRT's phases; a build whose monitor says stop ends without a plan."""
    events: list[tuple[str, Any]] = []
    bar = SimpleNamespace(
        add_task=lambda title, total: events.append((title, total)) or title,
        update=lambda task, completed: events.append((task, completed)),
        remove_task=lambda task: events.append((task, "removed")),
    )
    monitors = []

    def monitor(module: Any, _bar: Any) -> Any:
        monitors.append(make_monitor(module, bar))
        if len(monitors) == 2:
            monitors[-1].cancelled.set()
        return monitors[-1]

    monkeypatch.setattr(engine_module, "make_monitor", monitor)
    options = EngineOptions(backend="tensorrt-rtx", limits=Limits((1, 32, 40), (1, 64, 64), (1, 96, 128)))
    build_engine(tiny_onnx, tmp_path / "x.plan", options)
    started = [task for task, value in events if isinstance(value, int)]
    assert started
    assert any(task.startswith("  ") for task in started)  # a phase inside a phase
    assert {task for task, value in events if value == "removed"} == set(started)
    with pytest.raises(MisfError, match="did not build"):
        build_engine(tiny_onnx, tmp_path / "y.plan", options)
    assert not (tmp_path / "y.plan").exists()


def test_cancellable_hands_on_results_and_errors() -> None:
    import threading

    assert cancellable(lambda: 3, threading.Event()) == 3
    with pytest.raises(ZeroDivisionError):
        cancellable(lambda: 1 // 0, threading.Event())


def test_ctrl_c_during_a_build(tiny_onnx: Path, tmp_path: Path) -> None:
    target = tmp_path / "best.plan"
    target.write_bytes(b"precious")
    command = [
        sys.executable,
        "-c",
        "from misf.export.engine.build_cli import main; main()",
        str(tiny_onnx),
        "-o",
        str(target),
    ]
    environment = {**os.environ, "MISF_HOME": str(tmp_path / "home")}
    with subprocess.Popen(
        [*command, "--backend", "tensorrt-rtx", "-v"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell's background jobs ignore SIGINT, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("phase "):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 130, rest
    assert "cancelling the build" in rest
    assert "misf-build: interrupted" in rest
    assert "Traceback" not in rest
    assert [path.name for path in tmp_path.iterdir()] == ["best.plan"]
    assert target.read_bytes() == b"precious"


def test_timing_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """TensorRT's, for which a GPU is needed, so with a stand-in for its builder config. RTX has none."""
    monkeypatch.setenv("MISF_HOME", str(tmp_path))
    flavor, machine = Flavor("tensorrt", None, "10.3.0"), engine_module._Machine("Orin", "8.7")
    given: list[bytes] = []

    class Config:
        def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
            if serialized_timing_cache == b"damaged":
                return None
            given.append(serialized_timing_cache)
            return SimpleNamespace(serialize=lambda: memoryview(serialized_timing_cache + b"measured "))

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            self.cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self.cache

    for cancelled in (False, True):
        stopped = pytest.raises(KeyboardInterrupt) if cancelled else contextlib.nullcontext()
        with stopped, engine_module._timing_cache(flavor, Config(), EngineOptions(), machine):
            if cancelled:
                raise KeyboardInterrupt
    (cache,) = tmp_path.iterdir()
    assert cache.name == "timing-tensorrt-10.3.0-sm87.cache"
    assert (given, cache.read_bytes()) == ([b"", b"measured "], b"measured measured ")
    other = tmp_path / "mine" / "cache"
    other.parent.mkdir()
    other.write_bytes(b"damaged")
    with engine_module._timing_cache(flavor, Config(), EngineOptions(timing_cache=other), machine):
        pass
    assert other.read_bytes() == b"measured "
    assert "damaged or of another TensorRT" in caplog.text
    rtx = Flavor("tensorrt-rtx", trt, trt.__version__)
    with engine_module._timing_cache(rtx, None, EngineOptions(timing_cache=tmp_path / "x"), engine_module._Machine()):
        pass
    assert not (tmp_path / "x").exists()


def test_logger_keeps_errors_and_hides_noise(caplog: pytest.LogCaptureFixture) -> None:
    logger = tensorrt_api.logger_of(Flavor("tensorrt-rtx", trt, trt.__version__))
    severity = trt.ILogger.Severity
    with caplog.at_level("INFO", logger="misf"):
        logger.log(severity.WARNING, "A node named node_of_x already exists, the output tensors ...")
        logger.log(severity.WARNING, "something real")
        logger.log(severity.ERROR, "IBuilder::build: Error Code 4: API Usage Error (profile 0\nis missing)")
    assert [record.message for record in caplog.records] == ["tensorrt-rtx: something real"]
    assert tensorrt_api.reason(logger) == "profile 0 is missing"
    assert tensorrt_api.reason(logger) == "no reason given"  # an old error does not explain the next failure
    assert tensorrt_api.logger_of(Flavor("tensorrt-rtx", trt, "another object")) is logger


def test_an_engine_is_tuned_for_the_networks_working_size_within_its_limits() -> None:
    from misf.export.engine.builder import _tuned
    from misf.runtime.engines.side_car import Limits

    limits = Limits((1, 64, 64), (2, 512, 512), (2, 1024, 1024))
    assert _tuned(limits, 256).opt == (2, 256, 256)
    assert _tuned(Limits((1, 300, 64), (1, 0, 0), (1, 400, 200)), 256).opt == (1, 300, 200)
