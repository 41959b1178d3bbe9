"""The op on CUDA tensors: checks that need no GPU, and (mark `gpu`) the kernels against the CPU reference."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from misf.plugins.dynamic_filter import dynamic_filter, op
from misf.plugins.shared.errors import AccuracyError

from ..conftest import load_benchmark

ROOT = Path(__file__).parents[2]
GPU_CASES = [
    (2, 256, 13, 24, 3, 4),
    (1, 20, 65, 33, 3, 4),
    (2, 3, 70, 264, 3, 1),
    (1, 5, 7, 7, 7, 49),
]


def needs_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("NOT PROVED: Triton's kernels were neither interpreted nor compiled: pip install triton")


@pytest.mark.slow
def test_the_kernels_interpreted() -> None:
    """Triton's interpreter runs the kernels on the CPU: output and gradients, layouts, types, awkward sizes."""
    needs_triton()
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.plugins.triton_check"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "all cases agree"


def compiled(kernel: Any, architecture: int, channels_last: bool, gradient: bool = False, far: bool = False) -> Any:
    """Compile a kernel for an absent GPU, for a call like that of MISF's feature filter in float16."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants: dict[str, Any] = {
        "kernel_size": 3,
        "share": 4,
        "period": 4,
        "block_groups": 32 if channels_last else 1,
        "block": 256,
    }
    constants |= {"index": tl.int64 if far else tl.int32, "gradient": gradient}
    unit = 1 if channels_last else 3  # the dimension of stride 1, which triton treats as a constant
    signature: dict[str, Any] = {}
    values: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    for place, name in enumerate(kernel.arg_names):
        if place < 3:
            signature[name] = "*fp16"
            hints[(place,)] = [["tt.divisibility", 16]]
        elif name.endswith("_stride"):
            signature[name] = tuple("constexpr" if i == unit else "i64" if far else "i32" for i in range(4))
            values[(place, unit)] = 1
            hints |= {(place, i): [["tt.divisibility", 16]] for i in range(4) if i != unit}
        elif name in constants:
            signature[name] = "constexpr"
            values[(place,)] = constants[name]
        else:
            signature[name] = "i32"
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, hints)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_the_kernels_compile_for_gpus(architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It compiles to machine code without shared memory, so that no values move between threads."""
    needs_triton()
    from misf.plugins.dynamic_filter import triton_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fours = compiled(kernels.misf_filter_fours, architecture, True)
    planar = compiled(kernels.misf_filter, architecture, False)
    others = [compiled(kernels.misf_filter_fours, architecture, True, gradient=True)]
    others += [compiled(kernels.misf_filter, architecture, False, gradient=True)]
    others += [compiled(kernels.misf_grad_taps, architecture, last, gradient=True) for last in (False, True)]
    others += [compiled(kernels.misf_filter, architecture, False, far=True)]
    for made in (fours, planar, *others):
        assert made.asm["cubin"][:4] == b"\x7fELF"
        assert made.metadata.shared == 0
    # Two outputs per thread: the taps of adjacent pixels are read together, as are the four features of a group.
    assert planar.asm["ptx"].count("ld.global.b32") >= 9
    assert fours.asm["ptx"].count("ld.global.v2.b32") == 2 * 9
    assert fours.asm["ptx"].count("ld.global.b16") == 2 * 9


def test_importing_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None\nimport misf.plugins.dynamic_filter.op"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_triton_it_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    op._triton.cache_clear()
    try:
        with pytest.warns(UserWarning, match="pip install triton"):
            assert not op._triton()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not op._triton()
    finally:
        op._triton.cache_clear()


def test_what_the_kernels_take() -> None:
    needs_triton()
    from misf.plugins.dynamic_filter.triton_kernels import serves

    assert serves(torch.zeros(1, dtype=torch.bfloat16), 3, 4)
    assert not serves(torch.zeros(1, dtype=torch.float64), 3, 4)
    assert not serves(torch.zeros(1), 3, 64)  # 64 channels x 9 products, unrolled


# ---- benchmarks/kernel.py -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load_benchmark("kernel")


def test_the_benchmark_counts_bytes_and_checks_results(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "COPY_BYTES", {"cpu": 1 << 20})
    bench = benchmark.Bench("cpu", 3)
    methods = {"ours": dynamic_filter, "official": benchmark.stacked, "unfold": benchmark.unfolded}
    monkeypatch.setattr(bench, "_methods", lambda _case, _dtype: methods)
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


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernels_agree_with_the_cpu(dtype: torch.dtype) -> None:
    from .triton_check import CASES, check

    for case in [*CASES, *GPU_CASES] if dtype == torch.float32 else GPU_CASES[:3]:
        check(case, dtype, "cuda")


@pytest.mark.gpu
def test_tuned_kernels_agree_with_the_cpu() -> None:
    """A call that is large enough for block sizes to be tuned."""
    from .triton_check import check

    check((2, 64, 192, 192, 3, 4), torch.float16, "cuda")


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """Channels that are 2^30 elements apart, in 8 GiB of mostly unused memory."""
    from .triton_check import tensors

    features, taps, _grad = tensors((1, 4, 3, 5, 3, 4), torch.float16)
    far = torch.empty(3 * 2**30 + 15, dtype=torch.float16, device="cuda").as_strided(features.shape, (0, 2**30, 5, 1))
    far.copy_(features)
    expected = dynamic_filter(features, taps, 3, 4)
    torch.testing.assert_close(dynamic_filter(far, taps.cuda(), 3, 4).cpu(), expected, rtol=2e-3, atol=1e-3)


@pytest.mark.gpu
def test_the_op_uses_the_kernels() -> None:
    """The public function: gradients, opcheck, odd strides, another stream, an unaligned view, a CUDA graph."""
    from misf.plugins.dynamic_filter import triton_kernels

    from .triton_check import tensors

    features, taps, grad = (tensor.cuda() for tensor in tensors((2, 8, 9, 12, 3, 4), torch.float32))
    features.requires_grad_()
    taps.requires_grad_()
    output = dynamic_filter(features, taps, 3, 4)
    torch.testing.assert_close(output, triton_kernels.forward(features.detach(), taps.detach(), 3, 4), rtol=0, atol=0)
    grads = torch.autograd.grad(output, (features, taps), grad)
    expected = triton_kernels.backward(grad, features.detach(), taps.detach(), 3, 4)
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
    from .triton_check import tensors

    features, taps, _grad = (tensor.cuda() for tensor in tensors((1, 8, 6, 5, 3, 4), torch.float16))
    compiled = torch.compile(lambda x, k: dynamic_filter(x * 2, k, 3, 4) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(features, taps), dynamic_filter(features * 2, taps, 3, 4) + 1)
