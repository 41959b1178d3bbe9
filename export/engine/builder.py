"""From an ONNX file to a TensorRT engine and its side-car, both or neither.

Engines are strongly typed: with TensorRT 10.x, 11.x and for RTX, they have the types in the ONNX file. The precision is
verified in the parsed network and, if there is a GPU to load it, in the finished engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from ...plugins.dynamic_filter import onnx_op
from ...plugins.dynamic_filter.tensorrt import library
from ...plugins.shared import progress
from ...plugins.shared.command import misf_version, one_line
from ...plugins.shared.errors import AccuracyError, EnvironmentMismatch, MisfError
from ...plugins.shared.files import sha256, written_whole
from ...runtime.backends.contract import check_onnx
from ...runtime.engines.cudart import CudaError, CudaRuntime, gpu_name
from ...runtime.engines.flavors import Flavor, load_flavor, logger_of, reason, use_plugin
from ...runtime.engines.inspector import inspect, inspected_layers, inspected_proof
from ...runtime.engines.network import build_config, parsed_network
from ...runtime.engines.side_car import EngineInfo, Limits, this_platform, write_engine
from ...runtime.pictures.settings import network_working_size
from ..model_types import float_types
from .monitor import cancellable, make_monitor

log = logging.getLogger(__name__)

DEFAULT_LIMITS = Limits((1, 64, 64), (1, 512, 512), (1, 1024, 1024))
INPUTS = {"image": 3, "mask": 1}


@dataclass(frozen=True)
class EngineOptions:
    """Settings of a build."""

    backend: str = "auto"
    """tensorrt, tensorrt-rtx or auto."""
    limits: Limits = DEFAULT_LIMITS
    opt_by_network: bool = False
    """Optimise for the network's working size, as far as the limits allow, whatever `limits.opt` says."""
    precision: str | None = None
    """fp32 or fp16, which the engine must have; None: the precision of the ONNX file."""
    workspace_gib: float | None = None
    opt_level: int | None = None
    timing_cache: Path | None = None
    """Path of the timing cache; None: one per GPU and TensorRT version in the cache folder."""
    plugin: Path | None = None
    """Plugin library; None: the installed one."""
    without_plugin: bool = False
    """Build the dynamic filter from its function body, which needs no library but is slower."""
    device: int = 0


POLYGRAPHY_ATOL = {"fp32": 1e-4, "fp16": 1e-2}
"""Tolerances for Polygraphy, which compares every pixel: with its default, 1e-5, rounding alone fails."""


@dataclass(frozen=True)
class EngineReport:
    """The built engine, and commands of other tools that run it."""

    path: Path
    info: EngineInfo
    commands: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Machine:
    """The GPU to build for; both None if there is none, or if the engine is for any GPU."""

    gpu: str | None = None
    compute_capability: str | None = None


def build_engine(source: Path, output: Path, options: EngineOptions | None = None) -> EngineReport:
    """Build `source`, an ONNX file of misf-export, into `output` and its side-car; return a report.

    If it raises, nothing is written.

    Raises:
        ValueError: the file is not ONNX, or was not written by misf-export.
        EnvironmentMismatch: TensorRT, the GPU or the plugin library is missing.
        AccuracyError: the engine does not have the requested precision.
        MisfError: TensorRT cannot parse or build the file; the message is TensorRT's.
        KeyboardInterrupt: the build was cancelled.

    """
    options = options or EngineOptions()
    model, config = read_model(source)
    if options.opt_by_network:
        options = replace(options, limits=_tuned(options.limits, network_working_size(config)))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    asked = options.precision or metadata.get("misf.precision", "fp32")
    flavor = load_flavor(options.backend)
    machine = _machine(flavor, options.device)
    plugin = _plugin(flavor, options)
    log.info("building with %s%s", flavor.title, f" for {machine.gpu}" if machine.gpu else "")
    plan, obtained = _build(flavor, model, options, plugin is not None, machine, source, asked)
    proof, layers = "network", {}
    if flavor.has_plugins:
        information = _inspect(flavor, plan, options)
        proof, layers = inspected_proof(asked, information, str(output)), inspected_layers(information)
    info = EngineInfo(
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        plan_bytes=len(plan),
        flavor=flavor.name,
        version=flavor.version,
        platform=this_platform(),
        gpu=machine.gpu,
        compute_capability=machine.compute_capability,
        precision_asked=asked,
        precision_obtained=asked,  # otherwise there would be no engine
        precision_proof=proof,
        convolutions=obtained,
        limits=options.limits,
        config=config,
        onnx=source.name,
        onnx_sha256=sha256(source),
        checkpoint_sha256=metadata.get("misf.checkpoint_sha256", ""),
        plugin=plugin.name if plugin else None,
        plugin_sha256=sha256(plugin) if plugin else None,
        layers=layers,
        settings={"workspace_gib": options.workspace_gib, "opt_level": options.opt_level},
        misf=misf_version(),
    )
    write_engine(output, plan, info)
    return EngineReport(output, info, other_tools(flavor, source, asked, output, options.limits, plugin))


def _tuned(limits: Limits, side: int) -> Limits:
    """Return the limits with an optimum of side x side, or the nearest size that they allow."""
    height, width = (min(max(side, limits.min[axis]), limits.max[axis]) for axis in (1, 2))
    return replace(limits, opt=(limits.opt[0], height, width))


def read_model(path: Path) -> tuple[ModelProto, dict[str, Any]]:
    """Return an ONNX model and its network's config; ValueError if the file was not written by misf-export."""
    if not path.is_file():
        raise ValueError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: expected an ONNX file")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's own exceptions, which we do not import
        raise ValueError(f"{path} is not an ONNX file, or a damaged one: {one_line(error)}") from error
    inputs = {
        value.name: [side.dim_value or side.dim_param for side in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return model, check_onnx(path, inputs, [value.name for value in model.graph.output], metadata)


def _machine(flavor: Flavor, device: int) -> _Machine:
    """Make the target GPU current in this thread and return it.

    RTX engines are for all RTX GPUs, and are built without a GPU.
    """
    if not flavor.has_plugins:
        return _Machine()
    try:
        cuda = CudaRuntime()
        count = cuda.device_count()
    except CudaError as error:
        raise EnvironmentMismatch(f"{flavor.title} can only build an engine on its target GPU. {error}") from error
    if device >= count:
        raise EnvironmentMismatch(f"cuda:{device} was requested but there are {count} GPUs")
    cuda.set_device(device)  # TensorRT objects stay on the GPU that is current when they are made
    return _Machine(gpu_name(device), cuda.compute_capability(device))


def _plugin(flavor: Flavor, options: EngineOptions) -> Path | None:
    """Load and return the plugin library, or return None if the filter is built from its function body."""
    if options.plugin and (options.without_plugin or not flavor.has_plugins):
        why = "--no-plugin was given too" if options.without_plugin else f"{flavor.title} has no plugins"
        raise ValueError(f"--plugin {options.plugin} cannot be used: {why}")
    if options.without_plugin or not flavor.has_plugins:
        return None
    try:
        return use_plugin(flavor, options.plugin)
    except EnvironmentMismatch as error:
        raise EnvironmentMismatch(f"{error}; or build without it, with a slower filter: --no-plugin") from error


def _build(
    flavor: Flavor,
    model: ModelProto,
    options: EngineOptions,
    with_plugin: bool,
    machine: _Machine,
    source: Path,
    asked: str,
) -> tuple[bytes, dict[str, int]]:
    """Return the plan, and the number of convolutions of each type in the parsed network."""
    trt, logger = flavor.module, logger_of(flavor)
    builder = trt.Builder(logger)
    network, _parser = parsed_network(
        flavor, builder, onnx_op.for_tensorrt(model, with_plugin), f"{flavor.title} cannot parse {source}"
    )
    obtained = network_types(trt, network)
    prove_precision(asked, obtained, float_types(model), source)
    config = _config(flavor, builder, options)
    with progress.bar() as bar, _timing_cache(flavor, config, options, machine):
        monitor = config.progress_monitor = make_monitor(trt, bar)

        def build() -> Any:
            if machine.gpu:
                CudaRuntime().set_device(options.device)  # the current GPU is a property of the thread
            return builder.build_serialized_network(network, config)

        plan = cancellable(build, monitor.cancelled)
    if plan is None:
        raise MisfError(f"{flavor.title} did not build {source}: {reason(logger)}")
    return bytes(plan), obtained


def _config(flavor: Flavor, builder: Any, options: EngineOptions) -> Any:
    trt, limits = flavor.module, options.limits
    low, best, high = (
        {name: (n, channels, height, width) for name, channels in INPUTS.items()}
        for n, height, width in (limits.min, limits.opt, limits.max)
    )
    config = build_config(flavor, builder, {name: (low[name], best[name], high[name]) for name in INPUTS})
    if options.workspace_gib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gib * (1 << 30)))
    if options.opt_level is not None:
        config.builder_optimization_level = options.opt_level
    if hasattr(
        trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"
    ):  # RTX: without it, the work cannot be captured as a CUDA graph
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if hasattr(
        trt.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10"
    ):  # otherwise every shape takes the memory of the largest
        config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    return config


@contextlib.contextmanager
def _timing_cache(flavor: Flavor, config: Any, options: EngineOptions, machine: _Machine) -> Iterator[None]:
    """Read the builder's timing cache before the build and write it back after."""
    if not flavor.has_plugins:  # TensorRT for RTX measures nothing at build time
        if options.timing_cache:
            log.info("%s does not use a timing cache: %s is ignored", flavor.title, options.timing_cache)
        yield
        return
    capability = (machine.compute_capability or "any").replace(".", "")
    name = f"timing-{flavor.name}-{flavor.version}-sm{capability}.cache"
    path = options.timing_cache or library.install_folder().parent / name
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        log.warning("the timing cache %s is damaged or of another TensorRT: starting a new one", path)
        config.set_timing_cache(config.create_timing_cache(b""), False)
    try:
        yield
    finally:  # a cancelled build may have measured for minutes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as temporary:
                temporary.write_bytes(config.get_timing_cache().serialize())
        except OSError as error:
            log.warning("the timing cache was not saved: %s", one_line(error))


def network_types(trt: Any, network: Any) -> dict[str, int]:
    """Return the number of convolutions of each type in a parsed network, by 'fp32', 'fp16' or TensorRT's name."""
    names = {trt.DataType.FLOAT: "fp32", trt.DataType.HALF: "fp16"}
    kinds = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION)
    layers = (network.get_layer(index) for index in range(network.num_layers))
    types = [layer.get_output(0).dtype for layer in layers if layer.type in kinds]
    return dict(Counter(names.get(kind, str(kind)) for kind in types))


def prove_precision(asked: str, obtained: dict[str, int], in_file: dict[str, int], source: Path) -> None:
    """Raise AccuracyError unless most convolutions have the requested precision, and all the types in the file."""
    total = sum(obtained.values())
    counts = ", ".join(f"{number} {name}" for name, number in sorted(obtained.items())) or "none"
    if obtained != in_file:
        expected = ", ".join(f"{number} {name}" for name, number in sorted(in_file.items()))
        raise AccuracyError(f"TensorRT changed the types of {source}: convolutions {counts}, in the file {expected}")
    precision = max(obtained, key=lambda name: obtained[name])
    if precision != asked:
        raise AccuracyError(
            f"{asked} was requested but the engine is {precision} ({counts} of {total} convolutions): an engine has "
            f"the types of its ONNX file, so export that with misf-export --precision {asked}"
        )


def _inspect(flavor: Flavor, plan: bytes, options: EngineOptions) -> str:
    """Return the engine inspector's report on a plan, after loading it as a check."""
    logger = logger_of(flavor)
    runtime = flavor.module.Runtime(logger)  # must outlive the engine
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise MisfError(f"{flavor.title} built an engine that it cannot load: {reason(logger)}")
    n, height, width = options.limits.opt
    return inspect(flavor.module, engine, {name: (n, channels, height, width) for name, channels in INPUTS.items()})


def other_tools(
    flavor: Flavor, source: Path, precision: str, plan: Path, limits: Limits, plugin: Path | None
) -> dict[str, str]:
    """Return commands for other tools, with the same plugin library.

    trtexec and Triton run the plan; Polygraphy builds an engine from `source` and compares it with ONNX Runtime.
    """
    if not flavor.has_plugins:
        return {}

    n, height, width = limits.opt
    shapes = ",".join(f"{name}:{n}x{channels}x{height}x{width}" for name, channels in INPUTS.items())
    inputs = " ".join(f"'{name}:[{n},{channels},{height},{width}]'" for name, channels in INPUTS.items())
    polygraphy = f"polygraphy run {source} --onnxrt --trt --strongly-typed --input-shapes {inputs}"
    polygraphy += f" --atol {POLYGRAPHY_ATOL[precision]}" + (f" --plugins {plugin}" if plugin else "")
    loading = f" --dynamicPlugins={plugin}" if plugin else ""
    trtexec = f"trtexec --loadEngine={plan} --shapes={shapes}{loading}"
    found = {"trtexec": trtexec, "polygraphy": polygraphy}
    triton = "tritonserver --model-repository=models"
    if plugin is None:
        return {**found, "triton": triton}
    with contextlib.suppress(EnvironmentMismatch):
        twin = library.find_library(flavor.major, self_registering=True)
        found["triton"] = f"{triton} --backend-config=tensorrt,plugins={twin}"
    return found
