"""Speed of the dynamic filter alone: time, bytes and GB/s, compared with a measured copy and with other formulations.

    python benchmarks/kernel.py                      # on the GPU, or on the CPU if there is none
    python benchmarks/kernel.py --gradients without --batch 1 --batch 32

Bytes are the minimum that must be moved: features, taps and output once each. The time for them at the speed of a copy,
measured here, is a lower bound for any kernel. On a GPU every run is timed by CUDA events, after a write that flushes
the L2; every result is compared with the reference in float64 before it is timed. "Plugin" is the TensorRT plugin's
kernel, built by nvcc and called without TensorRT. Writes kernel-cuda.json and .md (or -cpu).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from formulations import stacked, unfolded

from misf.plugins.dynamic_filter import dynamic_filter
from misf.plugins.shared.command import command, one_line
from misf.plugins.shared.errors import AccuracyError, EnvironmentMismatch
from misf.plugins.shared.files import written_whole

FLUSH_BYTES = 256 << 20  # more than any L2
FLUSHES = 16  # enough to enqueue the run before the GPU has finished them, so that no gap is timed
COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
TYPES = {"cuda": (torch.float32, torch.float16, torch.bfloat16), "cpu": (torch.float32,)}
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One size of the op."""

    name: str
    batch: int
    channels: int
    side: int
    share: int

    @property
    def taps(self) -> int:
        """Number of channels of the taps, for K = 3."""
        return self.channels * 9 // self.share


@dataclass
class Row:
    """One measurement."""

    case: str
    shape: str
    dtype: str
    layout: str
    method: str
    time_ms: float
    spread_ms: float
    floor_bytes: int
    gb_per_s: float
    of_copy: float
    times_official: float = math.nan


def cases(device: str, batches: Sequence[int]) -> list[Case]:
    """Return MISF's two uses of the op at 256x256; on a GPU, also in batches that exceed its L2."""
    sizes = batches or ((1, 32) if device == "cuda" else (1,))
    return [case for n in sizes for case in (Case("features", n, 256, 64, 4), Case("picture", n, 3, 256, 1))]


class Timer:
    """Times runs one by one, with cold caches."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device=device) if device == "cuda" else None

    def __call__(self, run: Run) -> tuple[float, float]:
        """Return the median and the interquartile range in milliseconds."""
        for _ in range(3):
            run()
        times = sorted(self._once(run) for _ in range(self.repeats))
        return statistics.median(times), times[len(times) * 3 // 4] - times[len(times) // 4]

    def _once(self, run: Run) -> float:
        if self._flush is None:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        for _ in range(FLUSHES):
            self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def copy_gb_per_s(timer: Timer) -> float:
    """Return the speed of a large copy on this machine in GB/s, bytes read plus bytes written."""
    source = torch.rand(COPY_BYTES[timer.device] // 4, device=timer.device)
    target = torch.empty_like(source)
    time_ms, _ = timer(lambda: target.copy_(source))
    return 2 * source.nbytes / time_ms / 1e6


def inputs(case: Case, dtype: torch.dtype, device: str, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Return random features and taps."""
    sizes = (case.channels, case.taps)
    made = [torch.randn(case.batch, c, case.side, case.side, device=device, dtype=dtype) for c in sizes]
    return made[0].to(memory_format=memory_format), made[1].to(memory_format=memory_format)


class Referee:
    """Compares the last image of a result with the reference in float64 on the CPU."""

    def __init__(self, features: Tensor, taps: Tensor, share: int) -> None:
        self.exact = dynamic_filter(features[-1:].double().cpu(), taps[-1:].double().cpu(), 3, share)

    def __call__(self, output: Tensor) -> None:
        """Raise AccuracyError for a wrong result; NaN never passes."""
        error = (output[-1:].double().cpu() - self.exact).norm() / self.exact.norm()
        limit = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[output.dtype]
        if not error <= limit:
            raise AccuracyError(f"a result is wrong: relative error {error:.2e}, expected at most {limit:.0e}")


def plugin_program(folder: Path) -> Path | None:
    """Build plugin_kernel.cu for this GPU and return the program; without nvcc, print a line and return None."""
    nvcc = shutil.which("nvcc") or f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"
    if not Path(nvcc).is_file():
        print("the plugin's kernels are not measured: nvcc was not found", file=sys.stderr)
        return None
    spec = importlib.util.find_spec("misf.plugins.dynamic_filter")
    assert spec is not None
    assert spec.origin is not None
    sources, program = Path(spec.origin).parent / "kernels", folder / "plugin_kernel"
    major, minor = torch.cuda.get_device_capability()
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{major}{minor}", "-I", str(sources)]
    command += [
        str(Path(__file__).with_name("plugin_kernel.cu")),
        str(sources / "launch.cu"),
        "-o",
        str(program),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise EnvironmentMismatch(f"nvcc did not build the plugin's kernels: {one_line(RuntimeError(result.stderr))}")
    return program


class Bench:
    """All measurements on one device."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device = device
        self.timer = Timer(device, repeats)
        self.copy = copy_gb_per_s(self.timer)
        self.rows: list[Row] = []

    def measure(self, case: Case, dtype: torch.dtype, layout: str, method: str, run: Run, moved: int) -> Row:
        """Time one method and add its row."""
        return self.add(case, dtype, layout, method, *self.timer(run), moved)

    def add(
        self, case: Case, dtype: torch.dtype, layout: str, method: str, time_ms: float, spread_ms: float, moved: int
    ) -> Row:
        """Add a row for a measured time."""
        speed = moved / time_ms / 1e6
        shape = f"{case.batch}x{case.channels}x{case.side}x{case.side}"
        name = str(dtype).removeprefix("torch.")
        row = Row(case.name, shape, name, layout, method, time_ms, spread_ms, moved, speed, speed / self.copy)
        self.rows.append(row)
        print(f"{shape:16} {name:9} {layout:13} {method:24} {time_ms:9.4f} ms {speed:8.1f} GB/s", file=sys.stderr)
        return row

    def forward(self, case: Case, dtype: torch.dtype) -> None:
        """Measure ours in each layout and the others in NCHW; the official formulation is the yardstick."""
        start = len(self.rows)
        features, taps = inputs(case, dtype, self.device, torch.contiguous_format)
        check = Referee(features, taps, case.share)
        moved = 2 * features.nbytes + taps.nbytes
        for method, function in self._methods(case, dtype).items():
            try:
                run: Run = functools.partial(function, features, taps, 3, case.share)
                check(run())
                self.measure(case, dtype, "nchw", method, run, moved)
            except Exception as error:  # such as out of memory or a failed torch.compile; the other methods go on
                if method == "ours" or isinstance(error, AccuracyError):
                    raise
                print(f"{case.name} {method}: {type(error).__name__}: {one_line(error)[:200]}", file=sys.stderr)
        last = [tensor.to(memory_format=torch.channels_last) for tensor in (features, taps)]
        run = functools.partial(dynamic_filter, *last, 3, case.share)
        check(run())
        self.measure(case, dtype, "channels_last", "ours", run, moved)
        official = next((row.time_ms for row in self.rows[start:] if row.method == "official"), math.nan)
        for row in self.rows[start:]:
            row.times_official = official / row.time_ms

    def _methods(self, case: Case, dtype: torch.dtype) -> dict[str, Callable[..., Tensor]]:
        methods: dict[str, Callable[..., Tensor]] = {"ours": dynamic_filter, "official": stacked, "unfold": unfolded}
        if dtype == torch.float16 and case.batch > 1:  # it takes half a minute each, so only where it matters
            methods["official, torch.compile"] = torch.compile(stacked, dynamic=False)
        return methods

    def plugin(self, program: Path, case: Case) -> None:
        """Measure the plugin's kernels in its three formats."""
        formats = {
            "linear_float": (torch.float32, 1),
            "linear_half": (torch.float16, 1),
            "hwc8_half": (torch.float16, 8),
        }
        for name, (dtype, multiple) in formats.items():
            sides = (case.batch, case.channels, case.side, case.side, case.share, self.timer.repeats)
            command = [str(program), name, *map(str, sides)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise EnvironmentMismatch(f"{name}: {one_line(RuntimeError(result.stderr))}")
            time_ms, spread_ms = map(float, result.stdout.split())
            channels = sum(-(-count // multiple) * multiple for count in (case.channels, case.taps, case.channels))
            moved = channels * case.batch * case.side**2 * dtype.itemsize  # padding is moved too
            layout = "hwc8" if multiple > 1 else "nchw"
            self.add(case, dtype, layout, "plugin", time_ms, spread_ms, moved)

    def backward(self, case: Case, dtype: torch.dtype) -> None:
        """Measure both gradients; at least three tensors are read and two written."""
        start = len(self.rows)
        for layout, memory_format in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)):
            features, taps = inputs(case, dtype, self.device, memory_format)
            grad = torch.randn_like(features)
            moved = 3 * features.nbytes + 2 * taps.nbytes
            for method, function in {"ours": dynamic_filter, "official": stacked}.items():
                if method == "official" and layout != "nchw":
                    continue
                leaves = [tensor.detach().requires_grad_() for tensor in (features, taps)]
                try:
                    output = function(*leaves, 3, case.share)
                    run = functools.partial(torch.autograd.grad, output, leaves, grad, retain_graph=True)
                    self.measure(case, dtype, layout, f"{method}, gradients", run, moved)
                except torch.OutOfMemoryError:
                    print(f"{case.name} {method} gradients: out of memory", file=sys.stderr)
        official = next((row.time_ms for row in self.rows[start:] if row.method.startswith("official")), math.nan)
        for row in self.rows[start:]:
            row.times_official = official / row.time_ms


def markdown(rows: list[Row], copy: float, machine: dict[str, Any]) -> str:
    """Return the table, below the machine and the speed of its copy."""
    lines = [
        "# The dynamic filter alone",
        "",
        ", ".join(f"{key}: {value}" for key, value in machine.items()),
        "",
        f"A copy on this machine moves {copy:.1f} GB/s (read plus written). GB/s of a row: the bytes that must be "
        "moved (features, taps and output once; gradients: three read, two written) over its time.",
        "",
        "| case | shape | type | layout | method | ms (median) | quartiles | GB/s | of a copy | times official |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.case} | {row.shape} | {row.dtype} | {row.layout} | {row.method} | {row.time_ms:.3f} | "
            f"{row.spread_ms:.3f} | {row.gb_per_s:.1f} | {row.of_copy:.0%} | {row.times_official:.1f} |"
        )
    return "\n".join(lines) + "\n"


def describe(device: str) -> dict[str, Any]:
    """Return a description of the machine."""
    from misf.runtime.checks.doctor import machine

    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "l2 MiB": properties.L2_cache_size >> 20,
            "cuda": torch.version.cuda,
        }
    return {**machine(), **found}


@command("kernel.py")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--repeats", type=click.IntRange(min=3), default=30, show_default=True)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    multiple=True,
    help="Pictures per call, may be repeated.  [default: 1 and 32 on a GPU, 1 on a CPU]",
)
@click.option("--gradients", type=click.Choice(["with", "without", "only"]), default="with", show_default=True)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent / "results",
    help="Folder for kernel-DEVICE.json and .md.  [default: benchmarks/results]",
)
def main(device: str, repeats: int, batch: tuple[int, ...], gradients: str, output: Path) -> None:
    """Time the dynamic filter and print the table.

    \b
    Example: python benchmarks/kernel.py --device cuda
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentMismatch("no NVIDIA GPU that torch can use; --device cpu measures the reference")
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise EnvironmentMismatch("our kernels cannot be compiled here: pip install triton")
    torch.manual_seed(0)
    bench = Bench(device, repeats)
    machine = describe(device)
    for case in cases(device, batch):
        for dtype in TYPES[device]:
            if gradients != "only":
                bench.forward(case, dtype)
            if gradients != "without":
                bench.backward(case, dtype)
            write(bench, machine, output)  # immediately, because later measurements may fail or time out
    if device == "cuda" and gradients != "only":
        with tempfile.TemporaryDirectory() as folder:
            program = plugin_program(Path(folder))
            for case in cases(device, batch) if program else ():
                bench.plugin(program, case)
    click.echo(write(bench, machine, output))


def write(bench: Bench, machine: dict[str, Any], folder: Path) -> str:
    """Write kernel-DEVICE.json and .md; return the table."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine, "copy_gb_per_s": bench.copy, "rows": [asdict(row) for row in bench.rows]}
    table = markdown(bench.rows, bench.copy, machine)
    for suffix, text in ((".json", json.dumps(document, indent=2) + "\n"), (".md", table)):
        with written_whole(folder / f"kernel-{bench.device}{suffix}") as path:
            path.write_text(text)
    return table


if __name__ == "__main__":
    main()
