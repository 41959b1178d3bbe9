"""How long one picture takes on every backend of this machine, side by side.

    python benchmarks/latency.py                         # full-size network, 256x256 and 512x512
    python benchmarks/latency.py --checkpoint best.pt --size 256x256 --output benchmarks/results/mine
    python benchmarks/latency.py --device cuda --batch 1 16   # the default where a GPU is: see latency_gpu.py

On the CPU backends take turns, round by round, so that a machine whose speed drifts treats all alike; ratios are
medians against the official formulation (its order of operations in PyTorch eager, float32). Peak memory is that of a
process of its own for each backend, which loads the model and runs it twice. Writes latency.json, latency.md and
latency.png (on a GPU: latency-cuda.*).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from misf.runtime.checks import accuracy
from misf.runtime.checks.doctor import gpus, machine, versions

Inpaint = accuracy.Inpaint
BASELINE = "PyTorch eager, official formulation"


def random_checkpoint(folder: Path) -> Path:
    """Return a checkpoint of the published sizes with PyTorch's fresh weights: speed does not depend on the values."""
    import torch

    from misf.training import PRESETS
    from misf.training.model.checkpoint import save_checkpoint
    from misf.training.model.network import InpaintingNetwork

    torch.manual_seed(0)
    network = InpaintingNetwork(PRESETS["misf"])
    path = folder / "misf-random.safetensors"
    save_checkpoint(path, network.config, network.state_dict(), notes={"note": "random weights, for benchmarks only"})
    return path


def export(checkpoint: Path, folder: Path) -> Path:
    from misf.export.exporter import export_onnx
    from misf.training.model.checkpoint import load_checkpoint

    return export_onnx(load_checkpoint(checkpoint), folder / "model.onnx").path


def torch_eager(checkpoint: Path, official: bool = False, channels_last: bool = False) -> Inpaint:
    import torch
    from formulations import official_formulation

    from misf.training import load_model

    network = load_model(checkpoint)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    run = accuracy.torch_reference(network)

    def inpaint(image: Any, mask: Any) -> Any:
        with official_formulation() if official else contextlib.nullcontext():
            return run(image, mask)

    return inpaint


def backends(checkpoint: Path, onnx_file: Path) -> dict[str, Callable[[], Inpaint]]:
    """Return a loader for every way of running the network that this machine has."""
    import onnx

    from misf.runtime.backends import open_backend
    from misf.runtime.backends.contract import file_precision

    def onnx_runtime() -> Inpaint:
        return open_backend(onnx_file, backend="onnxruntime", device="cpu")

    metadata = {entry.key: entry.value for entry in onnx.load(onnx_file).metadata_props}
    found: dict[str, Callable[[], Inpaint]] = {
        BASELINE: lambda: torch_eager(checkpoint, official=True),
        "PyTorch eager": lambda: torch_eager(checkpoint),
        "PyTorch eager, channels-last": lambda: torch_eager(checkpoint, channels_last=True),
        f"ONNX Runtime {file_precision(onnx_file, metadata)}": lambda: open_backend(
            onnx_file, backend="onnxruntime", device="cpu"
        ),
    }
    with contextlib.suppress(ImportError):
        import openvino

        found["OpenVINO fp32"] = lambda: open_backend(onnx_file, backend="openvino", precision="fp32")
        if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            found["OpenVINO bf16"] = lambda: open_backend(onnx_file, backend="openvino", precision="bf16")
    return found


def case(height: int, width: int) -> tuple[Any, Any]:
    """Return a photograph and a mask of that size as the backends take them."""
    photographs = accuracy.load_photographs()
    return next(accuracy.cases(photographs, [(1, height, width)]))


def measure(runs: dict[str, Inpaint], image: Any, mask: Any, rounds: int, warm_up: int) -> dict[str, list[float]]:
    """Return the latencies in ms of each backend, which take turns; the warm-up rounds are not among them."""
    latencies: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm_up + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(image, mask)
            if turn >= warm_up:
                latencies[name].append(1000 * (time.perf_counter() - start))
    return latencies


def summarize(latencies: dict[str, list[float]], psnr_db: dict[str, float]) -> dict[str, dict[str, float | None]]:
    """Return percentiles in ms, pictures per second, and the ratio of medians to the baseline, for each backend."""
    base = latencies.get(BASELINE)
    rows = {}
    for name, values in latencies.items():
        median = statistics.median(values)
        rows[name] = {
            "p50_ms": median,
            "p90_ms": float(np.percentile(values, 90)),
            "p99_ms": float(np.percentile(values, 99)),
            "pictures_per_second": 1000 / median,
            "times_faster": statistics.median(base) / median if base else None,
            "psnr_db": None if psnr_db[name] == np.inf else psnr_db[name],  # None: equal
        }
    return rows


def peak_memory_mb(name: str, height: int, width: int, checkpoint: Path, onnx_file: Path) -> float:
    """Return the peak resident memory of a process that loads one backend and runs it twice (Linux only)."""
    child = [sys.executable, __file__, "--child", name, "--size", f"{height}x{width}"]
    child += ["--checkpoint", str(checkpoint), "--onnx", str(onnx_file)]
    result = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
    return float(result.stdout.strip().splitlines()[-1])


def child(name: str, height: int, width: int, checkpoint: Path, onnx_file: Path) -> None:
    run = backends(checkpoint, onnx_file)[name]()
    image, mask = case(height, width)
    for _ in range(2):
        run(image, mask)
    # Not getrusage's ru_maxrss, which a child inherits from its parent.
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)


def sizes_of(values: list[str]) -> Iterator[tuple[int, int]]:
    for value in values:
        height, _, width = value.partition("x")
        yield int(height), int(width)


def run_all(arguments: argparse.Namespace, checkpoint: Path, onnx_file: Path) -> dict[str, Any]:
    loaders = {
        name: loader
        for name, loader in backends(checkpoint, onnx_file).items()
        if not arguments.backend or any(part.lower() in name.lower() for part in (*arguments.backend, BASELINE))
    }
    runs = {name: loader() for name, loader in loaders.items()}
    results: dict[str, Any] = {}
    for height, width in sizes_of(arguments.size):
        image, mask = case(height, width)
        reference = torch_eager(checkpoint)
        psnr_db = {name: accuracy.compare(run, reference, image, mask).psnr_hole_db for name, run in runs.items()}
        rows = summarize(measure(runs, image, mask, arguments.rounds, arguments.warm_up), psnr_db)
        for name in rows:
            rows[name]["peak_memory_mb"] = peak_memory_mb(name, height, width, checkpoint, onnx_file)
        results[f"{height}x{width}"] = rows
        print(table(f"{height}x{width}", rows), file=sys.stderr)
    return results


def table(size: str, rows: dict[str, dict[str, float | None]]) -> str:
    """Return one size's results as a Markdown table."""
    lines = [
        f"| {size} | p50 ms | p90 ms | p99 ms | pictures/s | times faster | PSNR in hole, dB | peak memory, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        psnr = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.0f}"
        faster = "-" if row["times_faster"] is None else f"{row['times_faster']:.2f}"
        numbers = f"{row['p50_ms']:.0f} | {row['p90_ms']:.0f} | {row['p99_ms']:.0f} | {row['pictures_per_second']:.2f}"
        lines.append(f"| {name} | {numbers} | {faster} | {psnr} | {row['peak_memory_mb']:.0f} |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path, what: str = "one picture") -> None:
    try:
        import matplotlib as mpl
    except ImportError:
        print(f"{path.name} is not drawn: pip install matplotlib", file=sys.stderr)
        return

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 3), squeeze=False)
    for axis, (size, rows) in zip(axes[0], results.items(), strict=True):
        names = [name for name in rows if "p50_ms" in rows[name]][::-1]
        bars = axis.barh(names, [rows[name]["p50_ms"] for name in names], color="#4878a8")
        axis.bar_label(bars, fmt="%.3g")
        axis.set(title=f"{size}, {what}", xlabel="median latency, ms")
        axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def run_on_gpu(arguments: argparse.Namespace) -> Path:
    """Measure on the first GPU, write JSON, Markdown and a plot after every size, and return the Markdown file."""
    import latency_gpu
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("latency.py: no NVIDIA GPU that torch can use; --device cpu measures the CPU")
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    about = {**machine(), **latency_gpu.board()}
    packages = {name: value for name, value in versions().items() if value}
    weights = arguments.checkpoint.name if arguments.checkpoint else "misf (published sizes), random weights"
    settings = {"weights": weights, "rounds": arguments.rounds, "warm_up_rounds": arguments.warm_up}
    results: dict[str, Any] = {}
    floors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = arguments.checkpoint or random_checkpoint(Path(temporary))
        for title, rows, floor in latency_gpu.run_all(
            checkpoint,
            list(sizes_of(arguments.size)),
            arguments.batch,
            arguments.rounds,
            arguments.warm_up,
            arguments.compile,
        ):
            results[title], floors[title] = rows, floor
            document = {"machine": about, "packages": packages, "settings": settings, "floor_ms": floors}
            text = json.dumps({**document, "results": results}, indent=2)
            (folder / "latency-cuda.json").write_text(text + "\n")
            head = f"# Latency on a GPU\n\n{', '.join(about.get(k, '') for k in ('gpu', 'clocks', 'power_mode'))}; "
            head += (
                f"torch {packages.get('torch')}. Weights: {weights}. {arguments.rounds} rounds, ways taking turns.\n"
            )
            tables = [latency_gpu.table(name, value, floors[name]) for name, value in results.items()]
            (folder / "latency-cuda.md").write_text("\n\n".join([head, *tables]) + "\n")
            print(tables[-1], file=sys.stderr, flush=True)
    plot(results, folder / "latency-cuda.png", "GPU")
    return folder / "latency-cuda.md"


def run_profile(arguments: argparse.Namespace) -> Path:
    """Profile the first size and batch, write the table and return its file."""
    import latency_gpu
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if arguments.device == "auto" else arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("latency.py: no NVIDIA GPU that torch can use; --device cpu profiles the CPU")
    size = next(sizes_of(arguments.size))
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = arguments.checkpoint or random_checkpoint(Path(temporary))
        text = latency_gpu.profile(checkpoint, size, arguments.batch[0], device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path: Path = arguments.output / f"profile-{device}-{arguments.batch[0]}x{size[0]}x{size[1]}.txt"
    path.write_text(text + "\n")
    return path


def write_report(results: dict[str, Any], settings: dict[str, Any], folder: Path) -> Path:
    """Write JSON, Markdown and a plot into `folder` and return the Markdown file."""
    about = machine()
    packages = {name: value for name, value in versions().items() if value}
    folder.mkdir(parents=True, exist_ok=True)
    document = {"machine": about, "packages": packages, "settings": settings, "results": results}
    (folder / "latency.json").write_text(json.dumps(document, indent=2) + "\n")
    used = ", ".join(f"{name} {packages[name]}" for name in ("torch", "onnxruntime", "openvino") if name in packages)
    cpu = f"{about['processor']}, {about['cores']} cores ({' '.join(about['cpu_features'])})"
    text = f"# Latency\n\n{cpu}; {used}.\nWeights: {settings['weights']}. "
    text += f"{settings['rounds']} rounds, backends taking turns; made by `python benchmarks/latency.py`.\n\n"
    text += "\n\n".join(table(size, rows) for size, rows in results.items())
    (folder / "latency.md").write_text(text + "\n")
    plot(results, folder / "latency.png")
    return folder / "latency.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="default: the published sizes with random weights")
    parser.add_argument("--onnx", type=Path, help="default: exported from the checkpoint")
    parser.add_argument("--size", nargs="+", default=["256x256", "512x512"], metavar="HxW")
    parser.add_argument("--backend", nargs="+", help="only those whose name contains one of these, and the baseline")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU where one is")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="pictures at once, GPU only")
    parser.add_argument("--compile", action="store_true", help="torch.compile, which takes minutes; GPU only")
    parser.add_argument("--profile", action="store_true", help="instead: torch.profiler's table of the GPU's kernels")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds")
    parser.add_argument("--output", type=Path, default=Path("latency"), help="folder for the results [latency]")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, *next(sizes_of(arguments.size)), arguments.checkpoint, arguments.onnx)
        return
    if arguments.profile:
        print(run_profile(arguments))
        return
    if arguments.device == "cuda" or (arguments.device == "auto" and gpus()):
        print(run_on_gpu(arguments))
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or random_checkpoint(Path(folder))
        results = run_all(arguments, checkpoint, arguments.onnx or export(checkpoint, Path(folder)))
    settings = {
        "weights": arguments.checkpoint.name if arguments.checkpoint else "misf (published sizes), random weights",
        "rounds": arguments.rounds,
        "warm_up_rounds": arguments.warm_up,
        "batch": 1,
    }
    print(write_report(results, settings, arguments.output))


if __name__ == "__main__":
    main()
