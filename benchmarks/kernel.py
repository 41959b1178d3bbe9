"""How fast the dynamic filter itself is: time, bytes and GB/s against a measured copy, and against how others write it.

    python benchmarks/kernel.py                      # on the GPU, or on the CPU where there is none
    python benchmarks/kernel.py --tune               # on a GPU: also other geometries of the kernels

Bytes are the floor: features, taps and output, each moved once; their time at the speed of a copy that is measured here
is the least that any kernel could take. On a GPU every run is timed by CUDA events, after a write that flushes the L2;
every result is compared with the reference in float64 before it is timed. Writes kernel-cuda.json and .md (or -cpu).
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from formulations import stacked, unfolded

from misf.plugins.dynamic_filter import cuda, dynamic_filter
from misf.plugins.shared.command import command, one_line
from misf.plugins.shared.errors import AccuracyError, EnvironmentMismatch
from misf.plugins.shared.files import written_whole

FLUSH_BYTES = 256 << 20  # more than any L2
FLUSHES = 16  # so long that the run is in the queue before the GPU is done with them: no gap is timed
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
        """Channels of the taps, for K = 3."""
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
    note: str = ""


def cases(device: str, batch: int | None) -> list[Case]:
    """Return MISF's two uses of the op at 256x256; on a GPU in batches that leave its L2."""
    gpu = device == "cuda"
    return [
        Case("features", batch or (64 if gpu else 1), 256, 64, 4),
        Case("picture", batch or (128 if gpu else 1), 3, 256, 1),
    ]


class Timer:
    """Times runs one by one, with what was in the caches gone."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device=device) if device == "cuda" else None

    def __call__(self, run: Run) -> tuple[float, float]:
        """Return the median and the distance between the quartiles, in milliseconds."""
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
    """Return what a large copy moves on this machine, bytes read plus bytes written."""
    source = torch.rand(COPY_BYTES[timer.device] // 4, device=timer.device)
    target = torch.empty_like(source)
    time_ms, _ = timer(lambda: target.copy_(source))
    return 2 * source.nbytes / time_ms / 1e6


def inputs(case: Case, dtype: torch.dtype, device: str, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Return random features and taps."""
    sizes = (case.channels, case.taps)
    made = [torch.randn(case.batch, c, case.side, case.side, device=device, dtype=dtype) for c in sizes]
    return made[0].to(memory_format=memory_format), made[1].to(memory_format=memory_format)


def agrees(output: Tensor, features: Tensor, taps: Tensor, share: int) -> None:
    """Compare the last image of a result with the reference in float64 on the CPU; NaN never passes."""
    exact = dynamic_filter(features[-1:].double().cpu(), taps[-1:].double().cpu(), 3, share)
    error = (output[-1:].double().cpu() - exact).norm() / exact.norm()
    limit = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[output.dtype]
    if not error <= limit:
        raise AccuracyError(f"a result is wrong: relative error {error:.2e}, at most {limit:.0e} was expected")


def padded_to_8(tensor: Tensor) -> Tensor:
    """Return N,C,H,W values as N,H,W,C' with C' rounded up to 8, as in TensorRT's HWC8; the padding is NaN."""
    n, channels, height, width = tensor.shape
    padded = tensor.new_full((n, height, width, -(-channels // 8) * 8), math.nan)
    padded[..., :channels] = tensor.permute(0, 2, 3, 1)
    return padded


def hwc8_run(case: Case, features: Tensor, taps: Tensor) -> tuple[Run, Callable[[], Tensor], int]:
    """Return the kernel on HWC8 buffers, how to read its result, and its bytes, padding included."""
    source, weights = padded_to_8(features), padded_to_8(taps)
    written = torch.full_like(source, math.nan)
    shape = cuda.call_shape(tuple(features.shape), 3, case.share)
    shape.feature_stride = shape.output_stride = source.shape[3]
    shape.tap_stride = weights.shape[3]
    layout = cuda.Layout.CHANNELS_LAST

    def run() -> None:
        cuda.run(cuda.Pass.FORWARD, layout, source, weights, written, shape)

    def result() -> Tensor:
        return written[..., : case.channels].permute(0, 3, 1, 2)

    return run, result, source.nbytes + weights.nbytes + written.nbytes


class Bench:
    """All measurements on one device."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device = device
        self.timer = Timer(device, repeats)
        self.copy = copy_gb_per_s(self.timer)
        self.rows: list[Row] = []

    def measure(
        self, case: Case, dtype: torch.dtype, layout: str, method: str, run: Run, moved: int, note: str = ""
    ) -> Row:
        """Time one method and add its row."""
        time_ms, spread_ms = self.timer(run)
        speed = moved / time_ms / 1e6
        shape = f"{case.batch}x{case.channels}x{case.side}x{case.side}"
        name = str(dtype).removeprefix("torch.")
        row = Row(
            case.name, shape, name, layout, method, time_ms, spread_ms, moved, speed, speed / self.copy, note=note
        )
        self.rows.append(row)
        print(f"{case.name:9} {name:9} {layout:13} {method:22} {time_ms:9.3f} ms {speed:8.1f} GB/s", file=sys.stderr)
        return row

    def forward(self, case: Case, dtype: torch.dtype) -> None:
        """Measure ours in each layout and the others in NCHW; the official formulation is the yardstick."""
        start = len(self.rows)
        features, taps = inputs(case, dtype, self.device, torch.contiguous_format)
        moved = 2 * features.nbytes + taps.nbytes
        for method, function in self._methods().items():
            try:
                agrees(function(features, taps, 3, case.share), features, taps, case.share)
                run: Run = functools.partial(function, features, taps, 3, case.share)
                self.measure(case, dtype, "nchw", method, run, moved)
            except Exception as error:  # out of memory, torch.compile, ...: the others go on
                if method == "ours" or isinstance(error, AccuracyError):
                    raise
                print(f"{case.name} {method}: {type(error).__name__}: {one_line(error)[:200]}", file=sys.stderr)
        last_features, last_taps = (t.to(memory_format=torch.channels_last) for t in (features, taps))
        agrees(dynamic_filter(last_features, last_taps, 3, case.share), features, taps, case.share)
        run = functools.partial(dynamic_filter, last_features, last_taps, 3, case.share)
        self.measure(case, dtype, "channels_last", "ours", run, moved)
        if self.device == "cuda" and dtype == torch.float16:
            run, result, padded = hwc8_run(case, features, taps)
            run()
            agrees(result(), features, taps, case.share)
            self.measure(case, dtype, "hwc8", "ours", run, padded, note="bytes with padding")
        official = next((row.time_ms for row in self.rows[start:] if row.method == "official"), math.nan)
        for row in self.rows[start:]:
            row.times_official = official / row.time_ms

    def _methods(self) -> dict[str, Callable[..., Tensor]]:
        methods: dict[str, Callable[..., Tensor]] = {"ours": dynamic_filter, "official": stacked, "unfold": unfolded}
        methods["official, torch.compile"] = torch.compile(stacked, dynamic=False)
        if self.device == "cuda":
            methods["ours, naive kernel"] = lambda f, t, k, s: cuda.forward(f, t, k, s, naive=True)
        return methods

    def backward(self, case: Case, dtype: torch.dtype) -> None:
        """Measure both gradients; the floor: three tensors read, two written."""
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

    def tune(self, case: Case) -> None:
        """Measure other geometries of the two FP16 forward kernels; each must give the default's result to the bit."""
        dtype, element = torch.float16, 2
        for layout in cuda.Layout:
            planar = layout is cuda.Layout.PLANAR
            memory_format = torch.contiguous_format if planar else torch.channels_last
            features, taps = inputs(case, dtype, self.device, memory_format)
            expected = dynamic_filter(features, taps, 3, case.share)
            written = torch.empty_like(features)
            pointers = (features.data_ptr(), taps.data_ptr(), written.data_ptr())
            shape = cuda.call_shape(tuple(features.shape), 3, case.share)
            default = cuda.plan(cuda.Pass.FORWARD, layout, shape, dtype)
            moved = 2 * features.nbytes + taps.nbytes
            for call in geometries(default, case, element):
                written.fill_(math.nan)
                cuda.launch(call, pointers, features.device)
                if not torch.equal(written, expected):
                    raise AccuracyError(f"{call.kernel}: another geometry gives another result")
                s = call.shape
                method = f"{call.kernel.split('<')[1]} groups {1 << s.group_bits} columns {1 << s.column_bits}"
                note = "default" if call == default else "tune"
                run = functools.partial(cuda.launch, call, pointers, features.device)
                self.measure(case, dtype, layout.name.lower(), method, run, moved, note)


def geometries(default: cuda.Plan, case: Case, element: int) -> Iterator[cuda.Plan]:
    """Yield the default plan, and others for the same call."""
    yield default
    wide = 16 // element
    planar = "Planar" in default.kernel
    for per_thread in (default.width,) if planar else (wide, 2 * wide, 4 * wide):
        for group_bits in (0,) if planar else (1, 2, 3):
            for column_bits in (2, 3, 4, 5):
                if group_bits + column_bits > 8 or (not planar and default.width == 1):
                    continue
                shape = cuda.Shape.from_buffer_copy(default.shape)
                shape.group_bits, shape.column_bits = group_bits, column_bits
                columns = shape.width // default.width if planar else shape.width
                shape.column_tiles = math.ceil(columns / (1 << column_bits))
                shape.row_tiles = math.ceil(shape.height / (cuda.THREADS >> (group_bits + column_bits)))
                groups = default.grid[1] if planar else math.ceil(case.channels / (per_thread << group_bits))
                grid = (shape.column_tiles * shape.row_tiles * shape.batch, groups)
                kernel = default.kernel
                if not planar:
                    kernel = f"misf::forwardChannelsLast<__half, 3, {case.share}, {per_thread}, {wide}>"
                yield replace(default, shape=shape, kernel=kernel, grid=grid)


def markdown(rows: list[Row], copy: float, machine: dict[str, Any]) -> str:
    """Return the table, under the machine and the copy that it is measured against."""
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
    """Return what identifies the machine."""
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
    "--batch", type=click.IntRange(min=1), help="Pictures per call.  [default: 64 and 128 on a GPU, 1 on a CPU]"
)
@click.option("--tune", is_flag=True, help="Also time other geometries of the kernels.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent / "results",
    help="Folder for kernel-DEVICE.json and .md.  [default: benchmarks/results]",
)
def main(device: str, repeats: int, batch: int | None, tune: bool, output: Path) -> None:
    """Time the dynamic filter and print the table.

    \b
    Example: python benchmarks/kernel.py --device cuda
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentMismatch("no NVIDIA GPU that torch can use; --device cpu measures the reference")
    if device == "cuda" and not cuda.available():
        raise EnvironmentMismatch("the kernels cannot be compiled here: pip install 'misf[cuda]'")
    if tune and device != "cuda":
        raise click.UsageError("--tune needs a GPU")
    torch.manual_seed(0)
    bench = Bench(device, repeats)
    machine = describe(device)
    for case in cases(device, batch):
        for dtype in TYPES[device]:
            bench.forward(case, dtype)
            bench.backward(case, dtype)
            table = write(bench, machine, output)  # at once: what comes later may fail, or run out of time
    if tune:
        for case in cases(device, batch):
            bench.tune(case)
        table = write(bench, machine, output)
    click.echo(table)


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
