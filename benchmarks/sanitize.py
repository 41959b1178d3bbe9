"""Every CUDA kernel of the filter once, small, for compute-sanitizer to watch: see gpu_session.sh.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/sanitize.py

Nothing of torch's own computes on the GPU here: compute-sanitizer watches our kernels only, and would take what others
write for memory that nobody has written.
"""

from __future__ import annotations

import torch

from misf.plugins.dynamic_filter import cuda, dynamic_filter

# N, C, H, W, K, share: the two of the network, odd sizes, one pixel, the general kernels.
CASES = (
    (2, 32, 13, 24, 3, 4),
    (1, 3, 35, 66, 3, 1),
    (1, 3, 35, 72, 3, 1),
    (1, 8, 6, 7, 3, 1),
    (2, 20, 9, 10, 3, 4),
    (1, 4, 1, 1, 3, 4),
    (1, 5, 6, 7, 5, 5),
)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}


def main() -> None:
    runs = 0
    for dtype, tolerance in TOLERANCE.items():
        for n, channels, height, width, kernel_size, share in CASES:
            shapes = (channels, channels * kernel_size**2 // share, channels)
            cpu = [torch.randn(n, c, height, width).to(dtype) for c in shapes]
            expected = dynamic_filter(cpu[0].double(), cpu[1].double(), kernel_size, share)
            for memory_format in (torch.contiguous_format, torch.channels_last):
                features, taps, grad = (tensor.to(memory_format=memory_format).cuda() for tensor in cpu)
                for naive in (False, True):
                    output = cuda.forward(features, taps, kernel_size, share, naive=naive)
                    cuda.backward(grad, features, taps, kernel_size, share, naive=naive)
                    torch.testing.assert_close(output.cpu().double(), expected, rtol=tolerance, atol=tolerance)
                    runs += 1
    torch.cuda.synchronize()
    print(f"{runs} runs, forward and backward")


if __name__ == "__main__":
    main()
