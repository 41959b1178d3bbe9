"""The op on CUDA tensors: what can be shown without a GPU, and (mark `gpu`) the kernels against the CPU reference."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from misf.plugins.dynamic_filter import cuda, dynamic_filter
from misf.plugins.dynamic_filter.cuda import Layout, Pass
from misf.plugins.shared.errors import AccuracyError

from ..conftest import load_benchmark

TYPES = [torch.float32, torch.float16, torch.bfloat16]
# One rounding to the storage type of sums that are made in float32.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 1e-3), torch.bfloat16: (1.6e-2, 1e-3)}
# N, C, H, W, K, R: fast kernels with every access width, and the fallback
CASES = [
    (1, 4, 1, 1, 3, 4),
    (2, 256, 13, 24, 3, 4),
    (1, 20, 65, 33, 3, 4),
    (3, 64, 9, 10, 3, 4),
    (2, 3, 70, 264, 3, 1),
    (1, 40, 5, 7, 3, 1),
    (2, 5, 6, 5, 5, 5),
]


def needs_nvrtc() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not cuda.available():
            pytest.skip("NOT PROVED: NVRTC did not compile the CUDA kernels: pip install 'misf[cuda]'")


def test_importing_needs_no_cuda() -> None:
    """Neither a GPU nor the extra: op and cuda.py import without NVIDIA's packages."""
    code = (
        "import sys; sys.modules['cuda'] = sys.modules['cuda.core'] = None\n"
        "import misf.plugins.dynamic_filter.op, misf.plugins.dynamic_filter.cuda"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_extra_it_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)  # type: ignore[arg-type]
    cuda.available.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"pip install 'misf\[cuda\]'"):
            assert not cuda.serves(torch.zeros(1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not cuda.serves(torch.zeros(1))
    finally:
        cuda.available.cache_clear()
    assert not cuda.serves(torch.zeros(1, dtype=torch.float64))


def test_the_launch_passes_pointers_and_shape_by_address() -> None:
    """The array that cuLaunchKernel takes; test_kernel_host.py runs the kernels through the same array."""
    shape = cuda.call_shape((2, 8, 5, 7), 3, 4)
    arguments, _alive = cuda.launch_arguments((16, 32, 48), shape)
    assert [ctypes.c_void_p.from_address(arguments[i]).value for i in range(3)] == [16, 32, 48]
    passed = cuda.Shape.from_address(arguments[3])
    assert (passed.batch, passed.channels, passed.height, passed.width) == (2, 8, 5, 7)
    assert (passed.tap_channels, passed.kernel_size, passed.share) == (18, 3, 4)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvrtc_compiles(architecture: str) -> None:
    """One kernel of each kind, with the name that a launch would ask for; needs no GPU."""
    needs_nvrtc()
    shape = cuda.call_shape((1, 256, 64, 64), 3, 4)
    names = {
        cuda.plan(Pass.FORWARD, Layout.CHANNELS_LAST, shape, torch.float16).kernel,
        cuda.plan(Pass.GRAD_TAPS, Layout.PLANAR, shape, torch.bfloat16).kernel,
        cuda.plan(Pass.GRAD_FEATURES, Layout.CHANNELS_LAST, shape, torch.float32, naive=True).kernel,
    }
    assert names == {
        "misf::forwardChannelsLast<__half, 3, 4, 16, 8>",
        "misf::gradTapsPlanar<__nv_bfloat16, 3, 4, 8>",
        "misf::gradFeaturesNaive<float, true>",
    }
    for name in names:
        code = cuda.compile_kernel(name, architecture)
        assert bytes(code.code).startswith(b"\x7fELF")
        assert name in code.symbol_mapping


def test_missing_cuda_headers_are_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs_nvrtc()
    monkeypatch.setattr("cuda.pathfinder.find_nvidia_header_directory", lambda _name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(cuda.EnvironmentMismatch, match="pip install nvidia-cuda-runtime"):
        cuda.compile_kernel("misf::forwardNaive<float, false>", "sm_80")


# ---- benchmarks/kernel.py -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load_benchmark("kernel")


def test_the_benchmark_counts_bytes_and_checks_results(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "COPY_BYTES", {"cpu": 1 << 20})
    bench = benchmark.Bench("cpu", 3)
    methods = {"ours": dynamic_filter, "official": benchmark.stacked, "unfold": benchmark.unfolded}
    monkeypatch.setattr(bench, "_methods", lambda: methods)
    case = benchmark.Case("features", 2, 8, 6, 4)
    bench.forward(case, torch.float32)
    bench.backward(case, torch.float32)
    assert [row.method for row in bench.rows[:4]] == ["ours", "official", "unfold", "ours"]
    picture = 2 * 6 * 6 * 4
    assert {row.floor_bytes for row in bench.rows[:4]} == {picture * (8 + 18 + 8)}
    assert {row.floor_bytes for row in bench.rows[4:]} == {picture * (3 * 8 + 2 * 18)}
    row = bench.rows[1]
    assert row.times_official == 1
    assert row.gb_per_s == pytest.approx(row.floor_bytes / row.time_ms / 1e6)
    table = benchmark.markdown(bench.rows, bench.copy, {"gpus": []})
    assert table.count("| features | 2x8x6x6 |") == len(bench.rows)

    methods["official"] = lambda f, t, k, s: benchmark.stacked(f, t, k, s) * 1.01
    with pytest.raises(AccuracyError, match="a result is wrong"):
        bench.forward(case, torch.float32)


def test_every_geometry_that_is_tuned_covers_the_output(benchmark: Any) -> None:
    """Blocks times what a block makes is at least the output, and the default comes first."""
    case = benchmark.Case("features", 64, 256, 64, 4)
    shape = cuda.call_shape((64, 256, 64, 64), 3, 4)
    for layout, threads_for in ((Layout.PLANAR, 64), (Layout.CHANNELS_LAST, 0)):
        default = cuda.plan(Pass.FORWARD, layout, shape, torch.float16)
        found = list(benchmark.geometries(default, case, 2))
        assert found[0] is default
        assert len(found) > 3
        for call in found:
            s = call.shape
            rows = cuda.THREADS >> (s.group_bits + s.column_bits)
            width = call.width if layout is Layout.PLANAR else 1
            assert s.column_tiles * (width << s.column_bits) >= 64
            assert s.row_tiles * rows >= 64
            assert call.grid[0] == s.column_tiles * s.row_tiles * 64
            per_thread = 0 if layout is Layout.PLANAR else int(call.kernel.split(", ")[3])
            assert call.grid[1] == (threads_for or -(-256 // (per_thread << s.group_bits)))


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def tensors(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n, channels, height, width, kernel_size, share = case
    generator = torch.Generator().manual_seed(sum(case))
    sizes = (channels, channels * kernel_size**2 // share, channels)
    features, taps, grad = (torch.randn(n, c, height, width, generator=generator).to(dtype) for c in sizes)
    return features, taps, grad


@pytest.mark.gpu
@pytest.mark.parametrize("naive", [False, True], ids=["fast", "naive"])
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["planar", "channels_last"]
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_kernels_agree_with_the_cpu(dtype: torch.dtype, memory_format: torch.memory_format, naive: bool) -> None:
    for case in CASES:
        kernel_size, share = case[4:]
        features, taps, grad = tensors(case, dtype)
        exact = [tensor.double().requires_grad_() for tensor in (features, taps)]
        expected = dynamic_filter(exact[0], exact[1], kernel_size, share)
        expected_grads = torch.autograd.grad(expected, exact, grad.double())
        on_gpu = [tensor.cuda().to(memory_format=memory_format) for tensor in (features, taps, grad)]
        output = cuda.forward(on_gpu[0], on_gpu[1], kernel_size, share, naive=naive)
        grads = cuda.backward(on_gpu[2], on_gpu[0], on_gpu[1], kernel_size, share, naive=naive)
        rtol, atol = TOLERANCE[dtype]
        for ours, theirs in zip((output, *grads), (expected.detach(), *expected_grads), strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double().cpu(), theirs, rtol=rtol, atol=atol)
        assert output.stride() == torch.empty_like(on_gpu[0]).stride()


@pytest.mark.gpu
def test_the_op_uses_the_kernels() -> None:
    """Through the public function: gradients, opcheck, odd strides, another stream, an unaligned view, a graph."""
    features, taps, grad = (tensor.cuda() for tensor in tensors((2, 8, 9, 12, 3, 4), torch.float32))
    features.requires_grad_()
    taps.requires_grad_()
    output = dynamic_filter(features, taps, 3, 4)
    torch.testing.assert_close(output, cuda.forward(features.detach(), taps.detach(), 3, 4), rtol=0, atol=0)
    grads = torch.autograd.grad(output, (features, taps), grad)
    expected = cuda.backward(grad, features.detach(), taps.detach(), 3, 4)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.library.opcheck(torch.ops.misf.dynamic_filter, (features, taps, 3, 4))

    features, taps = features.detach(), taps.detach()
    expected_output = dynamic_filter(features.cpu(), taps.cpu(), 3, 4)
    odd = features.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    torch.testing.assert_close(dynamic_filter(odd, taps, 3, 4).cpu(), expected_output)
    shifted = torch.empty(features.numel() + 1, device="cuda")[1:].view_as(features).copy_(features)
    torch.testing.assert_close(dynamic_filter(shifted, taps, 3, 4).cpu(), expected_output)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = dynamic_filter(features, taps, 3, 4)
    stream.synchronize()
    torch.testing.assert_close(elsewhere.cpu(), expected_output)
    with torch.autocast("cuda", dtype=torch.float16):
        assert dynamic_filter(features, taps.half(), 3, 4).dtype == torch.float16
    assert dynamic_filter(features[:0], taps[:0], 3, 4).shape == (0, 8, 9, 12)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dynamic_filter(features, taps, 3, 4)
    captured.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(captured.cpu(), expected_output)


@pytest.mark.gpu
def test_compiled_model_on_the_gpu() -> None:
    features, taps, _grad = (tensor.cuda() for tensor in tensors((1, 8, 6, 5, 3, 4), torch.float16))
    compiled = torch.compile(lambda x, k: dynamic_filter(x * 2, k, 3, 4) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(features, taps), dynamic_filter(features * 2, taps, 3, 4) + 1)
