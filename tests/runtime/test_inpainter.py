"""The Inpainter and its backends, with models small enough to predict their fill with NumPy."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import logging
import os
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image, ImageCms, ImageOps
from skimage import data

from misf.plugins.shared.errors import EnvironmentMismatch, MisfError
from misf.plugins.shared.extras import is_installed
from misf.runtime import Inpainter, inpainter, memory
from misf.runtime.backends import onnx_runtime, open_backend
from misf.runtime.backends.contract import BACKENDS
from misf.runtime.pictures.canvas import ArrayCanvas, PillowCanvas, Pixels
from misf.runtime.pictures.geometry import Box, Size

from ..support.tiny_models import constant_fill, foreign, mean_fill


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mean_fill(tmp_path_factory.mktemp("model") / "mean.onnx")


@pytest.fixture(scope="module")
def inpaint(model: Path) -> Inpainter:
    return Inpainter(model, backend="onnxruntime", device="cpu")


def _mask(shape: Size, *boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    for top, left, height, width in boxes:
        mask[top : top + height, left : left + width] = 255
    return mask


def _mean(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the mean colour of the known pixels: what the tiny model predicts."""
    return np.rint(image[mask <= 127].reshape(-1, 3).mean(axis=0, dtype=np.float64))


@pytest.mark.parametrize("shape", [(257, 391), (5, 7), (2, 1), (511, 509)])
def test_a_small_picture_runs_whole_and_known_pixels_stay(
    inpaint: Inpainter, shape: Size, rng: np.random.Generator
) -> None:
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    mask = _mask(shape, (0, 0, shape[0] // 2, (shape[1] + 1) // 2))
    given = image.copy()
    result = inpaint(image, mask)
    np.testing.assert_array_equal(image, given)
    assert (result.dtype, result.shape) == (np.uint8, image.shape)
    np.testing.assert_array_equal(result[mask == 0], image[mask == 0])
    assert np.abs(result[mask > 0] - _mean(image, mask)).max() <= 1


def test_three_holes_in_a_photograph_each_see_their_own_surroundings(inpaint: Inpainter) -> None:
    image = np.asarray(Image.fromarray(data.astronaut()).resize((1600, 2000)))
    holes = [(60, 80, 90, 100), (1000, 700, 30, 200), (1900, 1500, 100, 100)]
    canvas = ArrayCanvas(image.copy())
    report = inpaint.fill(canvas, _mask((2000, 1600), *holes) > 0)
    assert (report.strategy, report.crops, report.hole_pixels) == ("crop", 3, 25000)
    mask = _mask((2000, 1600), *holes)
    np.testing.assert_array_equal(canvas.array[mask == 0], image[mask == 0])
    for corner, hole in zip([(0, 0), (759, 544), (1488, 1088)], holes, strict=True):
        window = (slice(corner[0], corner[0] + 512), slice(corner[1], corner[1] + 512))
        fill = canvas.array[hole[0] : hole[0] + hole[2], hole[1] : hole[1] + hole[3]].reshape(-1, 3)
        assert np.ptp(fill, axis=0).max() == 0
        assert np.abs(fill[0] - _mean(image[window], mask[window])).max() <= 1


def test_a_large_hole_is_filled_without_a_trace_of_what_was_there(model: Path) -> None:
    image = np.full((1500, 1800, 3), (90, 120, 150), np.uint8)
    mask = _mask((1500, 1800), (300, 333, 901, 1001))
    image[mask > 0] = (255, 0, 255)
    for strategy in ("auto", "resize"):
        result = Inpainter(model, backend="onnxruntime", strategy=strategy)(image, mask)
        assert np.all(result == (90, 120, 150)), strategy


def test_a_long_hole_is_walked_and_later_pieces_see_earlier_fills(inpaint: Inpainter) -> None:
    image = np.full((600, 3000, 3), 200, np.uint8)
    mask = _mask((600, 3000), (290, 0, 16, 3000))
    image[mask > 0] = 0
    assert np.all(inpaint(image, mask) == 200)


def test_the_cost_of_a_small_hole_does_not_depend_on_the_photograph(inpaint: Inpainter) -> None:
    class Counting(ArrayCanvas):
        touched = 0

        def read(self, box: Box, size: Size) -> Pixels:
            self.touched += box.size[0] * box.size[1]
            return super().read(box, size)

        def paste(self, box: Box, fill: Pixels, hole: np.ndarray, weights: np.ndarray | None = None) -> None:
            self.touched += box.size[0] * box.size[1]
            super().paste(box, fill, hole, weights)

    touched = []
    for shape in ((1000, 1000), (4000, 6000)):
        canvas = Counting(np.zeros((*shape, 3), np.uint8))
        report = inpaint.fill(canvas, _mask(shape, (500, 480, 40, 60)) > 0)
        assert report.crops == 1
        touched.append(canvas.touched)
    assert touched[0] == touched[1] <= 512 * 512 + 48 * 72


def test_original_strategy_sees_all_of_a_large_picture(model: Path, rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (700, 900, 3), dtype=np.uint8)
    image[:, 600:] //= 4
    mask = _mask((700, 900), (10, 10, 50, 50))
    result = Inpainter(model, backend="onnxruntime", strategy="original")(image, mask)
    assert np.abs(result[mask > 0] - _mean(image, mask)).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_pillow_pictures_come_back_in_their_mode(inpaint: Inpainter, mode: str, rng: np.random.Generator) -> None:
    base = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    image = Image.fromarray(rng.integers(0, 65536, (40, 50), dtype=np.uint16)) if mode == "I;16" else base.convert(mode)
    given = np.array(image)
    mask = _mask((40, 50), (8, 9, 20, 11))
    result = inpaint(image, Image.fromarray(mask))
    assert (result.mode, result.size) == (mode, (50, 40))
    np.testing.assert_array_equal(np.array(image), given)
    np.testing.assert_array_equal(np.array(result)[mask == 0], given[mask == 0])
    assert len(np.unique(np.array(result)[mask > 0].reshape(220, -1), axis=0)) == 1


def test_a_pillow_result_says_what_the_picture_said_less_its_previews(inpaint: Inpainter) -> None:
    image = Image.fromarray(np.full((32, 48, 3), 90, np.uint8))
    buffer = io.BytesIO()
    image.resize((12, 8)).save(buffer, "JPEG")
    preview = buffer.getvalue()
    second = struct.pack("<HHHIIHHIII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, len(preview), 0) + preview
    exif = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHHI", 0x0112, 3, 1, 1, 0, 26) + second
    packet = b"<x><a:image>" + base64.b64encode(preview) + b"</a:image>kept</x>"
    image.info = {"exif": b"Exif\0\0" + exif, "xmp": packet, "comment": b"kept" + preview, "dpi": (300, 300)}
    image.info |= {"photoshop": {1036: preview, 1028: b"kept"}, "Raw profile type exif": exif.hex(), "Title": "kept"}
    hole = np.zeros((32, 48), np.bool_)
    hole[8:16, 8:16] = True
    result = inpaint(image, hole)
    assert result.info == {
        "exif": b"Exif\0\0" + exif[:22] + bytes(4),
        "xmp": b"<x><a:image></a:image>kept</x>",
        "comment": b"kept" + bytes(len(preview)),
        "dpi": (300, 300),
        "photoshop": {1028: b"kept"},
        "Title": "kept",
    }
    assert image.info["exif"] == b"Exif\0\0" + exif  # the caller's picture stays as it was


def test_sixteen_bit_arrays_are_filled_with_sixteen_bits(inpaint: Inpainter, rng: np.random.Generator) -> None:
    image = rng.integers(0, 65536, (30, 30, 3), dtype=np.uint16)
    mask = _mask((30, 30), (5, 5, 9, 9))
    result = inpaint(image, mask > 0)
    assert result.dtype == np.uint16
    assert np.abs(result[mask > 0] - _mean(image, mask)).max() <= 1
    np.testing.assert_array_equal(result[mask == 0], image[mask == 0])


def test_empty_and_full_masks_are_told_and_work(
    inpaint: Inpainter, caplog: pytest.LogCaptureFixture, rng: np.random.Generator
) -> None:
    image = rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)
    with caplog.at_level(logging.WARNING, "misf"):
        np.testing.assert_array_equal(inpaint(image, np.zeros((50, 60), np.uint8)), image)
        assert "the mask is empty" in caplog.text
        assert np.all(inpaint(image, np.full((50, 60), 255, np.uint8)) == 0)  # no known pixel: a mean of nothing
        assert "covers the whole picture" in caplog.text


def test_wrong_arguments_are_told(inpaint: Inpainter, model: Path) -> None:
    image = np.zeros((8, 9, 3), np.uint8)
    for bad_image, bad_mask, message in (
        (image, np.zeros((9, 8), np.uint8), r"the mask is 8x9 and the picture 9x8"),
        (image, np.zeros((8, 9), np.float32), "expected a mask of shape H,W and uint8"),
        (image, np.eye(8, 9, dtype=np.uint8), "the mask holds only 0 and 1, .* pass bool, or 0 and 255"),
        (image / 255, np.zeros((8, 9), np.uint8), "expected a uint8 or uint16 picture, got an array of float64"),
        (Image.new("F", (9, 8)), np.zeros((8, 9), np.uint8), "Pillow's mode F are not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            inpaint(bad_image, bad_mask)
    for name, value in (("strategy", "tile"), ("working_size", 3), ("backend", "x"), ("device", "gpu")):
        with pytest.raises(ValueError, match=r"unknown|too small"):
            Inpainter(model, **{name: value})  # type: ignore[arg-type]


class FakeBackend:
    """A backend that does what a test tells it to."""

    name, device, precision, multiple = "fake", "cpu", "fp32", 1
    config: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, answer: Any, multiple: int = 1):
        self.answer, self.multiple = answer, multiple

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer(image, mask)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"),
    ],
    ids=["python", "onnxruntime", "c++", "cuda"],
)
def test_out_of_memory_is_one_line_of_advice(inpaint: Inpainter, error: Exception, monkeypatch: Any) -> None:
    monkeypatch.setattr(inpaint, "backend", FakeBackend(error))
    with pytest.raises(MisfError, match=r"^out of memory at 30x20 pixels on cpu: use the strategy crop"):
        inpaint(np.zeros((20, 30, 3), np.uint8), _mask((20, 30), (1, 1, 2, 2)))


def test_what_cannot_fit_is_refused_before_the_system_kills_us(inpaint: Inpainter, monkeypatch: Any) -> None:
    backend = FakeBackend(lambda image, _mask: image)
    backend.config = {"width": 64, "prediction_width": 32}
    monkeypatch.setattr(inpaint, "backend", backend)
    image, mask = np.zeros((20, 30, 3), np.uint8), _mask((20, 30), (1, 1, 2, 2))
    needed = 20 * 30 * 64 * 6 * 4
    monkeypatch.setattr(inpainter, "available_bytes", lambda: needed)
    inpaint(image, mask)
    monkeypatch.setattr(inpainter, "available_bytes", lambda: needed - 1)
    with pytest.raises(MisfError, match=r"^30x20 pixels at once need at least 0 GB of memory and 0 GB are free: use"):
        inpaint(image, mask)
    backend.device = "cuda:0"
    inpaint(image, mask)


def test_memory_is_what_linux_says_within_the_limit_of_the_container(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = memory.available_bytes()
    assert free is None or installed / 1000 < free <= installed  # in bytes, not in the kernel's kB
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(Path, "read_text", _without_meminfo(Path.read_text))
    versions = (
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    )
    for limit, used, counters, prefix in versions:
        (tmp_path / used).write_text("3000\n")
        # Files in the cache are given back under pressure; shared memory, which is in "file" too, is not.
        (tmp_path / counters).write_text(f"file 400\n{prefix}active_file 70\n{prefix}inactive_file 30\n")
        for text, left in (("4096\n", 1196), ("2000\n", 0), ("max\n", None)):
            (tmp_path / limit).write_text(text)
            assert memory.available_bytes() == left, (limit, text)
        (tmp_path / limit).unlink()


def test_threads_are_as_many_as_the_container_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_onnx: Path
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))
    assert memory.quota_cores() is None
    (tmp_path / "cpu").mkdir()
    for quota, cores in ((-1, None), (150_000, 2), (6_400_000, None)):
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
        assert memory.quota_cores() == cores
    for text, cores in (("max 100000\n", None), ("50000 100000\n", 1), ("300000 100000\n", 3)):
        (tmp_path / "cpu.max").write_text(text)
        assert memory.quota_cores() == cores
    assert memory.usable_cores() == 3
    session = open_backend(tiny_onnx, "onnxruntime", "cpu")._session  # type: ignore[attr-defined]
    assert session.get_session_options().intra_op_num_threads == 3


def _without_meminfo(read: Any) -> Any:
    def read_text(path: Path, *arguments: Any, **settings: Any) -> Any:
        if path == Path("/proc/meminfo"):
            raise FileNotFoundError(path)
        return read(path, *arguments, **settings)

    return read_text


def test_a_backend_that_fails_or_answers_nonsense_is_told(inpaint: Inpainter, monkeypatch: Any, tmp_path: Path) -> None:
    picture, mask = np.zeros((20, 30, 3), np.uint8), _mask((20, 30), (1, 1, 2, 2))
    for answer, message in (
        (RuntimeError("shape\nmismatch"), "fake failed at 30x20: shape mismatch"),
        (lambda image, _mask: image[..., 1:], r"returned the shape \(1, 3, 20, 29\)"),
        (lambda image, _mask: image * np.inf, "returned NaN or infinity at 30x20 in fp32"),
    ):
        monkeypatch.setattr(inpaint, "backend", FakeBackend(answer))
        with pytest.raises(MisfError, match=message), np.errstate(invalid="ignore"):
            inpaint(picture, mask)
    broken = Inpainter(constant_fill(tmp_path / "nan.onnx", float("nan")), backend="onnxruntime")
    with pytest.raises(MisfError, match="returned NaN or infinity"):
        broken(picture, mask)


def test_sides_are_padded_to_what_the_backend_needs(
    inpaint: Inpainter, monkeypatch: Any, rng: np.random.Generator
) -> None:
    seen = []

    def answer(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        seen.append((image.shape, mask.shape, image.dtype, mask.dtype, image.flags["C_CONTIGUOUS"]))
        return image * 0 + np.float32(0.5)

    monkeypatch.setattr(inpaint, "backend", FakeBackend(answer, multiple=8))
    image = rng.integers(0, 256, (5, 17, 3), dtype=np.uint8)
    mask = _mask((5, 17), (1, 2, 2, 3))
    result = inpaint(image, mask)
    assert seen == [((1, 3, 8, 24), (1, 1, 8, 24), np.float32, np.float32, True)]
    assert np.all(result[mask > 0] == 128)
    np.testing.assert_array_equal(result[mask == 0], image[mask == 0])


# Backends


def test_onnx_runtime_reads_the_files_metadata(model: Path, rng: np.random.Generator) -> None:
    backend = open_backend(model, "onnxruntime")
    assert (backend.name, backend.device, backend.precision, backend.multiple) == ("onnxruntime", "cpu", "fp32", 1)
    assert backend.config == {"width": 4}
    image = rng.random((2, 3, 9, 12), dtype=np.float32)
    mask = (rng.random((2, 1, 9, 12)) < 0.4).astype(np.float32)
    known = 1 - mask
    mean = (image * known).sum((2, 3), keepdims=True) / known.sum((2, 3), keepdims=True)
    np.testing.assert_allclose(backend(image, mask), np.where(mask > 0.5, mean, image), atol=1e-6)
    with pytest.raises(ValueError, match="is fp32, but fp16 was requested"):
        open_backend(model, "onnxruntime", precision="fp16")


def test_openvino_agrees_with_onnx_runtime_at_any_size(model: Path, monkeypatch: Any, rng: np.random.Generator) -> None:
    open_vino = pytest.importorskip("misf.runtime.backends.open_vino")
    monkeypatch.setattr(open_vino, "LARGE", 300)  # so that both ways of compiling run
    backend, referee = open_backend(model, "openvino", precision="fp32", threads=1), open_backend(model, "onnxruntime")
    assert (backend.name, backend.device, backend.precision) == ("openvino", "cpu", "fp32")
    assert backend.config == referee.config
    for shape in ((1, 9, 12), (2, 5, 7), (1, 40, 31), (2, 40, 31), (1, 1, 1)):
        image = rng.random((shape[0], 3, *shape[1:]), dtype=np.float32)
        mask = (rng.random((shape[0], 1, *shape[1:])) < 0.4).astype(np.float32)
        np.testing.assert_allclose(backend(image, mask), referee(image, mask), atol=1e-5)
    with pytest.raises(EnvironmentMismatch, match="cuda:0 was requested but OpenVINO runs on CPUs"):
        open_backend(model, "openvino", "cuda")
    assert open_vino._precision("auto", ["FP32", "BF16"]) == "bf16"
    assert open_vino._precision("auto", ["FP32"]) == "fp32"
    with pytest.raises(EnvironmentMismatch, match="this processor does not compute in it"):
        open_vino._precision("bf16", ["FP32"])


def test_torch_tensors_are_read_where_they_lie(model: Path, monkeypatch: Any) -> None:
    """ONNX Runtime's bindings, really used, on the CPU's memory: tensors on a GPU go the same way."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: None))
    backend: Any = open_backend(model, "onnxruntime", "cpu")
    image, mask = torch.rand(2, 3, 40, 48), (torch.rand(2, 1, 40, 48) > 0.7).float()
    expected = backend(image.numpy(), mask.numpy())
    monkeypatch.setattr(torch.Tensor, "__cuda_array_interface__", {})
    result = backend(image, mask)
    assert isinstance(result, torch.Tensor)
    np.testing.assert_array_equal(result.numpy(), expected)
    for wrong in (mask.double(), mask.transpose(2, 3), mask.numpy()):
        with pytest.raises(ValueError, match="mask must be a contiguous float32 torch tensor on cpu, got "):
            backend(image, wrong)
    backend.device = "cuda:1"
    with pytest.raises(ValueError, match=r"torch tensor on cuda:1, got torch.float32 on cpu"):
        backend(image, mask)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_threads_that_share_an_inpainter_get_their_own_results(
    model: Path, backend: str, monkeypatch: Any, rng: np.random.Generator
) -> None:
    if backend == "openvino":
        monkeypatch.setattr(pytest.importorskip("misf.runtime.backends.open_vino"), "LARGE", 500 * 500)
    inpaint = Inpainter(model, backend=backend, precision="fp32", strategy="original", threads=1)
    shapes = [(500, 510), (510, 500), (400, 400), (400, 400)]  # two above LARGE, two that share the model for any size
    pictures = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    masks = [_mask(shape, (20, 10 + 9 * number, 30, 20)) for number, shape in enumerate(shapes)]
    expected = [inpaint(*pair) for pair in zip(pictures, masks, strict=True)]
    start = threading.Barrier(len(shapes))

    def work(number: int) -> list[np.ndarray]:
        start.wait()
        return [inpaint(pictures[number], masks[number]) for _ in range(10)]

    with ThreadPoolExecutor(len(shapes)) as pool:
        for number, results in enumerate(pool.map(work, range(len(shapes)))):
            for result in results:
                np.testing.assert_array_equal(result, expected[number], err_msg=f"picture {number}")


def test_all_backends_agree_on_a_real_network(tiny_checkpoint: Path, tiny_onnx: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("openvino")
    referee = open_backend(tiny_checkpoint, device="cpu")
    others = [open_backend(tiny_onnx, name, precision="fp32") for name in ("onnxruntime", "openvino")]
    for height, width in ((5, 7), (61, 94)):
        image = rng.random((1, 3, height, width), dtype=np.float32)
        mask = (rng.random((1, 1, height, width)) < 0.3).astype(np.float32)
        for backend in others:
            np.testing.assert_allclose(backend(image, mask), referee(image, mask), atol=1e-4, err_msg=backend.name)
            assert {**backend.config, "residual_dilations": None} == {**referee.config, "residual_dilations": None}


def test_a_checkpoint_runs_on_pytorch(tmp_path: Path, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    from misf.training import NetworkConfig
    from misf.training.model.checkpoint import load_model, save_checkpoint
    from misf.training.model.network import InpaintingNetwork

    torch.manual_seed(0)
    config = NetworkConfig(width=4, prediction_width=4, prediction_convs=1, residual_dilations=(2,))
    save_checkpoint(tmp_path / "tiny.safetensors", config, InpaintingNetwork(config).state_dict())
    inpaint = Inpainter(tmp_path / "tiny.safetensors", device="cpu")
    assert (inpaint.backend.name, inpaint.backend.precision) == ("pytorch", "fp32")
    assert inpaint.backend.config["width"] == 4
    for shape in ((5, 7), (37, 50)):
        image, mask = rng.integers(0, 256, (*shape, 3), dtype=np.uint8), _mask(shape, (1, 2, 3, 4))
        result = inpaint(image, mask)
        with torch.inference_mode():
            prediction = load_model(tmp_path / "tiny.safetensors")(
                torch.from_numpy(image).permute(2, 0, 1)[None] / 255, torch.from_numpy(mask > 0)[None, None].float()
            )
        expected = np.rint(prediction[0].permute(1, 2, 0).numpy() * 255)
        assert np.abs(result[mask > 0] - expected[mask > 0]).max() <= 1
        np.testing.assert_array_equal(result[mask == 0], image[mask == 0])
    with pytest.raises(ValueError, match="is a checkpoint, which onnxruntime cannot run"):
        Inpainter(tmp_path / "tiny.safetensors", backend="onnxruntime")


def test_auto_takes_what_is_installed_and_says_so(
    model: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("openvino", "torch") else find(name, *rest)
    )
    with caplog.at_level(logging.INFO, "misf"):
        assert open_backend(model).name == "onnxruntime"
    assert "mean.onnx runs on onnxruntime, cpu, fp32" in caplog.text
    with pytest.raises(EnvironmentMismatch, match=r"needs openvino, .* not installed: pip install .*\[openvino\]'"):
        open_backend(model, "openvino")
    checkpoint = model.with_name("best.safetensors")
    checkpoint.write_bytes(b"x")
    with pytest.raises(EnvironmentMismatch, match=r"needs torch, which is not installed: pip install .*\[export\]'"):
        open_backend(checkpoint)


@pytest.mark.parametrize(("config", "name"), [({"detail": 16}, "onnxruntime"), ({}, "openvino")])
def test_auto_takes_onnx_runtime_for_networks_like_misf_small(
    config: dict[str, int], name: str, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    path = mean_fill(tmp_path / "x.onnx", metadata={"misf.config": json.dumps(config), "misf.precision": "fp32"})
    assert open_backend(path, device="cpu").name == name


def test_without_onnx_runtime_the_error_names_both_extras(model: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # importing it now fails
    monkeypatch.delitem(sys.modules, onnx_runtime.__name__)
    absent, find = {"onnxruntime"}, importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    assert open_backend(model).name == "openvino"
    absent.add("openvino")
    needs = r"mean.onnx needs onnxruntime, .* pip install .*\[cpu\]', or the extra gpu for"
    with pytest.raises(EnvironmentMismatch, match=needs):
        open_backend(model)
    with pytest.raises(EnvironmentMismatch, match=needs):
        open_backend(model, "onnxruntime", "cuda")


def test_a_module_that_left_an_empty_folder_is_not_installed(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "left_behind" / "capi").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("left_behind")
    (tmp_path / "left_behind" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert is_installed("left_behind")


def test_a_precision_that_one_backend_has_decides_what_auto_takes(
    model: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    open_vino = pytest.importorskip("misf.runtime.backends.open_vino")
    half = {"misf.config": "{}", "misf.precision": "fp16"}
    opened = open_backend(mean_fill(tmp_path / "half.onnx", metadata=half), precision="fp16")
    assert (opened.name, opened.precision) == ("onnxruntime", "fp16")
    with pytest.raises(ValueError, match=r"is fp32, but fp16 was requested: .* so export it with --precision fp16"):
        open_backend(model, precision="fp16")
    with pytest.raises(ValueError, match=r"is fp32, but bf16 was requested: .* so use precision auto, or OpenVINO"):
        open_backend(model, "onnxruntime", precision="bf16")
    choose = open_vino._precision
    monkeypatch.setattr(open_vino, "_precision", lambda asked, _found: choose(asked, ["FP32"]))
    with pytest.raises(EnvironmentMismatch, match="bf16 was requested but this processor does not compute in it"):
        open_backend(model, precision="bf16")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else find(name, *rest)
    )
    with pytest.raises(EnvironmentMismatch, match="precision bf16 needs openvino, which is not installed"):
        open_backend(model, precision="bf16")


def test_onnx_runtime_prints_nothing_when_a_provider_fails(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="damaged one"):  # and no session on another provider either
        onnx_runtime._session(model, [(onnx_runtime.CPU, "no options")], None)
    assert capfd.readouterr().out == ""


def test_a_gpu_that_is_asked_for_and_absent_is_an_error(model: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(onnx_runtime.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EnvironmentMismatch, match="device cuda:1 was requested but this ONNX Runtime has no CUDA"):
        open_backend(model, device="cuda:1")
    monkeypatch.setenv("MISF_DEVICE", "cuda")
    with pytest.raises(EnvironmentMismatch, match="device cuda:0 was requested"):
        open_backend(model)
    assert open_backend(model, device="cpu").device == "cpu"  # what is asked for wins over the environment


def test_a_cuda_provider_that_does_not_start_is_an_error_only_if_asked_for(
    model: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def on_the_cpu(path: Path, _providers: Any, threads: int | None, session: Any = onnx_runtime._session) -> Any:
        return session(path, [onnx_runtime.CPU], threads)

    monkeypatch.setattr(onnx_runtime, "has_cuda", lambda: True)
    monkeypatch.setattr(onnx_runtime.onnxruntime, "preload_dlls", lambda: None)
    # What ONNX Runtime does without a driver: it says nothing that we could catch, and the session is on the CPU.
    monkeypatch.setattr(onnx_runtime, "_session", on_the_cpu)
    with pytest.raises(EnvironmentMismatch, match="device cuda:0 was requested but is not usable"):
        open_backend(model, device="cuda")
    with caplog.at_level(logging.WARNING, "misf"):
        assert open_backend(model).device == "cpu"
    assert "cannot start its CUDA provider" in caplog.text


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_files_that_are_no_model_of_ours_are_told_in_one_line(model: Path, backend: str, tmp_path: Path) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    whole = model.read_bytes()
    cases = {
        "empty.onnx": (b"", "is empty: expected a model file"),
        "text.onnx": (b"this is no model" * 20, "is not an ONNX file, or a damaged one"),
        "cut.onnx": (whole[: len(whole) // 2], "is not an ONNX file, or a damaged one"),
        "engine.plan": (b"x", f"is a TensorRT engine, which {backend} cannot run: give the .onnx file"),
        "notes.txt": (b"x", "has no suffix of a model file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises((ValueError, MisfError), match=message) as caught:
            open_backend(tmp_path / name, backend)
        assert name in str(caught.value)
        assert len(str(caught.value)) < 500
    foreign(tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match=r"expected the inputs image .* found input \[N, 3, H, W\] and output"):
        open_backend(tmp_path / "foreign.onnx", backend)
    mean_fill(tmp_path / "bare.onnx", metadata={})
    with pytest.raises(ValueError, match=r"was not written by misf-export: it has no metadata misf\.config"):
        open_backend(tmp_path / "bare.onnx", backend)
    ours = {"misf.config": "{}", "misf.precision": "fp32"}
    for changed, message in (
        ({"misf.config": "[1]"}, r"damaged metadata misf\.config: expected a JSON object, found \[1\]"),
        ({"misf.config": "{"}, r"damaged metadata misf\.config: Expecting"),
        ({"misf.precision": "int8"}, r"has metadata misf\.precision 'int8': expected fp32 or fp16"),
    ):
        mean_fill(tmp_path / "changed.onnx", metadata=ours | changed)
        with pytest.raises(ValueError, match=message):
            open_backend(tmp_path / "changed.onnx", backend)
    fixed = onnx.load(model)
    for entry in fixed.graph.input:
        entry.type.tensor_type.shape.dim[2].dim_value = 512
    onnx.save(fixed, tmp_path / "fixed.onnx")
    with pytest.raises(ValueError, match="is of fixed size: expected dynamic N, H and W"):
        open_backend(tmp_path / "fixed.onnx", backend)
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "nowhere.onnx", "does not exist")):
        with pytest.raises(ValueError, match=message):
            open_backend(path, backend)


def test_every_backend_named_is_one_we_have() -> None:
    assert set(BACKENDS) == {"auto", "onnxruntime", "openvino", "pytorch", "tensorrt"}


def test_a_pillow_canvas_is_not_copied_for_a_crop() -> None:
    image = Image.new("RGB", (3000, 2000), (1, 2, 3))
    canvas = PillowCanvas(image)
    assert canvas.image is image
    canvas.paste(Box(10, 10, 12, 12), np.ones((2, 2, 3), np.float32), np.ones((2, 2), np.bool_))
    assert image.getpixel((11, 11)) == (255, 255, 255)
    assert image.getpixel((12, 12)) == (1, 2, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_api_turns_pictures_as_misf_run_does(orientation: int, tmp_path: Path) -> None:
    """The mask is for the picture as displayed, which Pillow decides here; the result is stored as the picture was."""
    shown = np.random.default_rng(orientation).integers(0, 200, (40, 60, 3), dtype=np.uint8)
    hole = np.zeros((40, 60), np.bool_)
    hole[5:12, 30:55] = True
    exif = Image.Exif()
    exif[0x112] = orientation
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how to store it, by Pillow's numbers of Transpose
    stored = Image.fromarray(shown)
    if orientation in turns:
        stored = stored.transpose(Image.Transpose(turns[orientation]))
    stored.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as opened:
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(opened)), shown)
        inpaint = Inpainter(mean_fill(tmp_path / "mean.onnx"))
        result = inpaint(opened, hole)
    assert result.size == stored.size
    file = inpaint.inpaint_file(tmp_path / "x.png", hole)
    with Image.open(io.BytesIO(file)) as written:
        assert written.getexif()[0x112] == orientation
        assert np.array_equal(np.asarray(written), np.asarray(result))
        displayed = np.asarray(ImageOps.exif_transpose(written))
    assert np.array_equal(displayed[~hole], shown[~hole])
    assert (displayed[hole] != shown[hole]).any(axis=1).all()


@pytest.mark.parametrize("decoded", [False, True], ids=["opened", "decoded"])
def test_a_tiff_is_turned_once_whether_it_is_decoded_already_or_not(decoded: bool, tmp_path: Path) -> None:
    """Pillow turns a TIFF while it decodes it, and forgets the orientation; it opens files without decoding them."""
    shown = np.random.default_rng(3).integers(0, 200, (40, 60, 3), dtype=np.uint8)
    hole = np.zeros((40, 60), np.uint8)
    hole[5:12, 30:55] = 255
    exif = Image.Exif()
    exif[0x112] = 6
    for name, pixels in (("image.tif", shown), ("mask.tif", hole)):
        stored = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
        stored.save(
            tmp_path / name, exif=exif, compression="tiff_lzw"
        )  # Pillow maps plain grey ones, and turns them wrong
    inpaint = Inpainter(mean_fill(tmp_path / "mean.onnx"))
    with Image.open(tmp_path / "image.tif") as image, Image.open(tmp_path / "mask.tif") as mask:
        if decoded:
            image.load()
            mask.load()
        result = np.asarray(inpaint(image, mask))
    assert np.array_equal(result[hole == 0], shown[hole == 0])
    assert (result[hole > 0] != shown[hole > 0]).any(axis=1).all()


def test_files_go_in_and_out_as_bytes(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 4), dtype=np.uint8))
    picture.save(
        tmp_path / "x.webp",
        lossless=True,
        exact=True,
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    )
    hole = np.zeros((40, 60), np.uint8)
    hole[3:9, 4:30] = 255
    Image.fromarray(hole).save(tmp_path / "mask.png")
    image, mask = (tmp_path / "x.webp").read_bytes(), (tmp_path / "mask.png").read_bytes()
    inpaint = Inpainter(mean_fill(tmp_path / "mean.onnx"))
    with Image.open(io.BytesIO(inpaint.inpaint_file(image, mask))) as filled, Image.open(tmp_path / "x.webp") as before:
        assert filled.format == "WEBP"
        assert filled.info["icc_profile"] == before.info["icc_profile"]
        known = hole == 0
        assert np.array_equal(np.asarray(filled)[known], np.asarray(before)[known])
        assert np.array_equal(np.asarray(filled)[..., 3], np.asarray(before)[..., 3])
    assert inpaint.inpaint_file(image, np.zeros((40, 60), np.bool_)) == image  # nothing to fill: the very bytes
    with pytest.raises(ValueError, match=r"upload 7 is not a picture we can read"):
        inpaint.inpaint_file(b"no picture", mask, name="upload 7")
    with pytest.raises(ValueError, match=r"the mask is not a picture we can read"):
        inpaint.inpaint_file(image, b"no picture")
