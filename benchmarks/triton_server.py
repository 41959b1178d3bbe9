"""What a Triton server adds to the network's own time: HTTP, gRPC and shared memory, in turns with ONNX Runtime here.

    python benchmarks/triton_server.py --host 127.0.0.1 --http-port 8000 --grpc-port 8001 --onnx small.onnx

The server runs a repository of misf-export --triton with the same file. Every answer is compared with ONNX Runtime's.
"""

from __future__ import annotations

import argparse
import atexit
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import shared_memory

from misf.runtime import open_backend


def case(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a picture and a mask of side x side pixels as the network takes them."""
    image = np.random.default_rng(side).random((1, 3, side, side), np.float32)
    mask = np.zeros((1, 1, side, side), np.float32)
    mask[..., side // 4 : side // 2, side // 3 : side // 2] = 1
    return image, mask


def over(client: Any, connection: Any) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a call that sends tensors over HTTP or gRPC."""

    def ask(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        inputs = [
            client.InferInput(name, list(array.shape), "FP32") for name, array in (("image", image), ("mask", mask))
        ]
        for tensor, array in zip(inputs, (image, mask), strict=True):
            tensor.set_data_from_numpy(array)
        answer: np.ndarray = connection.infer("misf", inputs).as_numpy("output")
        return answer

    return ask


def through_memory(connection: Any, largest: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a call that hands tensors over in shared memory of this machine, asked by gRPC."""
    size = 7 * 4 * largest**2
    region = shared_memory.create_shared_memory_region("misf", "/misf_benchmark", size)
    atexit.register(shared_memory.destroy_shared_memory_region, region)
    connection.unregister_system_shared_memory("misf")
    connection.register_system_shared_memory("misf", "/misf_benchmark", size)

    def ask(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        shared_memory.set_shared_memory_region(region, [image, mask])
        inputs = [grpc.InferInput(name, array.shape, "FP32") for name, array in (("image", image), ("mask", mask))]
        inputs[0].set_shared_memory("misf", image.nbytes)
        inputs[1].set_shared_memory("misf", mask.nbytes, image.nbytes)
        output = grpc.InferRequestedOutput("output")
        output.set_shared_memory("misf", image.nbytes, image.nbytes + mask.nbytes)
        connection.infer("misf", inputs, outputs=[output])
        offset = image.nbytes + mask.nbytes
        answer: np.ndarray = shared_memory.get_contents_as_numpy(region, np.float32, image.shape, offset=offset)
        return answer

    return ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument(
        "--onnx", default="misf-small", help="the file, or the name, of the network that the server runs"
    )
    parser.add_argument("--side", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    direct = open_backend(options.onnx, "onnxruntime", "cpu")
    by_http = http.InferenceServerClient(f"{options.host}:{options.http_port}")
    by_grpc = grpc.InferenceServerClient(f"{options.host}:{options.grpc_port}")
    ways: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "ONNX Runtime in this process": direct,
        "HTTP": over(http, by_http),
        "gRPC": over(grpc, by_grpc),
        "gRPC, shared memory": through_memory(by_grpc, max(options.side)),
    }
    print("| | " + " | ".join(f"{side}x{side}: p50, p90 ms, largest difference" for side in options.side) + " |")
    print("| --- |" + " ---: |" * len(options.side))
    rows: dict[str, list[str]] = {name: [] for name in ways}
    for side in options.side:
        image, mask = case(side)
        expected = direct(image, mask)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        differences = {name: float(np.abs(ask(image, mask) - expected).max()) for name, ask in ways.items()}
        for _ in range(options.rounds):
            for name, ask in ways.items():
                started = time.perf_counter()
                ask(image, mask)
                seconds[name].append(time.perf_counter() - started)
        for name, taken in seconds.items():
            p50, p90 = np.percentile(np.array(taken) * 1e3, [50, 90])
            rows[name].append(f"{p50:.1f}, {p90:.1f}, {differences[name]:.0e}")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
