"""Finds the layer that is off: compares every convolution and filter with PyTorch's, for `misf-verify --layers`.

The reference is the network in float32 on the CPU, with hooks on its layers. The model's layers are marked as outputs
and run by Polygraphy, on ONNX Runtime or in an engine built for this purpose. They have the names of the checkpoint's
parameters, by which both are matched. Marking outputs changes what TensorRT fuses: an error caused by a fusion may
move or vanish.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...plugins.dynamic_filter import onnx_op
from ...plugins.shared.command import one_line
from ...plugins.shared.errors import EnvironmentMismatch, MisfError
from ...plugins.shared.files import sha256
from ..backends.contract import ENGINES, device_index
from ..engines.cudart import cudart_folders
from ..engines.flavors import Flavor, load_flavor, use_plugin
from ..engines.side_car import read_info
from .accuracy import Array

if TYPE_CHECKING:
    from onnx import ModelProto

log = logging.getLogger(__name__)

MEASURED = frozenset({"Conv", "ConvTranspose", onnx_op.OP_TYPE})
"""Ops of the ONNX nodes that count as layers: those with parameters, and the dynamic filter."""

Layers = dict[str, NDArray[Any]]
"""Name of a layer -> its output N,C,h,w."""


@dataclass(frozen=True)
class LayerResult:
    """How far a layer's output is from the reference's."""

    name: str
    """Name in the checkpoint (`middle.3.conv1`), or feature_filter, image_filter or filter."""
    op: str
    relative_error: float
    """Root mean square of the difference, divided by that of the reference; infinite if a value is not finite."""
    added: float
    """The relative error minus the largest one of the layers that feed it, which is what this layer added."""
    max_abs: float
    largest: float
    """Largest absolute value of the reference; the maximum of float16 is 65504."""


def compare_layers(
    reference: Layers, found: Layers, feeds: Mapping[str, Sequence[str]], ops: Mapping[str, str]
) -> list[LayerResult]:
    """Return a LayerResult for each layer of `found`, in its order.

    Args:
        reference, found: outputs by layer; `found` in the order of the graph.
        feeds: the layers that feed each layer (see `feeding_layers`).
        ops: the op of each layer.

    Raises:
        MisfError: the layers or their shapes differ from the reference's, because the model is another network.

    """
    if set(found) != set(reference):
        odd = ", ".join(sorted(set(found) ^ set(reference))[:4])
        if set(found) < set(reference) and all("filter" in name for name in set(reference) - set(found)):
            raise MisfError(
                f"the model's filters are no layers of its own ({odd}): export it without --inline-functions to compare"
            )
        raise MisfError(f"the model's layers are not those of the checkpoint's network ({odd}): give the right one")
    errors: dict[str, float] = {}
    results = []
    for name, values in found.items():
        wanted = reference[name].astype(np.float64)
        if values.shape != wanted.shape:
            raise MisfError(
                f"layer {name} outputs {values.shape}, but {wanted.shape} in the checkpoint's network: "
                "give the checkpoint of this model"
            )
        finite = bool(np.isfinite(values).all())
        difference = np.abs(values.astype(np.float64) - wanted) if finite else np.full(1, np.inf)
        scale = max(float(np.sqrt(np.square(wanted).mean())), float(np.finfo(np.float32).tiny))
        errors[name] = float(np.sqrt(np.square(difference).mean())) / scale
        before = max((errors[feeder] for feeder in feeds[name]), default=0.0)
        results.append(
            LayerResult(
                name=name,
                op=ops[name],
                relative_error=errors[name],
                added=errors[name] - before
                if np.isfinite(before)
                else 0.0,  # after the first non-finite layer, later ones are not blamed
                max_abs=float(difference.max()),
                largest=float(np.abs(wanted).max()),
            )
        )
    return results


def worst(results: Sequence[LayerResult]) -> LayerResult:
    """Return the layer that added most to the error, which is the one to look at first."""
    return max(results, key=lambda result: result.added)


def reference_layers(network: Any, image: Array, mask: Array) -> Layers:
    """Return the float32 output of each layer of a `misf.training` network for one batch, by its name in files."""
    import torch
    from torch import nn
    from torch.utils._python_dispatch import TorchDispatchMode

    found: Layers = {}
    filtered: list[NDArray[Any]] = []

    class WatchFilters(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch types its base loosely
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if func is torch.ops.misf.dynamic_filter.default:
                filtered.append(output.numpy().copy())
            return output

    def watch(name: str) -> Any:
        return lambda _module, _inputs, output: found.__setitem__(name, output.numpy().copy())

    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in network.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        with torch.no_grad(), WatchFilters():  # type: ignore[no-untyped-call]
            network(torch.from_numpy(image), torch.from_numpy(mask))
    finally:
        for hook in hooks:
            hook.remove()
    return {**found, **dict(zip(onnx_op.filter_names(len(filtered)), filtered, strict=True))}


def layer_nodes(model: ModelProto) -> dict[str, Any]:
    """Return the nodes of a misf-export file's layers by name, in graph order."""
    return {node.name: node for node in model.graph.node if _is_layer(node)}


def _is_layer(node: Any) -> bool:
    """Return whether a node is a filter, or a convolution with weights of the checkpoint."""
    if node.op_type not in MEASURED:
        return False
    return node.op_type == onnx_op.OP_TYPE or ".weight" in node.input[1]


def feeding_layers(model: ModelProto) -> dict[str, list[str]]:
    """Return, for each layer, the nearest preceding layers on all paths through the graph."""
    makers = {output: node for node in model.graph.node for output in node.output}

    def before(node: Any) -> Iterator[str]:
        waiting, seen = list(node.input), set()
        while waiting:
            name = waiting.pop()
            if name in seen or name not in makers:
                continue
            seen.add(name)
            maker = makers[name]
            if _is_layer(maker):
                yield maker.name
            else:
                waiting.extend(maker.input)

    return {name: sorted(before(node)) for name, node in layer_nodes(model).items()}


def model_layers(path: Path, device: str, image: Array, mask: Array) -> tuple[Layers, ModelProto]:
    """Return the output of each layer of a model file for one batch, and the model's ONNX graph.

    Args:
        path: an ONNX file, which runs on ONNX Runtime; or an engine. The ONNX file of an engine must be beside it; it
            is built again for this size, with its layers marked, by the same TensorRT and with the same plugin.
        device: the device of the model, "cpu" or "cuda:N".
        image, mask: as for `accuracy.Inpaint`.

    Raises:
        EnvironmentMismatch: the ONNX file of an engine is missing.
        MisfError: the marked model cannot be built or run; the message is Polygraphy's or the runtime's.

    """
    import onnx

    engine = path.suffix.lower() in ENGINES
    model = onnx.load(source_of(path))
    nodes = layer_nodes(model)
    outputs = [node.output[0] for node in nodes.values()]
    run = functools.partial(_on_tensorrt, path) if engine else _on_onnx_runtime
    if engine:
        _choose_tensorrt(load_flavor(read_info(path).flavor))
    with _heard() as errors:
        try:
            found = run(model, outputs, {"image": image, "mask": mask}, device)
        except MisfError:
            raise
        except Exception as error:  # exceptions of Polygraphy and the runtimes share no base class
            reason = f"{one_line(error)}: {errors[-1]}" if errors else one_line(error)
            raise MisfError(f"{path} does not run with its layers marked: {reason}") from error
    return {name: found[node.output[0]] for name, node in nodes.items()}, model


def source_of(path: Path) -> Path:
    """Return a model's ONNX file: itself or, for an engine, the file beside it; EnvironmentMismatch if missing."""
    if path.suffix.lower() not in ENGINES:
        return path
    info = read_info(path)
    source = path.parent / info.onnx
    if not source.is_file() or sha256(source) != info.onnx_sha256:
        raise EnvironmentMismatch(
            f"--layers needs the ONNX file from which {path} was built, but {info.onnx} "
            f"(sha256 {info.onnx_sha256[:12]}...) is not beside it: copy it there, or export and build again"
        )
    return source


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect the error messages of Polygraphy and TensorRT, one line each, instead of printing them."""
    from polygraphy.logger import G_LOGGER

    errors: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno < G_LOGGER.CRITICAL:  # critical ones also come as exceptions
                errors.append(" ".join(record.getMessage().split()))

    G_LOGGER.colors = G_LOGGER.letter = False
    G_LOGGER.module_severity = G_LOGGER.ERROR
    G_LOGGER.use_python_logging_system = True
    python_logger, listener = logging.getLogger("Polygraphy"), Listener()
    python_logger.addHandler(listener)
    propagate, python_logger.propagate = python_logger.propagate, False
    try:
        yield errors
    finally:
        python_logger.propagate = propagate
        python_logger.removeHandler(listener)
        G_LOGGER.use_python_logging_system = False


def _on_onnx_runtime(model: ModelProto, outputs: Sequence[str], feeds: Mapping[str, Array], device: str) -> Layers:
    from polygraphy.backend.onnx import modify_outputs
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    marked = modify_outputs(model, outputs=list(outputs), copy=True)
    providers: list[Any] = ["CPUExecutionProvider"]
    if device != "cpu":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device_index(device)}))
    with OnnxrtRunner(SessionFromOnnx(marked.SerializeToString(), providers=providers)) as runner:
        return dict(runner.infer(dict(feeds)))


def _on_tensorrt(
    plan: Path, model: ModelProto, outputs: Sequence[str], feeds: Mapping[str, Array], device: str
) -> Layers:
    if device_index(device):
        raise EnvironmentMismatch(
            f"--layers runs on the first visible GPU, not on {device}: set CUDA_VISIBLE_DEVICES to select it"
        )
    info = read_info(plan)
    flavor = load_flavor(info.flavor)
    if info.plugin:
        use_plugin(flavor, None)
    builder = marked_engine(flavor, onnx_op.for_tensorrt(model, bool(info.plugin)), outputs, feeds)
    from polygraphy.backend.trt import TrtRunner, engine_from_bytes

    log.info("building %s again with %d layers marked", plan.name, len(outputs))
    with TrtRunner(engine_from_bytes(builder())) as runner:
        return {name: np.array(value) for name, value in runner.infer(dict(feeds)).items()}


def marked_engine(flavor: Flavor, model: bytes, outputs: Sequence[str], feeds: Mapping[str, Array]) -> Any:
    """Return Polygraphy's loader of a plan for exactly the shapes of `feeds`, with `outputs` marked as outputs."""
    _choose_tensorrt(flavor)
    from polygraphy.backend.trt import (
        CreateConfig,
        EngineBytesFromNetwork,
        ModifyNetworkOutputs,
        NetworkFromOnnxBytes,
        Profile,
    )

    profile = Profile()
    for name, value in feeds.items():
        profile.add(name, value.shape, value.shape, value.shape)
    network = ModifyNetworkOutputs(NetworkFromOnnxBytes(model, strongly_typed=True), outputs=list(outputs))
    return EngineBytesFromNetwork(network, config=CreateConfig(profiles=[profile], tf32=False))


def _choose_tensorrt(flavor: Flavor) -> None:
    """Make Polygraphy use this TensorRT and our libcudart, which it looks up when it is imported."""
    wants_rtx = not flavor.has_plugins
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(wants_rtx))
    folders = [*cudart_folders(), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(folders)
    import polygraphy.config

    if wants_rtx != polygraphy.config.USE_TENSORRT_RTX:
        raise MisfError("Polygraphy is already imported with the other TensorRT: use a new process")


def layers_document(results: Sequence[LayerResult]) -> dict[str, Any]:
    """Return the results for JSON: infinity becomes null."""

    def finite(value: Any) -> Any:
        return None if isinstance(value, float) and not np.isfinite(value) else value

    rows = [{name: finite(value) for name, value in asdict(result).items()} for result in results]
    return {"worst_layer": worst(results).name, "layers": rows}


def layers_table(results: Sequence[LayerResult]) -> Any:
    """Return the results as a rich table, in the order of the graph, the worst layer in bold."""
    from rich.table import Table

    most = worst(results)
    table = Table(title="layer by layer, against PyTorch float32")
    table.add_column("layer", no_wrap=True)
    for heading in ("relative error", "added here", "max abs", "largest value"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.name,
            f"{result.relative_error:.1e}",
            f"{result.added:.1e}",
            f"{result.max_abs:.1e}",
            f"{result.largest:.3g}",
            style="bold" if result is most else None,
        )
    return table
