"""A model repository for NVIDIA Triton: the network `misf`, and `misf_picture`, which accepts encoded pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..plugins.shared.errors import MisfError
from ..plugins.shared.extras import need
from ..plugins.shared.files import written_whole
from ..runtime.backends.contract import ENGINES
from ..runtime.engines.side_car import read_info, side_car

NETWORK, PICTURE = "misf", "misf_picture"
BACKENDS = ("auto", "onnxruntime", "tensorrt", "python")
LARGEST_BATCH = 8
"""Of an ONNX file, which takes any."""
MODEL_PY = "from misf.runtime.triton.{module} import TritonPythonModel  # noqa: F401\n"


def write_repository(folder: Path, model: Path, backend: str = "auto") -> list[Path]:
    """Write or replace version 1 of both models in `folder`, and return the files.

    Args:
        folder: the repository; other models in it are not touched.
        model: an .onnx file of misf-export or an engine of misf-build.
        backend: Triton backend for the network: "onnxruntime" or "tensorrt" to match the file ("auto"), or "python",
            which runs either file with misf's runtime. For "python" and for `misf_picture`, misf must be installed in
            the server's Python.

    Raises:
        MisfError: the backend cannot run the file, or the file has no metadata about its network.
        OSError: a file cannot be written.

    """
    need("--triton", "triton", "tritonclient", "google.protobuf")
    from google.protobuf import text_format

    engine = model.suffix.lower() in ENGINES
    chosen = backend if backend != "auto" else "tensorrt" if engine else "onnxruntime"
    if chosen != "python" and engine != (chosen == "tensorrt"):
        raise MisfError(
            f"Triton's backend {chosen} does not run {model.name}: leave out --triton-backend, or give python"
        )
    facts, batch = _facts(model, engine)
    name = model.name if chosen == "python" else "model.plan" if engine else "model.onnx"
    written = []
    for model_name, config, module in (
        (NETWORK, _network(chosen, name, batch), "network_model" if chosen == "python" else ""),
        (PICTURE, _picture(facts), "picture_model"),
    ):
        version = folder / model_name / "1"
        version.mkdir(parents=True, exist_ok=True)
        if module:
            written.append(_write(version / "model.py", MODEL_PY.format(module=module)))
        written.append(_write(folder / model_name / "config.pbtxt", text_format.MessageToString(config)))
    with written_whole(folder / NETWORK / "1" / name) as temporary:
        shutil.copyfile(model, temporary)
    if engine:
        shutil.copyfile(side_car(model), folder / NETWORK / "1" / f"{name}.json")
    return [*written, folder / NETWORK / "1" / name]


def _facts(model: Path, engine: bool) -> tuple[dict[str, Any], int]:
    """Return the facts about the network that `misf_picture` needs, and the largest batch."""
    if engine:
        info = read_info(model)
        if info.flavor != "tensorrt":
            raise MisfError(f"{model} is an engine of TensorRT for RTX, which Triton does not run")
        limits = [info.limits.min, info.limits.opt, info.limits.max]
        facts = {"precision": info.precision_obtained, "config": info.config, "limits": limits}
        return facts, info.limits.max[0]
    import onnx

    metadata = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    if "misf.config" not in metadata:
        raise MisfError(f"{model} was not written by misf-export: it has no metadata misf.config")
    config, precision = json.loads(metadata["misf.config"]), metadata.get("misf.precision", "fp32")
    return {"precision": precision, "config": config, "limits": None}, LARGEST_BATCH


def _network(backend: str, file: str, batch: int) -> Any:
    from tritonclient.grpc import model_config_pb2 as triton

    config = triton.ModelConfig(name=NETWORK, backend=backend, max_batch_size=batch)
    if backend != "python":
        config.default_model_filename = file
    for name, channels in (("image", 3), ("mask", 1)):
        config.input.add(name=name, data_type=triton.TYPE_FP32, dims=[channels, -1, -1])
    config.output.add(name="output", data_type=triton.TYPE_FP32, dims=[3, -1, -1])
    config.dynamic_batching.max_queue_delay_microseconds = 2000
    config.version_policy.latest.num_versions = 1
    config.instance_group.add(count=1, kind=triton.ModelInstanceGroup.KIND_AUTO)
    if backend == "tensorrt":
        config.optimization.cuda.graphs = True
    if backend == "python":
        config.parameters["file"].string_value = file
    warm = config.model_warmup.add(name="256x256", batch_size=1)
    for name, channels in (("image", 3), ("mask", 1)):
        warm.inputs[name].CopyFrom(
            triton.ModelWarmup.Input(data_type=triton.TYPE_FP32, dims=[channels, 256, 256], zero_data=True)
        )
    return config


def _picture(facts: dict[str, Any]) -> Any:
    from tritonclient.grpc import model_config_pb2 as triton

    config = triton.ModelConfig(name=PICTURE, backend="python", max_batch_size=0)
    for name in ("image", "mask"):
        config.input.add(name=name, data_type=triton.TYPE_STRING, dims=[1])
    config.output.add(name="output", data_type=triton.TYPE_STRING, dims=[1])
    config.version_policy.latest.num_versions = 1
    config.instance_group.add(count=4, kind=triton.ModelInstanceGroup.KIND_CPU)  # they wait for the network
    config.parameters["network"].string_value = NETWORK
    config.parameters["facts"].string_value = json.dumps(facts)
    return config


def _write(path: Path, text: str) -> Path:
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
