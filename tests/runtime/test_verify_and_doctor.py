"""misf-verify and misf-doctor: right numbers pass, wrong ones do not, and both say so to scripts."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from PIL import Image

from misf.plugins.dynamic_filter.onnx_op import one_node_model
from misf.plugins.shared.errors import MisfError
from misf.runtime.checks import accuracy, doctor
from misf.runtime.checks.verify_cli import main as verify


def invoke(command: Any, *arguments: str | Path) -> Any:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_compare_by_hand() -> None:
    image = np.full((1, 3, 2, 2), 0.5, np.float32)
    mask = np.array([[[[1, 0], [0, 0]]]], np.float32)

    def off_by(amount: float) -> accuracy.Inpaint:
        return lambda image, mask: (image + np.float32(amount) * mask).astype(np.float32)

    result = accuracy.compare(off_by(0.1), off_by(0), image, mask)
    assert result.max_abs == pytest.approx(0.1)
    assert result.mean_abs == pytest.approx(0.025)
    assert result.psnr_hole_db == pytest.approx(20.0, abs=1e-5)
    assert result.psnr_db == pytest.approx(20 + 10 * math.log10(4), abs=1e-5)
    assert accuracy.compare(off_by(0), off_by(0), image, mask).to_dict()["psnr_hole_db"] is None
    strict = accuracy.Tolerance(max_abs=0.05, min_psnr_db=30)
    assert len(result.faults(strict)) == 2
    changed = accuracy.compare(lambda image, _: image + np.float32(1e-6), off_by(0), image, mask)
    assert changed.faults(accuracy.Tolerance()) == ["1x2x2: known pixels were changed"]
    broken = accuracy.compare(off_by(math.nan), off_by(0), image, mask)
    assert not broken.finite
    # NaN compares false with everything: it must miss every tolerance, not pass it.
    assert len(broken.faults(strict)) == 4


def test_a_backend_that_fails_is_one_line() -> None:
    def crash(_image: object, _mask: object) -> Any:
        raise RuntimeError("bad\nnode")

    image, mask = np.zeros((1, 3, 4, 4), np.float32), np.ones((1, 1, 4, 4), np.float32)
    with pytest.raises(MisfError, match="the model fails at 1x4x4: bad node"):
        accuracy.compare(crash, lambda image, _: image, image, mask)


def test_a_float16_file_is_held_to_float16_whatever_computes_it() -> None:
    assert accuracy.tolerance("fp32", "fp16") == accuracy.TOLERANCES["fp16"]
    assert accuracy.tolerance("bf16", "fp32") == accuracy.TOLERANCES["bf16"]
    assert accuracy.tolerance("fp32", "fp32").max_abs == 1e-4


def test_unreadable_photograph_is_named(tmp_path: Path) -> None:
    (tmp_path / "torn.jpg").write_bytes((accuracy.SAMPLES / "chelsea.jpg").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"torn\.jpg cannot be read"):
        accuracy.load_photographs(tmp_path)


def test_photographs_of_16_bits_are_reduced_not_clipped(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    [picture] = accuracy.load_photographs(tmp_path)
    assert np.abs(picture - grey[:, :, None] / 257).max() <= 0.51


def test_cases_cover_what_the_gate_promises() -> None:
    shapes = [image.shape for image, _ in accuracy.cases(accuracy.load_photographs())]
    assert any(shape[0] > 1 for shape in shapes)
    assert any(shape[2] != shape[3] for shape in shapes)
    assert any(shape[2] % 4 for shape in shapes)
    for image, mask in accuracy.cases(accuracy.load_photographs()):
        assert image.std() > 0.1
        assert 0.05 < mask.mean() < 0.5
        assert set(np.unique(mask)) == {0.0, 1.0}


def test_verify_passes_and_reports(tiny_onnx: Path, tiny_checkpoint: Path) -> None:
    arguments = (tiny_onnx, "--checkpoint", tiny_checkpoint, "--backend", "onnxruntime")
    result = invoke(verify, *arguments, "--size", "64x80", "--size", "2x33x47", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["passed"]
    assert [case["size"] for case in report["cases"]] == ["1x64x80", "2x33x47"]
    assert report["tolerance"] == {"max_abs": 1e-4, "min_psnr_db": None}
    table = invoke(verify, *arguments, "--size", "64x80")
    assert "1x64x80" in table.stdout
    assert table.stdout.splitlines()[-1] == "passed (max_abs 0.0001)"
    # A gate that is named comes beside the other, not in its place.
    result = invoke(verify, *arguments, "--size", "64x80", "--min-psnr", "60", "--json")
    assert json.loads(result.stdout)["tolerance"] == {"max_abs": 1e-4, "min_psnr_db": 60}


def test_verify_refuses_another_model(tiny_onnx: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx)
    (head,) = (tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    head.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(head) * np.float32(1.05), head.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    arguments = ("--checkpoint", tiny_checkpoint, "--backend", "onnxruntime", "--size", "64x64")
    result = invoke(verify, tmp_path / "wrong.onnx", *arguments, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["passed"] is False
    assert "differs too much" in result.stderr
    loose = invoke(verify, tmp_path / "wrong.onnx", *arguments, "--min-psnr", "10", "--max-abs", "1")
    assert loose.exit_code == 0


def test_verify_changes_only_the_limit_that_is_given(tiny_onnx: Path, tiny_checkpoint: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(accuracy.TOLERANCES, "fp32", accuracy.Tolerance(min_psnr_db=1000.0))
    arguments = (tiny_onnx, "--checkpoint", tiny_checkpoint, "--backend", "onnxruntime", "--size", "64x64", "--json")
    result = invoke(verify, *arguments, "--max-abs", "0.5")
    assert json.loads(result.stdout)["tolerance"] == {"max_abs": 0.5, "min_psnr_db": 1000.0}
    assert result.exit_code == 3
    assert invoke(verify, *arguments, "--max-abs", "0.5", "--min-psnr", "20").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["absent.onnx", "--checkpoint", __file__], 2, "'absent.onnx' does not exist"),
        ([__file__, "--checkpoint", __file__, "--size", "0x64"], 2, "expected HxW"),
        ([__file__, "--checkpoint", __file__, "--device", "gpu"], 1, "unknown device"),
        ([__file__, "--checkpoint", __file__, "--backend", "foo"], 2, "'foo' is not one of"),
        ([__file__], 2, "--checkpoint"),
    ],
    ids=["no model", "size", "device", "backend", "no checkpoint"],
)
def test_verify_bad_arguments(arguments: list[str], code: int, message: str) -> None:
    result = invoke(verify, *arguments)
    assert result.exit_code == code
    assert message in result.stderr.splitlines()[-1]


def test_doctor_runs_the_op_everywhere() -> None:
    result = invoke(doctor.main, "--json")
    assert result.exit_code == 0, result.stdout
    report = json.loads(result.stdout)
    assert {"pytorch cpu", "onnxruntime cpu", "openvino cpu"} <= {check["backend"] for check in report["op"]}
    assert all(check["ok"] and check["max_abs"] < 1e-5 for check in report["op"])
    assert report["packages"]["numpy"] == np.__version__
    assert "onnxruntime cpu    ok" in invoke(doctor.main).stdout


def test_doctor_notices_wrong_numbers_and_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a filter that flips, and one that does not start."""
    right = doctor._torch_op("cpu")
    monkeypatch.setattr(doctor, "_torch_op", lambda _: lambda f, t: right(f, np.ascontiguousarray(t[:, ::-1])))

    def crash(_: str) -> Any:
        def run(_features: Any, _taps: Any) -> Any:
            raise RuntimeError("no such\nprovider")

        return run

    monkeypatch.setattr(doctor, "_onnxruntime_op", crash)
    result = invoke(doctor.main, "--json")
    assert result.exit_code == 1
    problems = {check["backend"]: check["problem"] for check in json.loads(result.stdout)["op"]}
    assert problems["pytorch cpu"].startswith("wrong numbers")
    assert problems["onnxruntime cpu"] == "RuntimeError: no such provider"
    assert problems["openvino cpu"] is None


def test_doctor_tells_of_a_backend_that_is_broken(tmp_path: Path) -> None:
    """Installed, and it cannot be imported: what doctor is asked about."""
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for command in (["checks.doctor", "--json"], ["run_cli", "misf-small", "a.png", "b.png"]):
        code = f"from misf.runtime.{command[0]} import main; main({command[1:]!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert "Traceback" not in done.stderr
        if command[-1] == "--json":
            assert done.returncode == 1
            problems = {check["backend"]: check["problem"] for check in json.loads(done.stdout)["op"]}
            assert "libcudart.so.13" in problems["onnxruntime cpu"]
            assert problems["pytorch cpu"] is None


def test_hidden_files_are_no_photographs(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")  # what a Mac puts beside it
    assert len(accuracy.load_photographs(tmp_path)) == 1


def test_doctor_runs_without_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # importing it now fails
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    result = invoke(doctor.main, "--json")
    assert result.exit_code == 0, result.output
    assert {check["backend"].split()[0] for check in json.loads(result.stdout)["op"]} == {"pytorch", "openvino"}


def test_doctor_loads_the_cuda_libraries_before_it_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them the provider of misf[gpu] never starts, whatever GPU there is."""
    loaded: list[str] = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: loaded.append("CUDA"))
    with pytest.raises(RuntimeError, match="listed but does not start"), pytest.warns(UserWarning, match="CUDAExec"):
        doctor._onnxruntime_op("CUDAExecutionProvider")(*doctor.op_inputs())
    assert loaded == ["CUDA"]


def test_doctor_names_two_onnx_runtimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip leaves when both packages are installed: a second distribution that says it owns the module."""
    assert doctor.onnx_runtime_problem() is None
    metadata = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    (metadata / "top_level.txt").write_text("onnxruntime\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = invoke(doctor.main)
    assert result.exit_code == 1
    assert "onnxruntime and onnxruntime-gpu overwrite each other: pip uninstall onnxruntime onnxr" in result.stdout


def test_shipped_op_model_is_what_the_code_makes() -> None:
    """After a change of the function body: onnx.save(one_node_model(8, 3, 4), "runtime/checks/op_check.onnx")."""
    assert onnx.load(doctor.OP_CHECK) == one_node_model(8, 3, 4)
