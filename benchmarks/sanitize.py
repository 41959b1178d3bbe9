"""Runs every Triton kernel of the filter on small inputs under compute-sanitizer; see gpu_session.sh.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/sanitize.py

No kernels of PyTorch run on the GPU here: compute-sanitizer only watches our kernels, and would report memory that
others have written as uninitialised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from misf.plugins.dynamic_filter import dynamic_filter, triton_kernels

# N, C, H, W, K, share: the network's two filters, odd sizes, one pixel, another filter size.
CASES = ((2, 32, 13, 24, 3, 4), (1, 3, 35, 66, 3, 1), (2, 20, 9, 10, 3, 4), (1, 4, 1, 1, 3, 4), (1, 5, 6, 7, 5, 5))
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}


def padded(tensor: Tensor) -> Tensor:
    """Return N,C,H,W values as a view of N,H,W,C' with C' rounded up to 8, and NaN beyond C."""
    n, channels, height, width = tensor.shape
    whole = tensor.new_full((n, height, width, -(-channels // 8) * 8), float("nan"))
    whole[..., :channels] = tensor.permute(0, 2, 3, 1)
    return whole.cuda()[..., :channels].permute(0, 3, 1, 2)


LAYOUTS = (
    lambda tensor: tensor.cuda(),
    lambda tensor: tensor.contiguous(memory_format=torch.channels_last).cuda(),
    padded,
)


def main() -> None:
    runs = 0
    for dtype, tolerance in TOLERANCE.items():
        for n, channels, height, width, kernel_size, share in CASES:
            shapes = (channels, channels * kernel_size**2 // share, channels)
            cpu = [torch.randn(n, c, height, width).to(dtype) for c in shapes]
            expected = dynamic_filter(cpu[0].double(), cpu[1].double(), kernel_size, share)
            for laid in LAYOUTS:
                features, taps, grad = (laid(tensor) for tensor in cpu)
                output = triton_kernels.forward(features, taps, kernel_size, share)
                triton_kernels.backward(grad, features, taps, kernel_size, share)
                torch.testing.assert_close(output.cpu().double(), expected, rtol=tolerance, atol=tolerance)
                runs += 1
    torch.cuda.synchronize()
    print(f"{runs} runs, forward and backward")


if __name__ == "__main__":
    main()
