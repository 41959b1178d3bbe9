"""Engines at run time: what is refused before loading, and everything around TensorRT's call, on a fake GPU.

The plan is real (TensorRT for RTX builds it on the CPU), so are its side-car and libcudart's symbols. What only a GPU
can show is listed in docs/gpu-status.md.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from misf.plugins.shared.errors import EnvironmentMismatch, MisfError
from misf.runtime import Inpainter
from misf.runtime.backends import open_backend
from misf.runtime.backends import tensorrt as backend_module
from misf.runtime.backends.tensorrt import CACHED_SHAPES, TensorRtBackend
from misf.runtime.checks import doctor, engine_checks
from misf.runtime.checks.verify_cli import main as verify_command
from misf.runtime.engines import cudart
from misf.runtime.engines import flavors as tensorrt_api
from misf.runtime.engines.flavors import Flavor
from misf.runtime.engines.side_car import side_car
from misf.runtime.run_cli import main as run_command

from ..support.fake_gpu import (
    STREAM,
    FakeContext,
    FakeCudart,
    FakeEngine,
    FakeRuntimeCache,
    FakeRuntimeConfig,
    RtxEngine,
    array_at,
    fake_tensorrt,
)

SHAPES = [(1, 64, 64), (2, 33, 47), (1, 96, 128), (1, 32, 40), (1, 50, 60)]


def picture_and_mask(n: int, height: int, width: int, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    image = rng.random((n, 3, height, width), dtype=np.float32)
    return image, (rng.random((n, 1, height, width)) > 0.7).astype(np.float32)


@pytest.fixture
def gpu(tiny_onnx: Path, tiny_plan: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
    """A fake GPU behind `open_backend`, with a TensorRT that runs tiny_plan."""
    library = FakeCudart()
    put_behind_open_backend("tensorrt", FakeEngine, library, tiny_onnx, tiny_plan, monkeypatch)
    return library


def put_behind_open_backend(
    name: str, engine: type[FakeEngine], library: FakeCudart, tiny_onnx: Path, plan: Path, monkeypatch: Any
) -> Any:
    """Return the module of the fake TensorRT of that name."""
    version = json.loads(side_car(plan).read_text())["version"]
    module = fake_tensorrt(library, tiny_onnx, plan.read_bytes(), engine)
    monkeypatch.setattr(backend_module, "load_flavor", lambda _name: Flavor(name, module, version))
    monkeypatch.setattr(backend_module, "CudaRuntime", lambda: cudart.CudaRuntime(library))
    return module


@pytest.fixture
def reference(tiny_onnx: Path) -> Any:
    return open_backend(tiny_onnx, backend="onnxruntime", device="cpu")


def test_same_pictures_as_onnx_runtime(gpu: FakeCudart, tiny_plan: Path, reference: Any) -> None:
    """Three rounds: the second captures a graph, the third replays it; the data changes each time."""
    engine = open_backend(tiny_plan)
    assert (engine.name, engine.device, engine.precision) == ("tensorrt", "cuda:0", "fp32")
    for seed in range(3):
        for shape in SHAPES[:CACHED_SHAPES]:
            image, mask = picture_and_mask(*shape, seed)
            np.testing.assert_array_equal(engine(image, mask), reference(image, mask))
    assert gpu.count("cudaStreamBeginCapture") == CACHED_SHAPES
    assert gpu.count("cudaGraphLaunch") == 2 * CACHED_SHAPES


def test_one_memory_for_all_shapes(gpu: FakeCudart, tiny_plan: Path, reference: Any) -> None:
    """It is as large as the largest asked for; when it grows, graphs that hold the old addresses are captured anew."""
    engine: Any = open_backend(tiny_plan)
    small, large = (1, 32, 40), (2, 96, 128)
    for shape in (small, small, small, large, small, small, large, large):
        image, mask = picture_and_mask(*shape)
        np.testing.assert_array_equal(engine(image, mask), reference(image, mask))
    scratch = 4 * 2 * 3 * 96 * 128
    buffers = sum(4 * 7 * n * height * width for n, height, width in (small, large))
    assert gpu.device_bytes == scratch + buffers
    assert gpu.count("cudaStreamBeginCapture") == 3  # small twice
    assert len(gpu.graphs) == 2
    engine.close()
    assert not gpu.live


def test_a_size_of_memory_that_is_not_told(
    tiny_onnx: Path, tiny_plan: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 is an error or no need: what the largest shape needs is taken; and where that is 0, nothing is registered."""
    library = FakeCudart()
    module = put_behind_open_backend("tensorrt", FakeEngine, library, tiny_onnx, tiny_plan, monkeypatch)
    monkeypatch.setattr(FakeEngine, "does_not_tell", True)
    image, mask = picture_and_mask(1, 64, 64)
    for size in (FakeEngine.device_memory_size_v2, 0):
        monkeypatch.setattr(FakeEngine, "device_memory_size_v2", size)
        np.testing.assert_array_equal(open_backend(tiny_plan)(image, mask), reference(image, mask))
        assert [found for _, found in module.engines[-1].registered] == [size] * bool(size)


def test_memory_that_tensorrt_does_not_take(gpu: FakeCudart, tiny_plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so to its logger only."""
    monkeypatch.setattr(FakeContext, "update_device_memory_size_for_shapes", lambda _: 8)
    with pytest.raises(MisfError, match="rejects 8 bytes of scratch memory: the memory is too small"):
        open_backend(tiny_plan)(*picture_and_mask(1, 64, 64))
    assert not gpu.live


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_tensorrt_for_rtx_captures_by_itself(
    tiny_onnx: Path, tiny_plan: Path, reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_graph: bool
) -> None:
    """Its fake forbids a capture from outside; what it compiled in one process it finds again in the next."""
    monkeypatch.setenv("MISF_HOME", str(tmp_path))
    library = FakeCudart()
    module = put_behind_open_backend("tensorrt-rtx", RtxEngine, library, tiny_onnx, tiny_plan, monkeypatch)
    for process, compiled in enumerate((2, 0, 2)):
        if process == 2:
            (file,) = tmp_path.iterdir()
            file.write_bytes(b"of another driver")
        engine = TensorRtBackend(tiny_plan, cuda_graph=cuda_graph)
        for shape in (SHAPES[0], SHAPES[1], SHAPES[0], SHAPES[0]):
            image, mask = picture_and_mask(*shape)
            np.testing.assert_array_equal(engine(image, mask), reference(image, mask))
        assert module.engines[process].compiled == compiled
        assert module.engines[process].graphs == ("WHOLE_GRAPH_CAPTURE" if cuda_graph else "DISABLED")
        del engine
    assert library.count("cudaStreamBeginCapture") == 0
    assert file.name == f"kernels-tensorrt-rtx-{pytest.importorskip('tensorrt_rtx').__version__}-unknown-GPU.cache"
    assert file.read_bytes().startswith(b"cache:")


@pytest.mark.parametrize("used", [True, False])
def test_another_gpu_than_the_first(
    gpu: FakeCudart, tiny_plan: Path, reference: Any, monkeypatch: pytest.MonkeyPatch, used: bool
) -> None:
    """All memory is on it, and the caller's GPU stays the caller's, unless that would put a context on an idle one."""
    monkeypatch.setattr(cudart, "in_use", lambda device: used and device == 0)
    gpu.gpus = 2
    engine = open_backend(tiny_plan, device="cuda:1")
    assert gpu.current == (0 if used else 1)
    image, mask = picture_and_mask(1, 64, 64)
    for _ in range(3):
        np.testing.assert_array_equal(engine(image, mask), reference(image, mask))
        assert gpu.current == (0 if used else 1)
    assert {gpu.device_of[address] for address in gpu.live} == {1}
    gpu.current = 0
    ours, theirs = OnGpu(gpu, image), OnGpu(gpu, mask)
    with pytest.raises(ValueError, match="image must be on cuda:1, like the engine, but is on cuda:0"):
        engine(ours, theirs)  # type: ignore[arg-type]
    ours.__cuda_array_interface__["data"] = (8, False)
    with pytest.raises(ValueError, match="is not in GPU memory"):
        engine(ours, theirs)  # type: ignore[arg-type]


def test_results_do_not_share_memory(gpu: FakeCudart, tiny_plan: Path) -> None:  # noqa: ARG001
    engine = open_backend(tiny_plan)
    first = engine(*picture_and_mask(1, 64, 64, 1))
    kept = first.copy()
    engine(*picture_and_mask(1, 64, 64, 2))
    np.testing.assert_array_equal(first, kept)


def test_other_types_and_layouts(gpu: FakeCudart, tiny_plan: Path, reference: Any) -> None:  # noqa: ARG001
    image, mask = picture_and_mask(1, 40, 56)
    turned = np.ascontiguousarray(image.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)  # channels last in memory
    result = open_backend(tiny_plan)(turned, mask.astype(np.float64))
    np.testing.assert_array_equal(result, reference(image, mask))


def test_least_recently_used_shapes_are_dropped_and_nothing_leaks(gpu: FakeCudart, tiny_plan: Path) -> None:
    engine = open_backend(tiny_plan)
    for height in reversed(range(32, 32 + 2 * CACHED_SHAPES)):
        engine(*picture_and_mask(1, height, 40))
        engine(*picture_and_mask(1, height, 40))
    assert len(gpu.graphs) == CACHED_SHAPES
    engine(*picture_and_mask(1, 32 + CACHED_SHAPES - 1, 40))  # still there
    assert gpu.count("cudaGraphExecDestroy") == CACHED_SHAPES
    assert gpu.live
    engine.close()
    assert not gpu.live
    assert not gpu.graphs
    engine(*picture_and_mask(1, 32, 40))  # and it goes on
    del engine
    assert not gpu.live
    assert gpu.count("cudaStreamDestroy") == 1


def test_a_graph_that_cannot_be_captured_is_done_without(gpu: FakeCudart, tiny_plan: Path, reference: Any) -> None:
    gpu.capture_fails = True
    engine = open_backend(tiny_plan)
    for seed in range(4):
        image, mask = picture_and_mask(1, 64, 64, seed)
        np.testing.assert_array_equal(engine(image, mask), reference(image, mask))
    assert gpu.count("cudaStreamBeginCapture") == 1
    assert gpu.count("cudaGraphLaunch") == 0
    assert gpu.last_error == 0


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_zero_copy(gpu: FakeCudart, tiny_plan: Path, reference: Any, cuda_graph: bool) -> None:
    gpu.integrated = True
    engine = TensorRtBackend(tiny_plan, zero_copy=True, cuda_graph=cuda_graph)
    for seed in range(3):
        image, mask = picture_and_mask(1, 64, 80, seed)
        np.testing.assert_array_equal(engine(image, mask), reference(image, mask))
    assert gpu.count("cudaMemcpyAsync") == 0
    assert gpu.count("cudaGraphLaunch") == (2 if cuda_graph else 0)


def test_zero_copy_by_environment(gpu: FakeCudart, tiny_plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISF_ZERO_COPY", "1")
    open_backend(tiny_plan)(*picture_and_mask(1, 64, 64))
    assert gpu.count("cudaMemcpyAsync") == 0


class OnGpu:
    """An array on the fake GPU, as another library would hand it over."""

    def __init__(self, library: FakeCudart, values: Any, stream: int | None = None):
        address = ctypes.c_void_p()
        library.cudaMalloc(SimpleNamespace(_obj=address), values.nbytes)  # type: ignore[attr-defined]
        array_at(address.value or 0, values.shape)[...] = values
        self.shape = values.shape
        interface = {"shape": values.shape, "typestr": "<f4", "data": (address.value, False), "version": 3}
        self.__cuda_array_interface__ = interface | ({} if stream is None else {"stream": stream})


def test_arrays_on_the_gpu_stay_there(gpu: FakeCudart, tiny_plan: Path, reference: Any) -> None:
    """They run by the same graph as arrays on the CPU, without any memory there."""
    engine = open_backend(tiny_plan)
    for seed in range(3):
        image, mask = picture_and_mask(2, 64, 64, seed)
        result: Any = engine(OnGpu(gpu, image, stream=9), OnGpu(gpu, mask, stream=9))
        interface = result.__cuda_array_interface__
        assert interface["shape"] == image.shape
        np.testing.assert_array_equal(array_at(interface["data"][0], image.shape), reference(image, mask))
    assert (gpu.count("cudaStreamBeginCapture"), gpu.count("cudaGraphLaunch")) == (1, 2)
    assert gpu.count("cudaHostAlloc") == 0
    assert set(gpu.waits) == {(STREAM, 9)}
    image, mask = picture_and_mask(2, 64, 64, seed=5)
    np.testing.assert_array_equal(engine(image, mask), reference(image, mask))
    assert gpu.count("cudaStreamBeginCapture") == 1


def test_torch_tensors_wait_on_the_gpu(
    gpu: FakeCudart, tiny_plan: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither side waits on the CPU: our stream waits for torch's, then torch's for ours."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: SimpleNamespace(cuda_stream=9))

    class Tensor(OnGpu):
        __module__ = "torch"
        device = None

        def new_empty(self, shape: tuple[int, ...]) -> Any:
            return Tensor(gpu, np.zeros(shape, np.float32))

    engine = open_backend(tiny_plan)
    image, mask = picture_and_mask(2, 64, 64)
    engine(Tensor(gpu, image), Tensor(gpu, mask))  # type: ignore[arg-type]
    gpu.waits.clear()
    before = gpu.count("cudaStreamSynchronize"), gpu.count("cudaDeviceSynchronize")
    result: Any = engine(Tensor(gpu, image), Tensor(gpu, mask))  # type: ignore[arg-type]
    assert (gpu.count("cudaStreamSynchronize"), gpu.count("cudaDeviceSynchronize")) == before
    assert gpu.waits == [(STREAM, 9)] * 3 + [(9, STREAM)]
    assert isinstance(result, Tensor)
    values = array_at(result.__cuda_array_interface__["data"][0], image.shape)
    np.testing.assert_array_equal(values, reference(image, mask))
    engine = TensorRtBackend(tiny_plan, zero_copy=True)
    engine(Tensor(gpu, image), Tensor(gpu, mask))  # type: ignore[arg-type]
    before = gpu.count("cudaStreamSynchronize"), gpu.count("cudaDeviceSynchronize")
    engine(image, mask)  # writes where that one may still read, so waits for it, and for itself
    assert gpu.count("cudaStreamSynchronize") == before[0] + 2


def test_arrays_on_the_gpu_of_the_wrong_kind(gpu: FakeCudart, tiny_plan: Path) -> None:
    engine = open_backend(tiny_plan)
    image, mask = picture_and_mask(1, 64, 64)
    with pytest.raises(ValueError, match="both be on the GPU"):
        engine(OnGpu(gpu, image), mask)  # type: ignore[arg-type]
    for change in ({"typestr": "<f2"}, {"strides": (49152, 4, 768, 12)}, {"shape": (1, 4, 64, 64)}):
        array = OnGpu(gpu, image)
        array.__cuda_array_interface__ |= change
        with pytest.raises(ValueError, match="contiguous float32 array"):
            engine(array, OnGpu(gpu, mask))  # type: ignore[arg-type]


def test_memory_runs_out(gpu: FakeCudart, tiny_plan: Path) -> None:
    """First what other shapes hold is given up; when that is not enough it is an ordinary MemoryError."""
    engine = open_backend(tiny_plan)
    engine(*picture_and_mask(1, 64, 64))
    gpu.memory = int(1.5 * gpu.device_bytes)
    engine(*picture_and_mask(1, 66, 64))
    assert sum(kind == "host" for kind, _ in gpu.live.values()) == 3  # the buffers of one shape
    gpu.memory = 1000
    with pytest.raises(MemoryError, match="cuda:0"):
        engine(*picture_and_mask(1, 68, 64))
    assert not gpu.live


def test_shape_outside_the_profile(gpu: FakeCudart, tiny_plan: Path) -> None:  # noqa: ARG001
    engine = open_backend(tiny_plan)
    for shape in ((3, 64, 64), (1, 97, 64), (1, 64, 39)):
        with pytest.raises(ValueError, match="1 to 2 pictures of 32x40 to 96x128") as caught:
            engine(*picture_and_mask(*shape))
        assert f"got {shape[0]} of {shape[1]}x{shape[2]}" in str(caught.value)


@pytest.mark.parametrize("size", [(300, 200), (96, 129), (5, 7)], ids=str)
def test_inpainter_keeps_to_the_profile(
    gpu: FakeCudart,  # noqa: ARG001
    tiny_plan: Path,
    reference: Any,
    size: tuple[int, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Larger pictures are seen smaller, with a notice; smaller ones are padded, silently; known pixels are equal."""
    rng = np.random.default_rng(1)
    photograph = rng.integers(0, 256, (*size, 3), np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[1:4, 2:6] = 255
    with caplog.at_level("WARNING", logger="misf"):
        result = Inpainter(tiny_plan, strategy="original")(photograph, mask)
    assert result.shape == photograph.shape
    np.testing.assert_array_equal(result[mask == 0], photograph[mask == 0])
    notices = [record.message for record in caplog.records if "takes up to 96x128" in record.message]
    assert len(notices) == (0 if size == (5, 7) else 1)
    if size == (5, 7):
        padded = np.pad(photograph, ((0, 27), (0, 33), (0, 0)), "symmetric").astype(np.float32) / np.float32(255)
        hole = np.pad(mask, ((0, 27), (0, 33)), "symmetric")[None, None] > 127
        expected = reference(np.ascontiguousarray(padded.transpose(2, 0, 1)[None]), hole.astype(np.float32))
        values = np.rint(expected[0].transpose(1, 2, 0)[:5, :7] * 255).astype(np.uint8)
        np.testing.assert_array_equal(result[mask > 0], values[mask > 0])


def test_verify_an_engine(gpu: FakeCudart, tiny_plan: Path, tiny_checkpoint: Path) -> None:  # noqa: ARG001
    result = CliRunner().invoke(verify_command, [str(tiny_plan), "--checkpoint", str(tiny_checkpoint), "--json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["backend"], report["passed"]) == ("tensorrt", True)
    # Smallest, best, and the default sizes as near as the engine goes.
    assert [case["size"] for case in report["cases"]] == ["1x32x40", "2x64x64", "1x96x128", "2x96x128", "1x96x93"]


def change_side_car(plan: Path, **fields: Any) -> None:
    path = side_car(plan)
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut_off(plan: Path) -> None:
    plan.write_bytes(plan.read_bytes()[:1000])


def flip_a_bit(plan: Path) -> None:
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)


def not_a_plan(plan: Path) -> None:
    plan.write_bytes(b"PK\3\4 something else")
    side_car(plan).unlink()


def accepted_but_not_loadable(plan: Path) -> None:
    import hashlib

    data = b"ftrt" + bytes(100)
    plan.write_bytes(data)
    change_side_car(plan, plan_bytes=len(data), plan_sha256=hashlib.sha256(data).hexdigest())


SPOILED = {
    "cut off": (cut_off, 1, "is truncated: 1000 bytes instead of"),
    "damaged": (flip_a_bit, 1, "is damaged"),
    "not a plan": (not_a_plan, 1, "is not a TensorRT engine"),
    "no side-car": (lambda plan: side_car(plan).unlink(), 4, "has no side-car model.plan.json"),
    "side-car of nothing": (lambda plan: side_car(plan).write_text("{}"), 1, "damaged side-car"),
    "side-car cut off": (lambda plan: side_car(plan).write_text('{"format": 1, "lim'), 1, "damaged side-car"),
    "side-car of the future": (lambda plan: change_side_car(plan, format=2), 1, "another version of misf"),
    "empty": (lambda plan: plan.write_bytes(b""), 1, "is empty"),
    "other TensorRT": (lambda plan: change_side_car(plan, version="1.2.0.54"), 4, "was built with version 1.2.0.54"),
    "other system": (
        lambda plan: change_side_car(plan, platform="Linux aarch64", flavor="tensorrt"),
        4,
        "was built on Linux aarch64",
    ),
    "other GPU": (
        lambda plan: change_side_car(plan, gpu="Orin", compute_capability="8.7"),
        4,
        "was built for Orin (compute capability 8.7), this GPU has 8.9",
    ),
    "not loadable": (accepted_but_not_loadable, 1, "cannot load"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_one_clear_line(gpu: FakeCudart, tiny_plan: Path, tmp_path: Path, name: str) -> None:
    spoil, code, message = SPOILED[name]
    plan = tmp_path / "model.plan"
    shutil.copy(tiny_plan, plan)
    shutil.copy(side_car(tiny_plan), side_car(plan))
    spoil(plan)
    for file in ("image.png", "mask.png"):
        Image.new("L", (64, 64), 255).save(tmp_path / file)
    arguments = [str(tmp_path / file) for file in ("model.plan", "image.png", "mask.png")]
    result = CliRunner().invoke(run_command, [*arguments, "-o", str(tmp_path / "out.png")])
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out.png").exists()
    assert gpu.count("cudaMalloc") == 0


def test_devices_and_precision_that_do_not_fit(gpu: FakeCudart, tiny_plan: Path, tiny_onnx: Path) -> None:
    with pytest.raises(EnvironmentMismatch, match="NVIDIA GPUs only"):
        open_backend(tiny_plan, device="cpu")
    with pytest.raises(EnvironmentMismatch, match="cuda:1 was requested but there are 1 GPUs"):
        open_backend(tiny_plan, device="cuda:1")
    with pytest.raises(ValueError, match="is fp32, but fp16 was requested"):
        open_backend(tiny_plan, precision="fp16")
    with pytest.raises(ValueError, match="which openvino cannot run"):
        open_backend(tiny_plan, backend="openvino")
    with pytest.raises(ValueError, match="is not an engine: build one"):
        open_backend(tiny_onnx, backend="tensorrt")
    gpu.compute_capability = (7, 5)
    with pytest.raises(EnvironmentMismatch, match=r"compute capability 8.0 and later, this GPU has 7.5"):
        open_backend(tiny_plan)
    gpu.gpus = 0
    with pytest.raises(EnvironmentMismatch, match=r"needs an NVIDIA GPU.*no CUDA-capable device"):
        open_backend(tiny_plan)


def test_flavors_that_are_not_there(tiny_plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tmp_path / "model.plan"
    shutil.copy(tiny_plan, plan)
    shutil.copy(side_car(tiny_plan), side_car(plan))
    change_side_car(plan, flavor="tensorrt", version="10.3.0")
    monkeypatch.setitem(tensorrt_api.FLAVORS, "tensorrt", "no_such_module")
    with pytest.raises(EnvironmentMismatch, match=r"is for TensorRT 10.3.0. TensorRT is not installed"):
        open_backend(plan)
    monkeypatch.setitem(tensorrt_api.FLAVORS, "tensorrt", "fake_old_tensorrt")
    for version, fits in (("8.6.1", False), ("10.0.1", False), ("10.3.0", True), ("11.4.0.106", True), ("12.0", False)):
        monkeypatch.setitem(__import__("sys").modules, "fake_old_tensorrt", SimpleNamespace(__version__=version))
        if fits:
            assert tensorrt_api.load_flavor("tensorrt").major in (10, 11)
        else:
            with pytest.raises(EnvironmentMismatch, match=r"expected 10.3 to 11.x"):
                tensorrt_api.load_flavor("tensorrt")


def test_an_engine_with_plugin_needs_its_library(
    gpu: FakeCudart, tiny_plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MISF_PLUGIN", raising=False)
    plan = tmp_path / "model.plan"
    shutil.copy(tiny_plan, plan)
    shutil.copy(side_car(tiny_plan), side_car(plan))
    change_side_car(plan, flavor="tensorrt", version="10.3.0", plugin="libmisf_trt10.so", plugin_sha256="0" * 64)
    flavor = Flavor("tensorrt", SimpleNamespace(get_plugin_registry=lambda: None), "10.3.0")
    monkeypatch.setattr(backend_module, "load_flavor", lambda _name: flavor)
    with pytest.raises(EnvironmentMismatch, match=r"needs the plugin library libmisf_trt10.so.*misf-plugin build"):
        open_backend(plan)
    fields = {"misf": "1", "kind": "loadable", "tensorrt": "11.1", "cuda": "13000", "architectures": "87-real"}
    (tmp_path / "eleven.so").write_bytes(b"\x7fELF... misf-plugin " + json.dumps(fields).encode() + b"\0")
    monkeypatch.setenv("MISF_PLUGIN", str(tmp_path / "eleven.so"))
    with pytest.raises(EnvironmentMismatch, match=r"eleven.so is for TensorRT 11, this is TensorRT 10"):
        open_backend(plan)
    (tmp_path / "wrong.so").write_bytes(b"\x7fELF nothing of ours")
    monkeypatch.setenv("MISF_PLUGIN", str(tmp_path / "wrong.so"))
    with pytest.raises(MisfError, match="not a misf plugin library"):
        open_backend(plan)
    assert gpu.count("cudaMalloc") == 0


class OpContext(FakeContext):
    """The one-node model: features and taps in, output out, all of the type that fits their memory."""

    wrong_by = 0.0

    def execute_async_v3(self, stream_handle: int) -> bool:
        shapes = {**self._shapes, "output": self._shapes["features"]}

        def work() -> None:
            features, taps, output = (self._array(name, shapes[name]) for name in ("features", "taps", "output"))
            output[...] = doctor.expected_output(features, taps) + self.wrong_by

        self._cudart.enqueue(work, stream_handle)
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> Any:
        _, buffer = self._cudart.live[self._addresses[name]]
        half = len(buffer) == 2 * int(np.prod(shape))
        return np.frombuffer(buffer, np.float16 if half else np.float32).reshape(shape)


@pytest.mark.parametrize("wrong_by", [0.0, 0.02])
@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt-rtx"])
def test_doctor_runs_the_filter_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch, wrong_by: float, flavor: str) -> None:
    """Really built by TensorRT for RTX, run on the fake GPU; wrong numbers are a failure, in fp32 and fp16."""
    trt = pytest.importorskip("tensorrt_rtx")
    library = FakeCudart()
    monkeypatch.setattr(library, "holds", lambda _address, _size: True)  # memory that is not pinned will do here
    context = OpContext(FakeEngine(library, None))
    context.wrong_by = wrong_by
    said = {"Name": "filter", "LayerType": "PluginV3", "Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}
    inspector = SimpleNamespace(get_engine_information=lambda _: json.dumps({"Layers": [said]}))
    engine = SimpleNamespace(create_execution_context=lambda *_: context, create_engine_inspector=lambda: inspector)
    monkeypatch.setattr(trt, "Runtime", lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _plan: engine))
    monkeypatch.setattr(engine_checks, "_cuda", lambda: cudart.CudaRuntime(library))
    monkeypatch.setattr(engine_checks, "FLAVORS", [flavor])
    monkeypatch.setattr(engine_checks, "installed", lambda _: True)
    monkeypatch.setattr(engine_checks, "load_flavor", lambda _: Flavor(flavor, trt, "10.13"))
    monkeypatch.setattr(engine_checks, "_plugin", lambda _: None)
    checks = engine_checks.engine_checks(doctor.OP_CHECK, *doctor.op_inputs(), doctor.expected_output)
    assert [check.precision for check in checks] == ["fp32", "fp16"]
    for check in checks:
        assert check.built
        assert check.ok == (wrong_by == 0)
        formats = " (N/A due to dynamic shapes)" if flavor == "tensorrt" else ""
        expected = f"ok, without plugin{formats}," if check.ok else "FAILED: wrong numbers: error"
        assert f"{check.precision} {expected}" in check.line()
    assert not library.live


def test_doctor_looks_into_plugin_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISF_HOME", str(tmp_path))
    assert engine_checks.plugin_checks() == []
    file = tmp_path / "plugins" / "libmisf_trt10.so"
    file.parent.mkdir()
    fields = {"misf": "1", "kind": "loadable", "tensorrt": "10.3", "cuda": "12060", "architectures": "87-real"}
    file.write_bytes(b"\x7fELF... misf-plugin " + json.dumps(fields).encode() + b"\0")
    (check,) = engine_checks.plugin_checks()
    assert check.about == "TensorRT 10.3, CUDA 12.6, loadable, 87-real"
    assert check.problem  # no library that the loader takes
    (check,) = engine_checks.plugin_checks(load=lambda _: SimpleNamespace(getCreators=None))
    assert check.problem is None
    file.write_bytes(b"nonsense")
    (check,) = engine_checks.plugin_checks()
    assert "is not a misf plugin library" in (check.problem or "")


def test_the_fake_has_the_interface_of_the_real_thing(tiny_plan: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    own = {"does_not_tell", "compiled"}
    for fake, real in (
        (FakeContext, trt.IExecutionContext),
        (FakeEngine, trt.ICudaEngine),
        (RtxEngine, trt.ICudaEngine),
        (FakeRuntimeCache, trt.IRuntimeCache),
        (FakeRuntimeConfig, trt.IRuntimeConfig),
    ):
        names = [name for name in vars(fake) if not name.startswith("_") and name not in own]
        assert names
        assert [name for name in names if not hasattr(real, name)] == []
    assert hasattr(trt.IRuntimeConfig, "cuda_graph_strategy")
    assert "WHOLE_GRAPH_CAPTURE" in trt.CudaGraphStrategy.__members__
    assert "USER_MANAGED" in trt.ExecutionContextAllocationStrategy.__members__
    logger = tensorrt_api.logger_of(Flavor("tensorrt-rtx", trt, trt.__version__))
    with tiny_plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        runtime = trt.Runtime(logger)
        logger.errors.clear()
        if runtime.deserialize_cuda_engine(plan) is None:
            assert logger.errors  # the real library talks to our logger
            assert "magic" not in "".join(logger.errors)  # it is the driver that is missing, not a plan
        logger.errors.clear()
        assert runtime.deserialize_cuda_engine(b"no plan") is None
        assert logger.errors


def test_every_cuda_function_is_in_libcudart() -> None:
    """The real library, without a GPU: all symbols are there, and a missing driver is an exception of ours."""
    pytest.importorskip("nvidia")
    runtime = cudart.CudaRuntime()
    assert runtime.version() >= (12, 0)
    try:
        assert runtime.device_count() >= 0
    except cudart.CudaError as error:
        assert error.code  # noqa: PT017 - whether it is raised depends on the machine
        assert "cudaGetDeviceCount" in str(error)  # noqa: PT017


@pytest.mark.parametrize("mapped", [(), (12,), (13,), (12, 13)], ids=str)
def test_libcudart_that_the_driver_is_too_old_for(mapped: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver for CUDA 12: libcudart 13 answers 35, so 12 is taken, wherever it is; without a 12 the error tells."""
    installed = {13}

    def load(name: str, mode: int = 0) -> Any:
        major = int(name.rpartition(".")[2])
        if major not in mapped if mode == os.RTLD_NOLOAD else major not in {*installed, *mapped}:
            raise OSError(name)
        library = FakeCudart()
        library.major = major
        library.cudaGetDeviceCount = lambda _out: 35 if major == 13 else 0
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert cudart.find_cudart().major == (12 if 12 in mapped else 13)
    installed.add(12)
    assert cudart.find_cudart().major == 12


def test_a_libcudart_that_is_mapped_already_comes_first() -> None:
    """The real loader: what another library brought into this process, from a place that nobody searches."""
    pytest.importorskip("nvidia")
    code = """
from misf.runtime.engines import cudart
cudart.find_cudart()
cudart._candidates = lambda: []
cudart.CudaRuntime()
"""
    clean = [sys.executable, "-c", code]
    for command, expected in ((clean, 0), ([part.replace("cudart.find_cudart()", "") for part in clean], 1)):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == expected, result.stderr
    assert "libcudart was not found" in result.stderr


def _headers() -> list[Path]:
    places = [Path("/usr/local/cuda/include")]
    places += [Path(entry) / "nvidia" / "cu13" / "include" for entry in sys.path]
    return [place / "cuda_runtime_api.h" for place in places if (place / "cuda_runtime_api.h").is_file()]


def test_signatures_are_those_of_cuda_runtime_api_h() -> None:
    headers = _headers()
    if not headers:
        pytest.skip("no cuda_runtime_api.h: install nvidia-cuda-runtime")
    text = headers[0].read_text()
    kinds = {ctypes.c_int: "int", ctypes.c_uint: "unsigned int", ctypes.c_uint64: "64 bits", ctypes.c_size_t: "64 bits"}
    for name, arguments in cudart.SIGNATURES.items():
        found = re.search(rf"CUDARTAPI {name}\(([^;]*?)\);", text)
        assert found, name
        parts = [re.sub(r"__dv\(.*?\)", "", part).strip() for part in found[1].split(",")]
        declared = [] if parts == ["void"] else [_kind(part) for part in parts]
        assert declared == [kinds.get(argument, "pointer") for argument in arguments], name


def _kind(parameter: str) -> str:
    handles = ("cudaStream_t", "cudaEvent_t", "cudaGraph_t", "cudaGraphExec_t")
    if "*" in parameter or parameter.startswith(handles):
        return "pointer"
    kind = parameter.rpartition(" ")[0]
    return {"size_t": "64 bits", "unsigned long long": "64 bits"}.get(kind, "int" if kind.startswith("enum") else kind)
