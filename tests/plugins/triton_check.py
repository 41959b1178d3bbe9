"""Triton's kernels against the reference in float64, on a GPU or, interpreted, on a CPU.

TRITON_INTERPRET=1 python -m tests.plugins.triton_check runs it in a separate process, because triton reads the variable
when it is imported.
"""

from __future__ import annotations

import torch
from torch import Tensor

from misf.plugins.dynamic_filter import triton_kernels
from misf.plugins.dynamic_filter.op import dynamic_filter

# N, C, H, W, K, R: one pixel, odd sizes, H different from W, groups of 1 to 4 channels, filter sizes 1, 3 and 5; the
# last two need several tiles of pixels and of groups.
CASES = (
    (1, 4, 1, 1, 3, 4),
    (2, 8, 5, 7, 3, 4),
    (2, 5, 6, 5, 5, 5),
    (2, 6, 3, 4, 1, 3),
    (1, 3, 9, 16, 3, 1),
    (1, 132, 1, 5, 1, 4),
)
# One rounding of float32 sums to the storage type.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 1e-3), torch.bfloat16: (1.6e-2, 1e-3)}
FORMATS = (torch.contiguous_format, torch.channels_last)


def tensors(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return random features, taps and gradient of the output."""
    n, channels, height, width, kernel_size, share = case
    generator = torch.Generator().manual_seed(sum(case))
    sizes = (channels, channels * kernel_size**2 // share, channels)
    features, taps, grad = (torch.randn(n, c, height, width, generator=generator).to(dtype) for c in sizes)
    return features, taps, grad


def check(case: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    """Compare output and gradients in both layouts; the gradient of the output is N,C,H,W."""
    kernel_size, share = case[4:]
    originals = tensors(case, dtype)
    exact = [tensor.double().requires_grad_() for tensor in originals[:2]]
    expected = dynamic_filter(exact[0], exact[1], kernel_size, share)
    expected_grads = torch.autograd.grad(expected, exact, originals[2].double())
    rtol, atol = TOLERANCE[dtype]
    for mine in FORMATS:
        features, taps = (tensor.to(device).contiguous(memory_format=mine) for tensor in originals[:2])
        grad = originals[2].to(device)
        output = triton_kernels.forward(features, taps, kernel_size, share)
        grads = triton_kernels.backward(grad, features, taps, kernel_size, share)
        for result, right, like in zip(
            (output, *grads), (expected.detach(), *expected_grads), (features, features, taps), strict=True
        ):
            assert (result.dtype, result.stride()) == (dtype, torch.empty_like(like).stride())
            torch.testing.assert_close(result.double().cpu(), right, rtol=rtol, atol=atol)


def main() -> None:
    for case in CASES:
        check(case, torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        check(CASES[1], dtype)
    print("all cases agree")


if __name__ == "__main__":
    main()
