"""Measures the limits of this GPU with a large copy and matrix products; other results are fractions of these.

python benchmarks/ceilings.py FOLDER        writes ceilings.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from kernel import Timer, copy_gb_per_s
from latency_gpu import board, matrix_tflops


def main() -> None:
    folder = Path(sys.argv[1])
    found = {"copy_gb_per_s": copy_gb_per_s(Timer("cuda", 20))}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):  # float32 without TF32, as is PyTorch's default
        found[f"{str(dtype).removeprefix('torch.')}_tflop_per_s"] = matrix_tflops(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ceilings.json").write_text(json.dumps({"machine": board(), **found}, indent=2) + "\n")
    print(", ".join(f"{name} {value:.0f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
