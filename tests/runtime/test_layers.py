"""misf-verify --layers: the layer that is wrong is the layer that is named; PyTorch and numbers by hand judge."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper

pytest.importorskip("polygraphy")

from misf.export.exporter import export_onnx
from misf.plugins.shared.errors import EnvironmentMismatch, MisfError
from misf.plugins.shared.files import sha256
from misf.runtime.checks import accuracy
from misf.runtime.checks import layer_errors as layers
from misf.runtime.checks.verify_cli import furthest
from misf.runtime.checks.verify_cli import main as verify
from misf.training import load_model
from misf.training.model.checkpoint import load_checkpoint

CONVOLUTIONS = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)


def run(model: Path, checkpoint: Path, *options: str) -> Any:
    arguments = [model, "--checkpoint", checkpoint, "--size", "48x64", "--layers", *options]
    return CliRunner().invoke(verify, [str(argument) for argument in arguments])


def test_filters_that_are_inlined_are_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = export_onnx(load_checkpoint(tiny_checkpoint), tmp_path / "inlined.onnx", inline=True).path
    result = run(path, tiny_checkpoint)
    assert result.exit_code == 1
    assert "without --inline-functions" in result.stderr


def scaled(source: Path, target: Path, weight: str, factor: float) -> Path:
    """Return a copy of a file in which one weight is `factor` times what it was."""
    model = onnx.load(source)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name.startswith(weight))
    before = numpy_helper.to_array(tensor)
    values = (before.astype(np.float32) * factor).astype(before.dtype)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, target)
    return target


def test_the_shipped_network_has_fixed_convolutions_that_are_no_layers(tmp_path: Path) -> None:
    checkpoint = Path(__file__).parents[2] / "training" / "weights" / "misf-small.safetensors"
    export_onnx(load_checkpoint(checkpoint), tmp_path / "small.onnx")
    result = run(tmp_path / "small.onnx", checkpoint, "--json")
    assert result.exit_code == 0, result.stderr
    names = [layer["name"] for layer in json.loads(result.stdout)["layers"]]
    trained = [name for name, module in load_model(checkpoint).named_modules() if isinstance(module, CONVOLUTIONS)]
    assert sorted(names) == sorted([*trained, "feature_filter", "image_filter"])


def test_numbers_by_hand() -> None:
    reference = {"a": np.array([3.0, -4.0]), "b": np.array([1.0, 1.0]), "c": np.array([0.0, 2.0])}
    found = {"a": np.array([3.0, -4.5]), "b": np.array([1.0, 2.0]), "c": np.array([0.0, 3.0])}
    feeds: dict[str, list[str]] = {"a": [], "b": ["a"], "c": ["a", "b"]}
    results = layers.compare_layers(reference, found, feeds, dict.fromkeys(reference, "Conv"))
    assert [result.name for result in results] == ["a", "b", "c"]
    # rms(difference) / rms(reference): 0.5/5, 1/sqrt(2), 1/2 (the square roots of the counts cancel).
    assert [result.relative_error for result in results] == pytest.approx([0.1, math.sqrt(0.5), 0.5])
    assert [result.added for result in results] == pytest.approx([0.1, math.sqrt(0.5) - 0.1, 0.5 - math.sqrt(0.5)])
    assert [(result.max_abs, result.largest) for result in results] == [(0.5, 4.0), (1.0, 1.0), (1.0, 2.0)]
    assert layers.worst(results).name == "b"


def test_the_first_layer_that_is_not_finite_is_the_worst() -> None:
    reference = {name: np.ones(2) for name in "abc"}
    found = {"a": np.ones(2), "b": np.array([np.inf, 1]), "c": np.full(2, np.nan)}
    results = layers.compare_layers(
        reference, found, {"a": [], "b": ["a"], "c": ["b"]}, dict.fromkeys(reference, "Conv")
    )
    assert layers.worst(results).name == "b"
    document = layers.layers_document(results)
    assert document["worst_layer"] == "b"
    assert [row["relative_error"] for row in document["layers"]] == [0.0, None, None]
    assert "NaN" not in json.dumps(document)
    assert "Infinity" not in json.dumps(document)


def test_the_size_that_is_furthest_off_is_looked_into() -> None:
    def case(psnr_db: float, max_abs: float = 0.0, finite: bool = True) -> accuracy.CaseResult:
        return accuracy.CaseResult("", finite, True, max_abs, 0.0, psnr_db, psnr_db)

    strict = accuracy.Tolerance(max_abs=1e-4)
    assert furthest([case(60), case(50), case(70)], strict) == 1
    assert furthest([case(60), case(math.nan, math.nan, False), case(55)], strict) == 1
    assert furthest([case(90), case(95, 1e-3)], strict) == 1  # the one that misses, though its PSNR is better
    assert furthest([case(math.inf), case(math.inf)], strict) == 0


def test_the_verdict_comes_out_whatever_happens_inside(
    tiny_onnx: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MisfError("cannot look inside")

    monkeypatch.setattr(layers, "model_layers", fails)
    right = run(tiny_onnx, tiny_checkpoint, "--json")
    assert (right.exit_code, json.loads(right.stdout)["passed"]) == (1, True)
    assert right.stderr.splitlines()[-1].endswith("cannot look inside")
    wrong = run(scaled(tiny_onnx, tmp_path / "wrong.onnx", "head.weight", -1), tiny_checkpoint, "--json")
    assert (wrong.exit_code, json.loads(wrong.stdout)["passed"]) == (3, False)
    assert "cannot look inside" in wrong.stderr
    assert "differs too much" in wrong.stderr.splitlines()[-1]


def test_without_polygraphy_it_is_told_at_once(
    tiny_onnx: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "polygraphy" else found(name))
    result = run(tiny_onnx, tiny_checkpoint)
    assert (result.exit_code, result.stdout) == (4, "")
    assert "[export]'" in result.stderr.splitlines()[-1]


def test_layers_of_another_network_are_told() -> None:
    with pytest.raises(MisfError, match=r"\(b, c\)"):
        layers.compare_layers({"a": np.ones(1), "b": np.ones(1)}, {"a": np.ones(1), "c": np.ones(1)}, {}, {})
    with pytest.raises(MisfError, match=r"layer a outputs \(1,\), but \(2,\) in the checkpoint's network"):
        layers.compare_layers({"a": np.ones(2)}, {"a": np.ones(1)}, {"a": []}, {"a": "Conv"})


def test_every_layer_of_pytorch_is_compared(tiny_onnx: Path, tiny_checkpoint: Path) -> None:
    result = run(tiny_onnx, tiny_checkpoint, "--json")
    assert result.exit_code == 0, result.stderr
    rows = {row["name"]: row for row in json.loads(result.stdout)["layers"]}
    network = load_model(tiny_checkpoint)
    convolutions = {
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
    }
    assert set(rows) == {*convolutions, "feature_filter", "image_filter"}
    assert max(row["relative_error"] for row in rows.values()) < 1e-4
    # The reference is what PyTorch really computes: its first layer, by hand.
    image, mask = next(accuracy.cases(accuracy.load_photographs(), [(1, 48, 64)]))
    stem = layers.reference_layers(network, image, mask)["stem"]
    x = torch.cat([torch.from_numpy(image) * (1 - torch.from_numpy(mask)), torch.from_numpy(mask)], dim=1)
    x = torch.nn.functional.pad(x, (3, 3, 3, 3), mode="reflect")
    wanted = torch.nn.functional.conv2d(x, network.stem.weight, network.stem.bias)
    np.testing.assert_allclose(stem, wanted.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("layer", ["middle.1.conv1", "prediction.image_taps"])
def test_the_layer_with_wrong_weights_is_named(
    layer: str, tiny_onnx: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    wrong = scaled(tiny_onnx, tmp_path / "wrong.onnx", f"{layer}.weight", -1)
    result = run(wrong, tiny_checkpoint, "--json")
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert document["worst_layer"] == layer
    table = run(wrong, tiny_checkpoint)
    assert f"worst layer: {layer}" in table.stdout
    assert table.exit_code == 3


def test_float16_that_overflows_is_found_where_it_starts(
    tiny_checkpoint: Path, tiny_fp16: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source, _report = tiny_fp16
    weight = "prediction.down.1.0.weight"
    (tensor,) = (tensor for tensor in onnx.load(source).graph.initializer if tensor.name.startswith(weight))
    largest = float(np.abs(numpy_helper.to_array(tensor)).max())
    broken = scaled(source, tmp_path / "broken.onnx", weight, 6e4 / largest)
    document = json.loads(run(broken, tiny_checkpoint, "--json").stdout)
    assert document["worst_layer"] == "prediction.down.1.0"
    rows = {row["name"]: row["relative_error"] for row in document["layers"]}
    assert rows["prediction.down.1.0"] is None  # infinite
    assert rows["prediction.down.0.0"] < 1e-2


def test_feeding_layers_look_through_what_is_between(tiny_onnx: Path) -> None:
    feeds = layers.feeding_layers(onnx.load(tiny_onnx))
    assert feeds["stem"] == []
    assert feeds["feature_filter"] == ["down.1", "prediction.feature_taps"]
    assert feeds["middle.0.conv1"] == ["feature_filter"]
    assert feeds["image_filter"] == ["head", "prediction.image_taps"]


def test_what_cannot_be_looked_into_is_told(tiny_checkpoint: Path, tiny_onnx: Path) -> None:
    result = run(tiny_checkpoint, tiny_checkpoint)
    assert result.exit_code == 2
    assert "--layers works with .onnx and .plan files, and tiny.safetensors is neither" in result.stderr
    result = run(tiny_onnx, tiny_checkpoint, "--backend", "openvino")
    assert result.exit_code == 2
    assert "--backend onnxruntime" in result.stderr


def test_an_engine_needs_the_file_it_was_built_of(tiny_plan: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    for path in (tiny_plan, tiny_plan.with_name("tiny.plan.json")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    plan, source = tmp_path / "tiny.plan", tmp_path / "tiny.onnx"
    with pytest.raises(EnvironmentMismatch, match=r"was built, but tiny\.onnx \(sha256 .*\) is not beside it"):
        layers.source_of(plan)
    source.write_bytes(b"another")
    with pytest.raises(EnvironmentMismatch, match=r"is not beside it"):
        layers.source_of(plan)
    source.write_bytes(tiny_onnx.read_bytes())
    assert layers.source_of(plan) == source


BUILD = """
import sys, numpy as np, onnx, tensorrt_rtx as trt
from misf.plugins.dynamic_filter.onnx_op import for_tensorrt
from misf.runtime.checks import layer_errors as layers
from misf.runtime.engines.flavors import load_flavor
model = onnx.load(sys.argv[1])
outputs = [node.output[0] for node in layers.layer_nodes(model).values()]
feeds = {"image": np.zeros((1, 3, 48, 64), np.float32), "mask": np.zeros((1, 1, 48, 64), np.float32)}
loader = layers.marked_engine(load_flavor("tensorrt-rtx"), for_tensorrt(model, False), outputs, feeds)
_, network, _ = loader._network()
found = [network.get_output(index).name for index in range(network.num_outputs)]
assert sorted(found) == sorted(outputs), (found, outputs)
print(len(found), bytes(loader())[:4].decode())
"""


def test_an_engine_with_its_layers_marked_is_really_built(tiny_onnx: Path) -> None:
    """By TensorRT for RTX, in a process of its own: Polygraphy chooses its TensorRT when it is imported."""
    pytest.importorskip("tensorrt_rtx")
    done = subprocess.run([sys.executable, "-c", BUILD, str(tiny_onnx)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    count, magic = done.stdout.split()[-2:]
    assert int(count) == len(layers.layer_nodes(onnx.load(tiny_onnx)))
    assert magic.encode() in (b"ftrt", b"vtrt")


BROKEN = """
import sys, numpy as np
from misf.runtime.checks import layer_errors as layers
from misf.plugins.shared.errors import MisfError
image, mask = np.zeros((1, 3, 48, 64), np.float32), np.zeros((1, 1, 48, 64), np.float32)
try:
    layers.model_layers(__import__("pathlib").Path(sys.argv[1]), "cuda:0", image, mask)
except MisfError as error:
    print(error)
"""


def test_tensorrts_own_reason_is_told(tiny_plan: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    """An engine whose ONNX file TensorRT for RTX does not parse: its words, one line, nothing else on the terminal."""
    model = onnx.load(tiny_onnx)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    values = np.ascontiguousarray(numpy_helper.to_array(weight)[:, :-1])  # a channel too few
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "tiny.onnx")
    plan = tmp_path / "tiny.plan"
    plan.write_bytes(tiny_plan.read_bytes())
    side_car = json.loads(tiny_plan.with_name("tiny.plan.json").read_text())
    side_car["onnx_sha256"] = sha256(tmp_path / "tiny.onnx")
    plan.with_name("tiny.plan.json").write_text(json.dumps(side_car))
    done = subprocess.run([sys.executable, "-c", BROKEN, str(plan)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "does not run with its layers marked" in line
    assert re.search(r"head|channel|dimension|kernel", line, re.IGNORECASE)
    assert "[!]" not in done.stderr
