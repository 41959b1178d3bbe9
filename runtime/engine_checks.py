"""What misf-doctor says of TensorRT: each flavor really builds the dynamic filter and, where a GPU is, runs it."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plugins import library
from ..plugins.cli_support import one_line
from ..plugins.errors import EnvironmentMismatch, MisfError
from .tensorrt_api import FLAVORS, TITLES, Flavor, installed, load_flavor, logger_of, reason, use_plugin

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

TOLERANCE = 1e-4


@dataclass(frozen=True)
class EngineCheck:
    """The filter on one flavor of TensorRT."""

    flavor: str
    version: str | None = None
    plugin: str | None = None
    """The library that the filter ran on, None: its function body."""
    built: bool = False
    max_abs: float | None = None
    """Largest error of the numbers, None: it was built only, there is no GPU to run it."""
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: numbers that were not computed are not wrong."""
        return self.problem is None

    def line(self) -> str:
        """Return it in words."""
        if self.problem:
            return f"FAILED: {self.problem}"
        how = f"with {self.plugin}" if self.plugin else "without plugin"
        if self.max_abs is None:
            return f"{self.version}: builds the filter, {how}; not run, for want of a GPU"
        return f"{self.version}: ok, {how}, largest error {self.max_abs:.1e}"


@dataclass(frozen=True)
class PluginCheck:
    """An installed plugin library: what it was built for, or why it does not load."""

    path: str
    about: str
    problem: str | None = None


def engine_checks(onnx_file: Path, features: Array, taps: Array, expected: Any) -> list[EngineCheck]:
    """Return the check of every flavor that is installed, on a one-node model and its right answer."""
    return [_check(name, onnx_file, features, taps, expected) for name in FLAVORS if installed(name)]


def _check(name: str, onnx_file: Path, features: Array, taps: Array, expected: Any) -> EngineCheck:
    import numpy as np

    try:
        flavor = load_flavor(name)
    except MisfError as error:
        return EngineCheck(name, problem=one_line(error))
    try:
        cuda = _cuda()
        if cuda is None and flavor.has_plugins:
            return EngineCheck(name, flavor.version, problem=f"{TITLES[name]} is installed and there is no usable GPU")
        plugin = _plugin(flavor)
        plan = _build(flavor, onnx_file, plugin is not None, features.shape, taps.shape)
        if cuda is None:
            return EngineCheck(name, flavor.version, plugin, built=True)
        largest = float(np.abs(_run(flavor, cuda, plan, features, taps) - expected).max())
        wrong = None if largest <= TOLERANCE else f"wrong numbers: error {largest:.1e}, allowed {TOLERANCE:g}"
        return EngineCheck(name, flavor.version, plugin, True, largest, wrong)
    except Exception as problem:  # whatever it does on this machine is what the user wants to know
        return EngineCheck(name, flavor.version, problem=f"{type(problem).__name__}: {one_line(problem)}")


def _cuda() -> Any:
    """Return the CUDA runtime, or None where no GPU is usable."""
    from .backends.cudart import CudaRuntime

    try:
        cuda = CudaRuntime()
        return cuda if cuda.device_count() else None
    except MisfError:
        return None


def _plugin(flavor: Flavor) -> str | None:
    if not flavor.has_plugins or importlib.util.find_spec("onnx") is None:
        return None  # no plugins, or no way to drop the function body that may win over one
    try:
        return use_plugin(flavor, None).name
    except EnvironmentMismatch:
        return None  # told in its own section


def _build(flavor: Flavor, onnx_file: Path, with_plugin: bool, *shapes: tuple[int, ...]) -> bytes:
    trt, logger = flavor.module, logger_of(flavor)
    builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(_without_body(onnx_file) if with_plugin else onnx_file.read_bytes()):
        raise MisfError(f"does not parse the filter: {parser.get_error(0).desc() if parser.num_errors else '?'}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    for index, shape in enumerate(shapes):
        profile.set_shape(network.get_input(index).name, shape, shape, shape)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise MisfError(f"does not build the filter: {reason(logger)}")
    return bytes(plan)


def _without_body(onnx_file: Path) -> bytes:
    """Return the model without the function body, which before TensorRT 10.7 would be taken instead of the plugin."""
    import onnx

    model = onnx.load(onnx_file)
    del model.functions[:]
    return bytes(model.SerializeToString())


def _run(flavor: Flavor, cuda: Any, plan: bytes, features: Array, taps: Array) -> Any:
    """Return the output of a built filter for arrays on the CPU."""
    import numpy as np

    trt, logger = flavor.module, logger_of(flavor)
    cuda.set_device(0)
    runtime = trt.Runtime(logger)  # must outlive the engine
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise MisfError(f"does not load what it built: {reason(logger)}")
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
    return arrays["output"]


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
