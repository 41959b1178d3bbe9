"""misf-doctor: shows what this machine has, and checks the dynamic filter on every installed backend."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...plugins.shared.command import command, misf_version, one_line, print_json
from ...plugins.shared.errors import FAILURE
from ...plugins.shared.extras import is_installed, pip_install
from ..memory import usable_cores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .engine_checks import EngineCheck, PluginCheck

    Array = NDArray[np.float32]

# Names of packages, and the purpose of each.
PACKAGES = {
    "numpy": "runtime",
    "pillow": "runtime",
    "onnxruntime": "runtime on CPU: misf[cpu]",
    "onnxruntime-gpu": "runtime on NVIDIA GPUs: misf[gpu]",
    "openvino": "faster runtime on CPU",
    "torch": "checkpoints, export, training",
    "onnx": "export",
    "onnxscript": "export",
    "safetensors": "checkpoints",
    "tensorrt": "engines",
    "tensorrt-cu12": "engines",
    "tensorrt-cu13": "engines",
    "tensorrt-rtx-cu13": "engines for RTX GPUs",
}
OP_CHECK = Path(__file__).with_name("op_check.onnx")
TOLERANCE = 1e-4
"""Largest error of the op (9 products of unit-normal numbers): float32 reaches 1e-6, TF32 and bfloat16 would fail."""


@dataclass(frozen=True)
class OpCheck:
    """The result of the op on one backend: its largest error, or why it did not run."""

    backend: str
    max_abs: float | None
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the backend ran the op with correct results."""
        return self.problem is None and self.max_abs is not None and self.max_abs <= TOLERANCE


def op_inputs() -> tuple[Array, Array]:
    """Return the check's features 2,8,5,7 and taps 2,18,5,7 (kernel_size 3, share 4), float32."""
    import numpy as np

    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((2, 8, 5, 7), dtype=np.float32),
        rng.standard_normal((2, 18, 5, 7), dtype=np.float32),
    )


def expected_output(features: Array, taps: Array) -> NDArray[np.float64]:
    """Return the dynamic filter in float64 by definition (plugins/dynamic_filter/op.py), kernel_size 3, share 4."""
    import numpy as np

    height, width = features.shape[2:]
    padded = np.pad(features.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    output = np.zeros(features.shape)
    for channel in range(features.shape[1]):
        for tap in range(9):
            i, j = divmod(tap, 3)
            window = padded[:, channel, i : i + height, j : j + width]
            output[:, channel] += window * taps[:, (channel * 9 + tap) // 4]
    return output


def _torch_op(device: str) -> Callable[[Array, Array], Array]:
    def run(features: Array, taps: Array) -> Array:
        import torch

        from ...plugins.dynamic_filter.op import dynamic_filter

        f, t = (torch.from_numpy(array).to(device) for array in (features, taps))
        result: Array = dynamic_filter(f, t, 3, 4).cpu().numpy()
        return result

    return run


def _onnxruntime_op(provider: str) -> Callable[[Array, Array], Array]:
    def run(features: Array, taps: Array) -> Array:
        import onnxruntime

        from ..backends.onnx_runtime import CUDA, load_cuda_libraries

        if provider == CUDA:
            load_cuda_libraries()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(OP_CHECK), options, providers=[provider])
        if provider not in session.get_providers():
            raise RuntimeError(f"{provider} is listed but does not start: CUDA, cuDNN or the driver do not match")
        result: Array = session.run(None, {"features": features, "taps": taps})[0]
        return result

    return run


def _openvino_op(features: Array, taps: Array) -> Array:
    import onnx.inliner
    import openvino

    core = openvino.Core()
    inlined = onnx.inliner.inline_local_functions(onnx.load(OP_CHECK)).SerializeToString()
    model = core.compile_model(core.read_model(inlined, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result: Array = model({"features": features, "taps": taps})[0]
    return result


def op_checks() -> list[OpCheck]:
    """Return the checks of all backends on this machine."""
    found: dict[str, Callable[[Array, Array], Array]] = {}
    if is_installed("torch"):
        found["pytorch cpu"] = _torch_op("cpu")
        with contextlib.suppress(Exception):  # the check of the CPU reports it
            import torch

            if torch.cuda.is_available():
                found["pytorch cuda"] = _torch_op("cuda")
    if is_installed("onnxruntime"):
        found["onnxruntime cpu"] = _onnxruntime_op("CPUExecutionProvider")
        with contextlib.suppress(Exception):  # likewise
            import onnxruntime

            if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
                found["onnxruntime cuda"] = _onnxruntime_op("CUDAExecutionProvider")
    if is_installed("openvino") and is_installed("onnx"):
        found["openvino cpu"] = _openvino_op
    return [_check(name, run) for name, run in found.items()]


def _check(name: str, run: Callable[[Array, Array], Array]) -> OpCheck:
    import numpy as np

    features, taps = op_inputs()
    try:
        error = np.abs(run(features, taps) - expected_output(features, taps)).max()
    except Exception as problem:  # the user wants to know about any problem
        return OpCheck(name, None, f"{type(problem).__name__}: {one_line(problem)}")
    if not error <= TOLERANCE:
        return OpCheck(name, float(error), f"wrong numbers: error {error:.1e}, allowed {TOLERANCE:g}")
    return OpCheck(name, float(error))


def versions() -> dict[str, str | None]:
    """Return the installed version of each package that misf can use, None if it is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def onnx_runtime_problem() -> str | None:
    """Return a problem if several packages contain the module `onnxruntime`, where the last one installed wins."""
    owners = sorted(set(packages_distributions().get("onnxruntime", [])))
    if len(owners) < 2:
        return None
    names = " ".join(owners)
    return (
        f"{' and '.join(owners)} overwrite each other: pip uninstall {names}, "
        f"then {pip_install('cpu')}, or the extra gpu, not both"
    )


def machine() -> dict[str, Any]:
    """Return a description of this machine: system, processor with low-precision features, cores, GPUs with driver."""
    flags: set[str] = set()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    interesting = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimdhp", "bf16")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "processor": name,
        "cores": usable_cores(),
        "cpu_features": [flag for flag in interesting if flag in flags],
        "gpus": gpus(),
    }


def gpus() -> list[str]:
    """Return 'name, memory, driver, compute capability' of every NVIDIA GPU that nvidia-smi lists."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in result.stdout.splitlines() if line.strip()]


@command("misf-doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def main(as_json: bool) -> int:
    """Show what this machine has (versions, devices) and whether each backend computes the filter correctly.

    Exit code 1 if an installed backend fails or gives wrong numbers, or if two ONNX Runtimes are installed.

    \b
    Example:
        misf-doctor
    """
    from .engine_checks import engine_checks, plugin_checks

    checks, about, installed, conflict = op_checks(), machine(), versions(), onnx_runtime_problem()
    engines, plugins = engine_checks(OP_CHECK, *op_inputs(), expected_output), plugin_checks()
    if as_json:
        print_json(
            {
                "misf": misf_version(),
                "machine": about,
                "packages": installed,
                "onnx_runtime_problem": conflict,
                "op": [{**asdict(check), "ok": check.ok} for check in checks],
                "engines": [{**asdict(engine), "ok": engine.ok} for engine in engines],
                "plugins": [asdict(plugin) for plugin in plugins],
            }
        )
    else:
        _print(checks, about, installed, conflict)
        _print_engines(engines, plugins)
    fine = all(check.ok for check in checks) and all(engine.ok for engine in engines)
    return 0 if fine and not conflict and not any(plugin.problem for plugin in plugins) else FAILURE


def _print(
    checks: list[OpCheck], about: dict[str, Any], installed: dict[str, str | None], conflict: str | None
) -> None:
    click.echo(f"misf {misf_version()}, Python {about['python']} at {sys.executable}")
    click.echo(f"{about['system']}; {about['processor']}, {about['cores']} cores ({' '.join(about['cpu_features'])})")
    for gpu in about["gpus"] or ["none found (nvidia-smi)"]:
        click.echo(f"NVIDIA GPU: {gpu}")
    click.echo("\nPackages")
    for name, purpose in PACKAGES.items():
        click.echo(f"  {name:18} {installed[name] or '-':14} {purpose}")
    if conflict:
        click.echo(f"  FAILED: {conflict}")
    click.echo("\nThe dynamic filter against its definition")
    if not checks:
        click.echo(f"  no backend is installed: {pip_install('cpu')}, or the extra gpu for an NVIDIA GPU")
    for check in checks:
        verdict = f"ok, largest error {check.max_abs:.1e}" if check.ok else f"FAILED: {check.problem}"
        click.echo(f"  {check.backend:18} {verdict}")


def _print_engines(engines: list[EngineCheck], plugins: list[PluginCheck]) -> None:
    click.echo("\nEngines")
    for engine in engines:
        click.echo(f"  {engine.flavor:18} {engine.line()}")
    if not engines:
        click.echo("  neither TensorRT nor TensorRT for RTX is installed")
    for plugin in plugins:
        click.echo(f"  {'plugin library':18} {plugin.path} ({plugin.problem or plugin.about})")
    if not plugins:
        click.echo(f"  {'plugin library':18} none; build it with misf-plugin build (needs the CUDA toolkit)")
