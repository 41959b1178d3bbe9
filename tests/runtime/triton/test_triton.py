"""A real Triton server answers as ONNX Runtime does; the repositories for servers that cannot run here are read by
Triton's own protobuf.

The server is that of nvidia-pytriton, which is from before NumPy 2, so it has an environment of its own:

    python3.11 -m venv triton && triton/bin/pip install nvidia-pytriton onnxruntime click pillow rich scipy
    MISF_TRITON_PYTHON=triton/bin/python python -m pytest tests/runtime/triton
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from misf.export.triton import write_repository
from misf.plugins.shared.errors import MisfError
from misf.plugins.shared.shipped import shipped_model
from misf.runtime import Inpainter, open_backend

ROOT = Path(__file__).parents[3]
SAMPLE, MASK = (ROOT / "runtime/samples" / name for name in ("astronaut.jpg", "masks/astronaut.png"))

text_format = pytest.importorskip("google.protobuf.text_format", reason="NOT PROVED: needs the extra triton")
http = pytest.importorskip("tritonclient.http")
grpc = pytest.importorskip("tritonclient.grpc")


def parsed(path: Path) -> Any:
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def test_repositories_are_what_tritons_protobuf_reads(tiny_onnx: Path, tmp_path: Path) -> None:
    write_repository(tmp_path / "r", tiny_onnx)
    network, picture = (parsed(tmp_path / "r" / name / "config.pbtxt") for name in ("misf", "misf_picture"))
    assert (network.backend, network.max_batch_size, network.default_model_filename) == ("onnxruntime", 8, "model.onnx")
    assert {entry.name: list(entry.dims) for entry in network.input} == {"image": [3, -1, -1], "mask": [1, -1, -1]}
    assert (tmp_path / "r/misf/1/model.onnx").read_bytes() == tiny_onnx.read_bytes()
    assert (picture.backend, picture.input[0].data_type) == ("python", 13)  # TYPE_STRING
    with pytest.raises(MisfError, match=r"does not run tiny\.onnx"):
        write_repository(tmp_path / "s", tiny_onnx, "tensorrt")


def test_an_engine_is_for_tensorrt_with_its_batch_and_cuda_graphs(tiny_plan: Path, tmp_path: Path) -> None:
    """The engine was built by TensorRT for RTX, which Triton does not run; its side-car is made to say otherwise."""
    with pytest.raises(MisfError, match="TensorRT for RTX, which Triton does not run"):
        write_repository(tmp_path / "r", tiny_plan)
    plan = tmp_path / "x.plan"
    shutil.copy(tiny_plan, plan)
    text = tiny_plan.with_name(f"{tiny_plan.name}.json").read_text()
    plan.with_name("x.plan.json").write_text(text.replace('"tensorrt-rtx"', '"tensorrt"'))
    write_repository(tmp_path / "r", plan)
    network = parsed(tmp_path / "r/misf/config.pbtxt")
    assert (network.backend, network.max_batch_size, network.optimization.cuda.graphs) == ("tensorrt", 2, True)
    assert (tmp_path / "r/misf/1/model.plan.json").is_file()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Addresses of a real server with the shipped network; skipped where there is none."""
    python = os.environ.get("MISF_TRITON_PYTHON")
    if not python:
        pytest.skip("NOT PROVED: no Triton server ran; see the top of this file for MISF_TRITON_PYTHON")
    folder = tmp_path_factory.mktemp("triton")
    write_repository(folder / "models", shipped_model("misf-small"), "python")
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    version = subprocess.check_output(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True
    ).strip()
    home = site / "pytriton/tritonserver"
    shutil.copytree(home / "backends/python", folder / "backends/python")
    shutil.copy(home / f"python_backend_stubs/{version}/triton_python_backend_stub", folder / "backends/python")
    (folder / "site/misf").mkdir(parents=True)
    for name in ("training", "export", "plugins", "runtime"):
        (folder / "site/misf" / name).symlink_to(ROOT / name)
    ports = {name: free_port() for name in ("http", "grpc", "metrics")}
    where = [
        f"--{name}-{what}={value}"
        for name, port in ports.items()
        for what, value in (("address", "127.0.0.1"), ("port", port))
    ]
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(
            [
                home / "bin/tritonserver",
                f"--model-repository={folder / 'models'}",
                f"--backend-directory={folder / 'backends'}",
                "--allow-gpu-metrics=false",
                "--disable-auto-complete-config",
                *where,
            ],
            env=os.environ
            | {
                "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
                "PYTHONPATH": f"{site}:{folder / 'site'}",
                "LD_LIBRARY_PATH": f"{site / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}",
            },
            stdout=log,
            stderr=log,
        )
    addresses = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    deadline = time.monotonic() + 120
    while not ready(addresses["http"]):
        assert running.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.2)
    yield addresses
    running.terminate()
    assert running.wait(60) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def case(height: int = 128, width: int = 192, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(seed).random((1, 3, height, width), np.float32)
    mask = np.zeros((1, 1, height, width), np.float32)
    mask[..., 30:70, 40:90] = 1
    return image, mask


def inputs(client: Any, **arrays: np.ndarray) -> list[Any]:
    from tritonclient.utils import np_to_triton_dtype

    found = []
    for name, array in arrays.items():
        found.append(client.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        found[-1].set_data_from_numpy(array)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("size", [(128, 192), (256, 256), (131, 93)])
def test_the_network_answers_exactly(server: dict[str, str], protocol: str, size: tuple[int, int]) -> None:
    client = {"http": http, "grpc": grpc}[protocol]
    image, mask = case(*size)
    with client.InferenceServerClient(server[protocol]) as connection:
        answer = connection.infer("misf", inputs(client, image=image, mask=mask)).as_numpy("output")
    np.testing.assert_array_equal(answer, open_backend("misf-small", "onnxruntime", "cpu")(image, mask))


@pytest.mark.slow
def test_shared_memory_in_and_out(server: dict[str, str]) -> None:
    from tritonclient.utils import shared_memory

    image, mask = case()
    data, result = image.nbytes + mask.nbytes, image.nbytes
    region = shared_memory.create_shared_memory_region("misf", "/misf_test", data + result)
    try:
        shared_memory.set_shared_memory_region(region, [image, mask])
        with grpc.InferenceServerClient(server["grpc"]) as connection:
            connection.register_system_shared_memory("misf", "/misf_test", data + result)
            named = [grpc.InferInput("image", image.shape, "FP32"), grpc.InferInput("mask", mask.shape, "FP32")]
            named[0].set_shared_memory("misf", image.nbytes)
            named[1].set_shared_memory("misf", mask.nbytes, image.nbytes)
            output = grpc.InferRequestedOutput("output")
            output.set_shared_memory("misf", result, data)
            connection.infer("misf", named, outputs=[output])
            connection.unregister_system_shared_memory("misf")
        answer = shared_memory.get_contents_as_numpy(region, np.float32, image.shape, offset=data).copy()
    finally:
        shared_memory.destroy_shared_memory_region(region)
    np.testing.assert_array_equal(answer, open_backend("misf-small", "onnxruntime", "cpu")(image, mask))


@pytest.mark.slow
def test_batches_form_and_every_answer_is_its_own(server: dict[str, str]) -> None:
    expected = open_backend("misf-small", "onnxruntime", "cpu")
    cases = [case(seed=seed) for seed in range(24)]

    def ask(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        with grpc.InferenceServerClient(server["grpc"]) as connection:
            answer: np.ndarray = connection.infer("misf", inputs(grpc, image=pair[0], mask=pair[1])).as_numpy("output")
            return answer

    before = counts(server)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, cases))
    after = counts(server)
    for pair, answer in zip(cases, answers, strict=True):
        np.testing.assert_allclose(answer, expected(*pair), atol=1e-6)  # a batch may sum in another order
    assert after["count"] - before["count"] == 24
    assert after["exec_count"] - before["exec_count"] < 24


def counts(server: dict[str, str]) -> dict[str, float]:
    """Return the metrics of the network, by the end of their names."""
    with urllib.request.urlopen(f"http://{server['metrics']}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    rows = [line.split() for line in lines if line.startswith("nv_inference_") and 'model="misf"' in line]
    return {name.split("{")[0].removeprefix("nv_inference_"): float(value) for name, value in rows}


@pytest.mark.slow
def test_pictures_go_in_and_out_as_files(server: dict[str, str]) -> None:
    image, mask = (np.array([path.read_bytes()], np.object_) for path in (SAMPLE, MASK))
    with http.InferenceServerClient(server["http"]) as connection:
        answer = connection.infer("misf_picture", inputs(http, image=image, mask=mask)).as_numpy("output")[0]
        with pytest.raises(Exception, match="not a picture we can read"):
            connection.infer("misf_picture", inputs(http, image=np.array([b"x"], np.object_), mask=mask))
    assert answer == Inpainter("misf-small", backend="onnxruntime", device="cpu").inpaint_file(SAMPLE, MASK)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_wrong_shapes_and_types_get_a_clear_error(server: dict[str, str], protocol: str) -> None:
    client = {"http": http, "grpc": grpc}[protocol]
    image, mask = case()
    wrong = [
        (image[:, :2], mask, r"expected \[-1,3,-1,-1\]|unexpected shape"),
        (image.astype(np.float64), mask, "FP64|data-type"),
        (image, mask[..., :64, :], "must agree in N, H and W"),
    ]
    with client.InferenceServerClient(server[protocol]) as connection:
        for first, second, words in wrong:
            with pytest.raises(Exception, match=words):
                connection.infer("misf", inputs(client, image=first, mask=second))
        assert connection.is_server_ready()
