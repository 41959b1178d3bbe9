"""misf-doctor's checks of TensorRT: each flavor builds the dynamic filter and, if there is a GPU, runs it.

This is done in float32 for one shape and, as in real engines, in float16 for a range of shapes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...plugins.dynamic_filter.tensorrt import library
from ...plugins.shared.command import one_line
from ...plugins.shared.errors import EnvironmentMismatch, MisfError
from ...plugins.shared.extras import is_installed
from ..engines.flavors import FLAVORS, TITLES, Flavor, installed, load_flavor, logger_of, reason, use_plugin
from ..engines.inspector import inspect, inspected_layers, inspected_proof
from ..engines.network import build_config, parsed_network

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}
"""Largest errors by precision; for fp16, that of rounding float32 sums of up to 16 to float16."""
DYNAMIC = (1, 4, 4), (4, 64, 64)
"""Smallest and largest N, H, W of the fp16 engine."""


@dataclass(frozen=True)
class EngineCheck:
    """The result of the filter on one flavor of TensorRT."""

    flavor: str
    precision: str
    version: str | None = None
    plugin: str | None = None
    """The plugin library in use; None for the function body."""
    built: bool = False
    max_abs: float | None = None
    """Largest error; None if the filter was only built, because there is no GPU to run it."""
    formats: tuple[str, ...] = ()
    """Formats of the plugin's tensors in the finished engine, if the inspector knows them."""
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether there is no problem; a filter that was only built is no problem."""
        return self.problem is None

    def line(self) -> str:
        """Return the result as text."""
        if self.problem:
            return f"{self.precision} FAILED: {self.problem}"
        how = f"with {self.plugin}" if self.plugin else "without plugin"
        if self.max_abs is None:
            return f"{self.version}: builds the filter in {self.precision}, {how}; not run because there is no GPU"
        formats = f" ({'; '.join(self.formats)})" if self.formats else ""
        return f"{self.version}: {self.precision} ok, {how}{formats}, largest error {self.max_abs:.1e}"


@dataclass(frozen=True)
class PluginCheck:
    """An installed plugin library: what it was built for, or why it does not load."""

    path: str
    about: str
    problem: str | None = None


def engine_checks(onnx_file: Path, features: Array, taps: Array, definition: Callable[..., Any]) -> list[EngineCheck]:
    """Return the checks of every installed flavor, for a one-node model and the definition of its node.

    fp16 is only checked if onnx is installed, which is needed to change the model's types.
    """
    precisions = TOLERANCES if is_installed("onnx") else ["fp32"]
    flavors = [name for name in FLAVORS if installed(name)]
    return [_check(name, kind, onnx_file, features, taps, definition) for name in flavors for kind in precisions]


def _check(
    name: str, precision: str, onnx_file: Path, features: Array, taps: Array, definition: Callable[..., Any]
) -> EngineCheck:
    import numpy as np

    try:
        flavor = load_flavor(name)
    except MisfError as error:
        return EngineCheck(name, precision, problem=one_line(error))
    check = functools.partial(EngineCheck, name, precision, flavor.version)
    try:
        cuda = _cuda()
        if cuda is None and flavor.has_plugins:
            return check(problem=f"{TITLES[name]} is installed but there is no usable GPU")
        plugin = _plugin(flavor)
        plan = _build(flavor, _model(onnx_file, precision, plugin is not None), precision, features.shape, taps.shape)
        if cuda is None:
            return check(plugin, built=True)
        half = np.float16 if precision == "fp16" else np.float32
        f, t = features.astype(half), taps.astype(half)
        output, formats = _run(flavor, cuda, plan, f, t)
        largest, allowed = float(np.abs(output - definition(f, t)).max()), TOLERANCES[precision]
        wrong = None if largest <= allowed else f"wrong numbers: error {largest:.1e}, allowed {allowed:g}"
        return check(plugin, True, largest, formats, wrong)
    except Exception as problem:  # the user wants to know about any problem
        return check(problem=f"{type(problem).__name__}: {one_line(problem)}")


def _cuda() -> Any:
    """Return the CUDA runtime, or None if there is no usable GPU."""
    from ..engines.cudart import CudaRuntime

    try:
        cuda = CudaRuntime()
        return cuda if cuda.device_count() else None
    except MisfError:
        return None


def _plugin(flavor: Flavor) -> str | None:
    if not flavor.has_plugins or not is_installed("onnx"):
        return None  # there are no plugins, or the function body, which may take precedence, cannot be dropped
    try:
        return use_plugin(flavor, None).name
    except EnvironmentMismatch:
        return None  # reported in a separate section


def _model(onnx_file: Path, precision: str, with_plugin: bool) -> bytes:
    """Return the model; with a plugin without its function body, which TensorRT before 10.7 would use instead."""
    if precision == "fp32" and not with_plugin:
        return onnx_file.read_bytes()
    import onnx

    model = onnx.load(onnx_file)
    if with_plugin:
        del model.functions[:]
    if precision == "fp16":
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return bytes(model.SerializeToString())


def _build(flavor: Flavor, model: bytes, precision: str, *shapes: tuple[int, ...]) -> bytes:
    trt, logger = flavor.module, logger_of(flavor)
    builder = trt.Builder(logger)
    network, _parser = parsed_network(flavor, builder, model, "does not parse the filter")
    inputs = {}
    for index, shape in enumerate(shapes):
        low, high = ((n, shape[1], height, width) for n, height, width in DYNAMIC)
        inputs[network.get_input(index).name] = (low, shape, high) if precision == "fp16" else (shape, shape, shape)
    config = build_config(flavor, builder, inputs)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise MisfError(f"does not build the filter: {reason(logger)}")
    return bytes(plan)


def _run(flavor: Flavor, cuda: Any, plan: bytes, features: Any, taps: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the output of a built filter for arrays on the CPU, and the formats of its tensors if it is the plugin.

    Raises:
        MisfError: the engine does not load, does not run, or does not have the type of the arrays.

    """
    import numpy as np

    trt, logger = flavor.module, logger_of(flavor)
    cuda.set_device(0)
    runtime = trt.Runtime(logger)  # must outlive the engine
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise MisfError(f"does not load what it built: {reason(logger)}")
    formats: tuple[str, ...] = ()
    if flavor.has_plugins:
        information = inspect(trt, engine, {"features": features.shape, "taps": taps.shape})
        inspected_proof("fp16" if features.dtype == np.float16 else "fp32", information, "the filter's engine")
        formats = tuple(text for texts in inspected_layers(information)["filters"].values() for text in texts)
    context, stream = engine.create_execution_context(), cuda.stream()
    arrays = {"features": features, "taps": taps, "output": np.empty_like(features)}
    addresses = {name: cuda.malloc(array.nbytes) for name, array in arrays.items()}
    try:
        for name in ("features", "taps"):
            cuda.copy(addresses[name], arrays[name].ctypes.data, arrays[name].nbytes, stream)
            context.set_input_shape(name, arrays[name].shape)
        for name, address in addresses.items():
            context.set_tensor_address(name, address)
        if not context.execute_async_v3(stream):
            raise MisfError(f"does not run: {reason(logger)}")
        cuda.copy(arrays["output"].ctypes.data, addresses["output"], features.nbytes, stream)
        cuda.synchronize(stream)
    finally:
        for address in addresses.values():
            cuda.free(address)
        cuda.destroy_stream(stream)
    return arrays["output"], formats


def plugin_checks(load: Callable[[str], Any] = ctypes.CDLL) -> list[PluginCheck]:
    """Return every installed plugin library; those for load_library are checked by loading them into this process."""
    found = []
    try:
        for info in library.installed_libraries():
            about = f"TensorRT {info.tensorrt}, CUDA {info.cuda}, {info.kind}, {' '.join(info.architectures)}"
            problem = None
            if info.kind == "loadable":
                try:
                    load(str(info.path)).getCreators  # noqa: B018 - AttributeError if it is missing
                except (OSError, AttributeError) as error:
                    problem = one_line(error)
            found.append(PluginCheck(str(info.path), about, problem))
    except (MisfError, OSError) as error:
        found.append(PluginCheck(str(library.install_folder()), "", one_line(error)))
    return found
