"""From checkpoint to verified picture on this machine's GPU, for all flavors and precisions; see gpu_session.sh."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from misf.export.engine.builder import EngineOptions, build_engine
from misf.export.exporter import export_onnx
from misf.plugins.shared.command import one_line
from misf.plugins.shared.errors import MisfError
from misf.runtime.backends import open_backend
from misf.runtime.checks import accuracy
from misf.runtime.engines.flavors import FLAVORS, installed
from misf.runtime.engines.side_car import Limits
from misf.training.model.checkpoint import build_model, load_checkpoint

WEIGHTS = Path(__file__).parent.parent / "training" / "weights" / "misf-small.safetensors"
LIMITS = Limits((1, 64, 64), (1, 256, 256), (2, 512, 512))


def main() -> int:
    """Return the number of engines that failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = load_checkpoint(WEIGHTS)
        reference = accuracy.torch_reference(build_model(checkpoint))
        for precision in ("fp32", "fp16"):
            source = folder / f"{precision}.onnx"
            export_onnx(checkpoint, source, precision)
            for flavor in filter(installed, FLAVORS):
                for without in (False, True):
                    title = f"{flavor} {precision} {'without' if without else 'with'} plugin"
                    if flavor == "tensorrt-rtx" and not without:
                        continue
                    try:
                        options = EngineOptions(backend=flavor, limits=LIMITS, without_plugin=without)
                        plan = build_engine(source, folder / "x.plan", options).path
                        try:
                            print(title, *_compared(plan, reference, precision), sep="\n  ")
                        finally:
                            print(f"  {_worst_layer(plan)}")
                    except (MisfError, ValueError, MemoryError) as error:
                        failed += 1
                        print(f"{title}: FAILED: {one_line(error)}")
    print(f"{failed} engines failed" if failed else "every engine agrees with PyTorch")
    return failed


def _compared(plan: Path, reference: accuracy.Inpaint, precision: str) -> list[str]:
    """Return a line for each size, run twice so that the CUDA graph runs too; MisfError if one is not accurate."""
    engine, lines = open_backend(plan), []
    for image, mask in accuracy.cases(accuracy.load_photographs(), accuracy.default_sizes(LIMITS)):
        for _ in range(3):
            result = accuracy.compare(engine, reference, image, mask)
            if faults := result.faults(accuracy.TOLERANCES[precision]):
                raise MisfError("; ".join(faults))
        lines.append(
            f"{result.size}: largest difference {result.max_abs:.1e}, {result.psnr_hole_db:.1f} dB in the hole"
        )
    return lines


def _worst_layer(plan: Path) -> str:
    """Return the result of misf-verify --layers in a new process, since Polygraphy uses one TensorRT per process."""
    command = [sys.executable, "-c", "from misf.runtime.checks.verify_cli import main; main()", plan, "--checkpoint"]
    done = subprocess.run([*map(str, command), str(WEIGHTS), "--layers"], capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("worst layer")]
    return (said or ["layers not compared: " + (done.stderr.splitlines() or ["no reason given"])[-1]])[0]


if __name__ == "__main__":
    sys.exit(main())
