"""The GPU part of latency.py: the whole network in PyTorch, ONNX Runtime and TensorRT on one GPU.

PyTorch is timed by CUDA events, with pictures already on the GPU. ONNX Runtime and engines are timed by the clock, from
NumPy array to NumPy array, including copies; engines also with pictures on the GPU. All methods take turns in every
round. The floor is the time of the network's arithmetic at the rate of an 8192 x 8192 fp16 matrix product, measured
here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formulations import official_formulation, plain_norm
from torch import Tensor

from misf.plugins.shared.command import one_line
from misf.plugins.shared.errors import MisfError

BASELINE = "PyTorch eager fp32, official formulation"
GFLOP_AT_256 = 261.0  # for one 256x256 picture at the published sizes
Run = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Way:
    """One way of running the network: `make(image, mask)` returns the call to time."""

    name: str
    make: Callable[[Tensor, Tensor], Callable[[], Any]]
    events: bool = True
    """Whether it is timed by CUDA events instead of the clock."""


def torch_ways(checkpoint: Path, device: str, compiled: bool) -> list[Way]:
    """Return the ways in PyTorch or, with `compiled`, only torch.compile, which takes minutes.

    On a CPU (for the tests of this file) these are only the ones in float32 and NCHW.
    """
    from misf.training import load_model

    def eager(
        setting: Setting, inside: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    ) -> Callable[[Tensor, Tensor], Callable[[], Any]]:
        def make(image: Tensor, mask: Tensor) -> Callable[[], Any]:
            run, pictures = setting(load_model(checkpoint).to(device)), prepared(image, mask, setting)

            def call() -> Tensor:
                with inside(), torch.inference_mode():
                    result: Tensor = run(*pictures)
                    return result

            return call

        return make

    def compile_it(setting: Setting) -> Callable[[Tensor, Tensor], Callable[[], Any]]:
        def make(image: Tensor, mask: Tensor) -> Callable[[], Any]:
            network = setting(load_model(checkpoint).to(device))
            run, pictures = torch.compile(network, dynamic=False), prepared(image, mask, setting)
            return lambda: _inferred(run, pictures)

        return make

    plain, half = Setting(torch.float32, False), Setting(torch.float16, True)
    baseline = Way(BASELINE, eager(plain, official_formulation))
    if compiled:
        return [baseline, Way(f"torch.compile {half}, our filter", compile_it(half))]
    if device == "cpu":
        return [baseline, Way(f"PyTorch eager {plain}, our filter", eager(plain))]
    settings = [Setting(dtype, last) for dtype in (torch.float32, torch.float16, torch.bfloat16) for last in (0, 1)]
    ways = [baseline, Way(f"PyTorch eager {half}, official formulation", eager(half, official_formulation))]
    ways += [Way(f"PyTorch eager {setting}, our filter", eager(setting)) for setting in settings]
    ours, old_norm = eager(half), eager(half, plain_norm)
    ways += [
        Way(f"PyTorch {half}, our filter, CUDA graph", lambda i, m: graphed(ours(i, m))),
        Way(f"PyTorch {half}, our filter, F.instance_norm, CUDA graph", lambda i, m: graphed(old_norm(i, m))),
    ]
    return ways


@dataclass(frozen=True)
class Setting:
    """The dtype and memory layout of a network."""

    dtype: torch.dtype
    channels_last: bool | int

    def __str__(self) -> str:
        name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.dtype]
        return f"{name} channels-last" if self.channels_last else name

    def __call__(self, made: Any) -> Any:
        """Return a network or tensor in this dtype and layout."""
        last = torch.channels_last if self.channels_last else torch.contiguous_format
        return made.to(dtype=self.dtype, memory_format=last)


def _inferred(run: Any, pictures: tuple[Tensor, Tensor]) -> Any:
    with torch.inference_mode():
        return run(*pictures)


def prepared(image: Tensor, mask: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Return the pictures for a network of that setting."""
    return setting(image), setting(mask)


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return a call as a replayed CUDA graph, which always returns the same tensor."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def backend_ways(files: dict[str, Path]) -> list[Way]:
    """Return the ways of running `files`, name -> ONNX file (on ONNX Runtime's CUDA provider) or engine."""
    from misf.runtime.backends import open_backend
    from misf.runtime.backends.contract import ENGINES
    from misf.runtime.backends.onnx_runtime import has_cuda
    from misf.runtime.backends.tensorrt import TensorRtBackend

    def host(opened: Any, image: Tensor, mask: Tensor) -> Callable[[], Any]:
        arrays = image.cpu().numpy(), mask.cpu().numpy()
        return lambda: opened(*arrays)

    ways = []
    for name, file in files.items():
        if file.suffix not in ENGINES:
            if has_cuda():
                ways.append(Way(f"ONNX Runtime CUDA {name}", _onnx(open_backend, file, host), events=False))
            continue
        for graph in (True, False):
            title = f"TensorRT {name}, {'CUDA graph' if graph else 'no graph'}, with copies"

            def make(image: Tensor, mask: Tensor, file: Path = file, graph: bool = graph) -> Callable[[], Any]:
                return host(TensorRtBackend(file, cuda_graph=graph), image, mask)

            ways.append(Way(title, make, events=False))

        def on_gpu(image: Tensor, mask: Tensor, file: Path = file) -> Callable[[], Any]:
            opened = TensorRtBackend(file)
            return lambda: opened(image, mask)  # type: ignore[arg-type] # torch tensors are accepted too

        ways.append(Way(f"TensorRT {name}, pictures on the GPU", on_gpu))
    return ways


def _onnx(open_backend: Any, file: Path, host: Any) -> Callable[[Tensor, Tensor], Callable[[], Any]]:
    return lambda image, mask: host(open_backend(file, backend="onnxruntime", device="cuda"), image, mask)


def engines(onnx_files: dict[str, Path], folder: Path, sizes: list[tuple[int, int]], batch: int) -> dict[str, Path]:
    """Return engines of the ONNX files, with and without plugin; none without TensorRT. Failures are printed."""
    from misf.runtime.engines.flavors import installed

    if not installed("tensorrt"):
        return {}
    from misf.export.engine.builder import EngineOptions, build_engine
    from misf.runtime.engines.side_car import Limits

    low, high = (
        (min(h for h, _ in sizes), min(w for _, w in sizes)),
        (max(h for h, _ in sizes), max(w for _, w in sizes)),
    )
    limits = Limits((1, *low), (1, *low), (batch, *high))
    found = {}
    for name, file in onnx_files.items():
        for without in (False, True):
            title = f"{name} {'without' if without else 'with'} plugin"
            path = folder / f"{file.stem}_{'plain' if without else 'plugin'}.plan"
            try:
                build_engine(file, path, EngineOptions(backend="tensorrt", limits=limits, without_plugin=without))
                found[title] = path
            except (MisfError, ValueError) as error:
                print(f"TensorRT {title}: not measured: {one_line(error)}", file=sys.stderr)
    return found


def pictures(height: int, width: int, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Return smooth random pictures N,3,H,W and masks N,1,H,W with a hole in the middle, on the device."""
    noise = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    image = torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear")
    mask = torch.zeros(batch, 1, height, width)
    mask[:, :, height // 4 : height // 2, width // 4 : width // 2] = 1
    return image.to(device), mask.to(device)


def milliseconds(call: Callable[[], Any], events: bool) -> float:
    """Return the duration of one call in milliseconds."""
    if not events:
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))


def in_hole_db(output: Any, reference: Tensor, mask: Tensor) -> float | None:
    """Return the PSNR in the hole against the float32 baseline in dB, or None if they are equal."""
    result = torch.from_numpy(output) if isinstance(output, np.ndarray) else output
    hole = (mask > 0.5).expand_as(reference).cpu()
    difference = (result.float().cpu() - reference.float().cpu())[hole].double()
    mse = float(difference.square().mean())
    return None if mse == 0 else -10 * math.log10(mse)


def measure(ways: list[Way], image: Tensor, mask: Tensor, rounds: int, warm_up: int) -> dict[str, dict[str, Any]]:
    """Return a row for every method, or why it failed. Methods take turns; one that fails does not stop the others."""
    on_gpu = image.is_cuda
    calls: dict[str, tuple[Way, Callable[[], Any]]] = {}
    rows: dict[str, dict[str, Any]] = {}
    reference: Tensor | None = None
    for way in ways:
        try:
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated() if on_gpu else 0
            call = way.make(image, mask)
            for _ in range(warm_up):
                output = call()
            if on_gpu:
                torch.cuda.synchronize()
            reference = output.clone() if reference is None else reference
            peak = torch.cuda.max_memory_allocated() - start if on_gpu and way.events else None
            rows[way.name] = {
                "psnr_db": in_hole_db(output, reference, mask),
                "peak_memory_mb": None if peak is None else peak / 1e6,
                "timed": "CUDA events" if way.events and on_gpu else "clock, with copies",
            }
            calls[way.name] = way, call
        except Exception as error:  # such as out of memory or a missing provider; the other methods go on
            rows[way.name] = {"failed": f"{type(error).__name__}: {one_line(error)[:300]}"}
    latencies: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (way, call) in calls.items():
            latencies[name].append(milliseconds(call, way.events and on_gpu))
    base = statistics.median(latencies[BASELINE]) if latencies.get(BASELINE) else None
    for name, values in latencies.items():
        median = statistics.median(values)
        rows[name] |= {f"p{p}_ms": float(np.percentile(values, p)) for p in (50, 90, 99)}
        rows[name] |= {"pictures_per_second": 1000 * len(image) / median, "times_faster": base and base / median}
    return rows


def matrix_tflops(dtype: torch.dtype = torch.float16, side: int = 8192, repeats: int = 10) -> float:
    """Return the rate of a matrix product on this GPU, in TFLOP/s."""
    a, b = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    times = [milliseconds(lambda: a @ b, events=True) for _ in range(repeats)]
    return 2 * side**3 / statistics.median(times) / 1e9


def floor_ms(height: int, width: int, batch: int, tflops: float) -> float:
    """Return the time in milliseconds of the network's arithmetic at that rate."""
    return GFLOP_AT_256 * (height * width / 256**2) * batch / tflops


def board() -> dict[str, str]:
    """Return the GPU's name in PyTorch, its clocks, and a Jetson's power mode."""
    about = {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    queries = {
        "clocks": ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"],
        "power_mode": ["nvpmodel", "-q"],
    }
    for name, command in queries.items():
        if shutil.which(command[0]):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            about[name] = " ".join(result.stdout.split())
    return about


def table(title: str, rows: dict[str, dict[str, Any]], floor: float | None) -> str:
    """Return one size's results as a Markdown table."""
    lines = [
        f"| {title} | p50 ms | p90 ms | p99 ms | pictures/s | times faster | of floor | PSNR, dB | peak, MB | timed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | not measured: {row['failed']} |" + " |" * 8)
            continue
        numbers = " | ".join(f"{row[f'p{p}_ms']:.2f}" for p in (50, 90, 99))
        faster = "-" if row["times_faster"] is None else f"{row['times_faster']:.2f}"
        of_floor = "-" if floor is None else f"{row['p50_ms'] / floor:.1f}x"
        psnr = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.0f}"
        peak = "-" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f}"
        rate = f"{row['pictures_per_second']:.1f}"
        lines.append(f"| {name} | {numbers} | {rate} | {faster} | {of_floor} | {psnr} | {peak} | {row['timed']} |")
    return "\n".join(lines)


def run_all(
    checkpoint: Path, sizes: list[tuple[int, int]], batches: list[int], rounds: int, warm_up: int, compiled: bool
) -> Iterator[tuple[str, dict[str, dict[str, Any]], float]]:
    """Yield (title, rows, floor in ms) of every size and batch on the first GPU."""
    import tempfile

    torch.backends.cudnn.allow_tf32 = False  # on by default, but with 10 bits of mantissa it is not fp32
    onnx_files: dict[str, Path] = {}
    tflops = matrix_tflops()
    print(f"fp16 matrix product: {tflops:.0f} TFLOP/s", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        others = importlib.util.find_spec("onnxscript") and (_has_ort_cuda() or importlib.util.find_spec("tensorrt"))
        if others:
            from misf.export.exporter import export_onnx
            from misf.training.model.checkpoint import load_checkpoint

            for precision in ("fp32", "fp16"):
                onnx_files[precision] = Path(folder) / f"{precision}.onnx"
                export_onnx(load_checkpoint(checkpoint), onnx_files[precision], precision)
        files = {**onnx_files, **engines(onnx_files, Path(folder), sizes, max(batches))}
        for height, width in sizes:
            for batch in batches:
                ways = torch_ways(checkpoint, "cuda", compiled) + backend_ways(files)
                rows = measure(ways, *pictures(height, width, batch, "cuda"), rounds, warm_up)
                yield f"{batch} x {height}x{width}", rows, floor_ms(height, width, batch, tflops)
                torch.cuda.empty_cache()


def profile(checkpoint: Path, size: tuple[int, int], batch: int, device: str = "cuda") -> str:
    """Return torch.profiler's table of the network's kernels in fp16 channels-last (on a CPU: fp32), longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    wanted = "PyTorch eager fp16 channels-last, our filter" if device == "cuda" else "PyTorch eager fp32, our filter"
    way = next(way for way in torch_ways(checkpoint, device, False) if way.name == wanted)
    call = way.make(*pictures(*size, batch, device))
    for _ in range(3):
        call()
    with profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]) as found:
        for _ in range(5):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=90))


def _has_ort_cuda() -> bool:
    from misf.runtime.backends.onnx_runtime import has_cuda

    return has_cuda()
