"""What misf-doctor says of TensorRT: each flavor really builds the dynamic filter and, where a GPU is, runs it.

Once in float32 for one shape, once as engines have it: in float16 for shapes in a range.
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
"""Largest errors. fp16: of a sum in float32 of numbers up to 16, written as float16."""
DYNAMIC = (1, 4, 4), (4, 64, 64)
"""Smallest and largest N, H, W of the fp16 engine."""


@dataclass(frozen=True)
class EngineCheck:
    """The filter on one flavor of TensorRT."""

    flavor: str
    precision: str
    version: str | None = None
    plugin: str | None = None
    """The library that the filter ran on, None: its function body."""
    built: bool = False
    max_abs: float | None = None
    """Largest error of the numbers, None: it was built only, there is no GPU to run it."""
    formats: tuple[str, ...] = ()
    """Of the plugin's tensors in the finished engine, where the inspector was asked and knows."""
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: numbers that were not computed are not wrong."""
        return self.problem is None

    def line(self) -> str:
        """Return it in words."""
        if self.problem:
            return f"{self.precision} FAILED: {self.problem}"
        how = f"with {self.plugin}" if self.plugin else "without plugin"
        if self.max_abs is None:
            return f"{self.version}: builds the filter in {self.precision}, {how}; not run, for want of a GPU"
        formats = f" ({'; '.join(self.formats)})" if self.formats else ""
        return f"{self.version}: {self.precision} ok, {how}{formats}, largest error {self.max_abs:.1e}"


@dataclass(frozen=True)
class PluginCheck:
    """An installed plugin library: what it was built for, or why it does not load."""

    path: str
    about: str
    problem: str | None = None


def engine_checks(onnx_file: Path, features: Array, taps: Array, definition: Callable[..., Any]) -> list[EngineCheck]:
    """Return the checks of every flavor that is installed, on a one-node model and the definition of its node.

    In fp16 only where onnx is installed, to change the model's types.
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
            return check(problem=f"{TITLES[name]} is installed and there is no usable GPU")
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
    except Exception as problem:  # whatever it does on this machine is what the user wants to know
        return check(problem=f"{type(problem).__name__}: {one_line(problem)}")


def _cuda() -> Any:
    """Return the CUDA runtime, or None where no GPU is usable."""
    from ..engines.cudart import CudaRuntime

    try:
        cuda = CudaRuntime()
        return cuda if cuda.device_count() else None
    except MisfError:
        return None


def _plugin(flavor: Flavor) -> str | None:
    if not flavor.has_plugins or not is_installed("onnx"):
        return None  # no plugins, or no way to drop the function body that may win over one
    try:
        return use_plugin(flavor, None).name
    except EnvironmentMismatch:
        return None  # told in its own section


def _model(onnx_file: Path, precision: str, with_plugin: bool) -> bytes:
    """Return the model, for a plugin without the function body: before TensorRT 10.7 that would be taken instead."""
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
    """Return the output of a built filter for arrays on the CPU, and the formats of its tensors where it has a plugin.

    Raises MisfError: it does not load, does not run, or is not of their type.
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
    """Return every installed plugin library; those for load_library are loaded into this process and looked into."""
    found = []
    try:
        for info in library.installed_libraries():
            about = f"TensorRT {info.tensorrt}, CUDA {info.cuda}, {info.kind}, {' '.join(info.architectures)}"
            problem = None
            if info.kind == "loadable":
                try:
                    load(str(info.path)).getCreators  # noqa: B018 - AttributeError where it is missing
                except (OSError, AttributeError) as error:
                    problem = one_line(error)
            found.append(PluginCheck(str(info.path), about, problem))
    except (MisfError, OSError) as error:
        found.append(PluginCheck(str(library.install_folder()), "", one_line(error)))
    return found
