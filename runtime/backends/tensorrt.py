"""Engines of misf-build on TensorRT and TensorRT for RTX. Needs only their Python module and libcudart.

The side-car is compared with this machine before TensorRT loads the plan. Each picture shape has its own execution
context, buffers and, from its second use on, CUDA graph; the least recently used are dropped. All share one scratch
memory, since only one runs at a time, on the backend's own stream.

Pictures may be NumPy arrays or, on the GPU, torch tensors and other objects with __cuda_array_interface__. The latter
are only copied within the GPU, and the result has the same type. Torch tensors are returned without waiting for the
GPU; torch's stream waits instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...plugins.shared.errors import EnvironmentMismatch, MisfError
from ...plugins.shared.files import sha256
from ..engines.cudart import OUT_OF_MEMORY, CudaError, CudaRuntime, gpu_name
from ..engines.flavors import TITLES, Flavor, load_flavor, logger_of, reason, use_plugin
from ..engines.rtx import RtxKernels
from ..engines.side_car import EngineInfo, check_flavor, check_gpu, check_machine, read_info
from .contract import device_index

if TYPE_CHECKING:
    from .contract import Tensor

log = logging.getLogger(__name__)

CACHED_SHAPES = 4
CHANNELS = {"image": 3, "mask": 1, "output": 3}
INPUTS = ("image", "mask")
FLOAT_BYTES = 4


class TensorRtBackend:
    """An engine, loaded. See `Backend` for the call.

    Args:
        path: the plan, with its side-car beside it.
        device: "auto", "cuda" or "cuda:N".
        precision: "auto", or the precision that the engine must have.
        cuda_graph: replay the kernels as one graph.
        zero_copy: let the GPU access pinned CPU memory instead of copying, which is faster if both share their memory
            (Jetson); None: on with MISF_ZERO_COPY=1, else off.
        flavor, cuda: for tests only.

    Raises:
        EnvironmentMismatch: the engine was built for another machine, or something that it needs is missing.
        MisfError: the engine does not load.
        ValueError: the engine has another precision.

    """

    multiple = 1  # the graph pads pictures itself

    def __init__(
        self,
        path: Path,
        device: str = "auto",
        precision: str = "auto",
        *,
        cuda_graph: bool = True,
        zero_copy: bool | None = None,
        flavor: Flavor | None = None,
        cuda: CudaRuntime | None = None,
    ):
        info = read_info(path)
        check_machine(path, info)
        if precision not in ("auto", info.precision_obtained):
            raise ValueError(
                f"{path} is {info.precision_obtained}, but {precision} was requested: an engine computes in the "
                "precision that it was built in, so build another"
            )
        if device == "cpu":
            raise EnvironmentMismatch(f"{path} is an engine, which runs on NVIDIA GPUs only: give the .onnx file")
        flavor = flavor or _flavor(path, info)
        check_flavor(path, info, flavor.version, flavor.title)
        self._cuda, index = _device(path, device, cuda)
        check_gpu(path, info, self._cuda.compute_capability(index))
        if info.gpu not in (None, found := gpu_name(index)):
            log.warning("%s was tuned on %s, this is %s: it runs, but perhaps slower", path.name, info.gpu, found)
        _load_plugin(path, info, flavor)
        self.name, self.device = flavor.name, f"cuda:{index}"
        self.precision = self.file_precision = info.precision_obtained
        self.config, self.limits, self.checkpoint_sha256 = info.config, info.limits, info.checkpoint_sha256
        self._index, self._trt, self._logger = index, flavor.module, logger_of(flavor)
        self._zero_copy = self._wants_zero_copy(zero_copy)
        self._graphs = cuda_graph and flavor.has_plugins  # TensorRT for RTX captures its own graphs
        # Contexts get memory for their shape from us, instead of memory for the engine's largest shape.
        self._making: Any = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._cuda.on(index):
            self._engine = self._load(path, flavor)
            if not flavor.has_plugins:
                kernels = RtxKernels(flavor.version, found)
                self._making = kernels.runtime_config(self._trt, self._engine, cuda_graph)
                weakref.finalize(self, kernels.save)
            self._stream = self._cuda.stream()
        self._scratch = (0, 0)  # address and size of the memory that all contexts work in
        self._runs: OrderedDict[tuple[int, int, int], _Run] = OrderedDict()
        self._lock = threading.Lock()  # contexts, buffers and the stream serve one call at a time

    def _load(self, path: Path, flavor: Flavor) -> Any:
        self._runtime = self._trt.Runtime(self._logger)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise MisfError(f"{flavor.title} cannot load {path}: {reason(self._logger)}")
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if names != set(CHANNELS):
            raise MisfError(
                f"{path} is not an engine of misf-build: expected {sorted(CHANNELS)}, found {sorted(names)}"
            )
        return engine

    def _wants_zero_copy(self, asked: bool | None) -> bool:
        wanted = os.environ.get("MISF_ZERO_COPY", "0") not in ("", "0") if asked is None else asked
        if wanted and not self._cuda.attribute("can_map_host_memory", self._index):
            raise EnvironmentMismatch("zero copy was requested but this GPU cannot map the CPU's memory")
        if wanted and not self._cuda.attribute("integrated", self._index):
            log.info("zero copy on a GPU with its own memory: every access goes over the bus")
        return wanted

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the finished picture, on the device and of the type of `image`."""
        shape = (int(image.shape[0]), int(image.shape[2]), int(image.shape[3]))
        if fault := self.limits.fault(*shape):
            raise ValueError(f"the engine does not support this size: {fault} (misf-build --max-shape sets it)")
        on_gpu = [hasattr(array, "__cuda_array_interface__") for array in (image, mask)]
        if any(on_gpu) and not all(on_gpu):
            raise ValueError("image and mask must both be on the GPU, or both on the CPU")
        with self._lock, self._cuda.on(self._index):
            alone = not self._runs
            try:
                return self._compute(shape, image, mask, any(on_gpu))
            except CudaError as error:
                if error.code != OUT_OF_MEMORY:
                    raise
                self.close()  # frees the memory of the other shapes
                if alone:
                    raise MemoryError(f"out of memory on {self.device}") from error
            try:
                return self._compute(shape, image, mask, any(on_gpu))
            except CudaError as error:
                self.close()
                if error.code == OUT_OF_MEMORY:
                    raise MemoryError(f"out of memory on {self.device}") from error
                raise

    def _compute(self, shape: tuple[int, int, int], image: Any, mask: Any, on_gpu: bool) -> Tensor:
        run = self._run(shape)
        return run.on_gpu(image, mask, self._index) if on_gpu else run.on_cpu(image, mask)

    def _run(self, shape: tuple[int, int, int]) -> _Run:
        """Return the run for this shape, created on first use."""
        if shape in self._runs:
            self._runs.move_to_end(shape)
            return self._runs[shape]
        while len(self._runs) >= CACHED_SHAPES:
            self._runs.popitem(last=False)[1].close()
        context = self._engine.create_execution_context(self._making)
        if context is None:
            raise MisfError(f"the engine did not create an execution context: {reason(self._logger)}")
        run = self._runs[shape] = _Run(
            context, self._cuda, self._stream, self._logger, shape, self._zero_copy, self._graphs
        )
        try:
            # 0 means an error or an unknown size: use what the largest shape needs.
            needed = run.prepare() or self._engine.device_memory_size_v2
            if needed > self._scratch[1]:
                self._grow_scratch(needed)
            elif needed:
                run.work_in(*self._scratch)
        except BaseException:
            self.close()  # the others may refer to freed memory
            raise
        return run

    def _grow_scratch(self, size: int) -> None:
        """Give all contexts a larger scratch memory, and drop their graphs, which contain the old addresses."""
        self._free_scratch()
        self._scratch = (self._cuda.malloc(size), size)
        for run in self._runs.values():
            run.work_in(*self._scratch)

    def _free_scratch(self) -> None:
        self._cuda.synchronize(self._stream)
        for run in self._runs.values():
            run.drop_graph()
        (address, size), self._scratch = self._scratch, (0, 0)
        if size:
            self._cuda.free(address)

    def close(self) -> None:
        """Free the memory and graphs of all shapes; they are created again when needed."""
        while self._runs:
            self._runs.popitem()[1].close()
        with contextlib.suppress(CudaError):
            self._free_scratch()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # partly constructed, or the process is ending
            self.close()
            self._cuda.destroy_stream(self._stream)


def _flavor(path: Path, info: EngineInfo) -> Flavor:
    try:
        return load_flavor(info.flavor)
    except EnvironmentMismatch as error:
        raise EnvironmentMismatch(f"{path} is for {TITLES[info.flavor]} {info.version}. {error}") from error


def _device(path: Path, device: str, cuda: CudaRuntime | None) -> tuple[CudaRuntime, int]:
    """Return the CUDA runtime and the index of the requested GPU."""
    try:
        cuda = cuda or CudaRuntime()
        count, index = cuda.device_count(), 0 if device == "auto" else device_index(device)
    except CudaError as error:
        raise EnvironmentMismatch(f"{path} needs an NVIDIA GPU, and none is usable. {error}") from error
    if index >= count:
        raise EnvironmentMismatch(f"device cuda:{index} was requested but there are {count} GPUs")
    return cuda, index


def _load_plugin(path: Path, info: EngineInfo, flavor: Flavor) -> None:
    if info.plugin is None:
        return
    try:
        library = use_plugin(flavor, None)
    except EnvironmentMismatch as error:
        raise EnvironmentMismatch(f"{path} needs the plugin library {info.plugin}. {error}") from error
    if sha256(library) != info.plugin_sha256:
        log.info("%s is a different build of the plugin from the one that %s was made with", library, path.name)


class _DeviceArray:
    """A float32 array N,3,H,W in GPU memory, freed with this object."""

    def __init__(self, cuda: CudaRuntime, shape: tuple[int, ...]):
        self._cuda, self.shape = cuda, shape
        self._address = cuda.malloc(FLOAT_BYTES * int(np.prod(shape)))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": "<f4", "data": (self._address, False), "version": 3}

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._cuda.free(self._address)


class _Source(NamedTuple):
    """An array on the GPU: its address, and the stream that writes it (None if unknown)."""

    address: int
    stream: int | None


def _source(array: Any, name: str, shape: tuple[int, ...], cuda: CudaRuntime, index: int) -> _Source:
    """Return a GPU array's address; ValueError unless it is a contiguous float32 array of this shape on that GPU."""
    interface = array.__cuda_array_interface__
    found, strides = tuple(interface["shape"]), interface.get("strides")
    contiguous = tuple(FLOAT_BYTES * int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    if found != shape or interface["typestr"] != "<f4" or strides not in (None, contiguous):
        raise ValueError(
            f"{name} on the GPU must be a contiguous float32 array of {shape}, got {interface['typestr']} of {found}"
            + ("" if strides in (None, contiguous) else f" with strides {strides}")
        )
    address, stream = interface["data"][0], interface.get("stream")
    if (device := cuda.device_of(address)) != index:
        where = "not in GPU memory" if device is None else f"on cuda:{device}"
        raise ValueError(f"{name} must be on cuda:{index}, like the engine, but is {where}")
    if _is_torch(array):
        import torch

        stream = torch.cuda.current_stream(array.device).cuda_stream
    return _Source(address, stream)


def _is_torch(array: Any) -> bool:
    return type(array).__module__.partition(".")[0] == "torch"


class _Run:
    """The execution context, buffers and graph of one shape."""

    def __init__(
        self,
        context: Any,
        cuda: CudaRuntime,
        stream: int,
        logger: Any,
        shape: tuple[int, int, int],
        zero_copy: bool,
        graph: bool,
    ):
        self._context, self._cuda, self._stream, self._logger = context, cuda, stream, logger
        n, height, width = shape
        self.shapes = {name: (n, channels, height, width) for name, channels in CHANNELS.items()}
        self._bytes = {name: FLOAT_BYTES * int(np.prod(sides)) for name, sides in self.shapes.items()}
        self._frees: list[Callable[[], None]] = []
        self._gpu: dict[str, int] = {}  # addresses of the buffers that the engine reads and writes
        self._cpu: dict[str, int] = {}  # and of pinned memory, allocated when a picture comes from the CPU
        self._zero_copy, self._graph_wanted = zero_copy, graph
        self._graph: int | None = None
        self._uses = 0

    def prepare(self) -> int:
        """Set shapes and buffers; return the scratch bytes that TensorRT needs for this shape, 0 if unknown."""
        for name in INPUTS:
            if not self._context.set_input_shape(name, self.shapes[name]):
                raise MisfError(f"the engine rejects {name} of shape {self.shapes[name]}: {reason(self._logger)}")
        for name, size in self._bytes.items():
            if self._zero_copy:
                self._gpu[name] = self._cuda.device_pointer(self._pinned(name))
            else:
                address = self._gpu[name] = self._cuda.malloc(size)
                self._frees.append(functools.partial(self._cuda.free, address))
            if not self._context.set_tensor_address(name, self._gpu[name]):
                raise MisfError(f"the engine rejects the address of {name}: {reason(self._logger)}")
        return int(self._context.update_device_memory_size_for_shapes())

    def work_in(self, address: int, size: int) -> None:
        """Set TensorRT's scratch memory."""
        self._logger.errors.clear()
        self._context.set_device_memory(address, size)  # returns nothing
        if self._logger.errors:
            raise MisfError(f"the engine rejects {size} bytes of scratch memory: {reason(self._logger)}")

    def on_cpu(self, image: Any, mask: Any) -> Tensor:
        """Return the finished picture for arrays on the CPU."""
        places = {name: self._pinned(name) for name in self.shapes}
        if self._zero_copy:  # a call on torch's stream may still be using this memory
            self._cuda.synchronize(self._stream)
        for name, array in zip(INPUTS, (image, mask), strict=True):
            np.copyto(self._view(name), np.asarray(array), casting="same_kind")
        self._compute(self._gpu if self._zero_copy else places)
        self._cuda.synchronize(self._stream)
        return self._view("output").copy()

    def on_gpu(self, image: Any, mask: Any, index: int) -> Any:
        """Return the finished picture for arrays on GPU `index`, as an array of the same type."""
        output = (
            image.new_empty(self.shapes["output"])
            if hasattr(image, "new_empty")
            else _DeviceArray(self._cuda, self.shapes["output"])
        )
        arrays = {"image": image, "mask": mask, "output": output}
        sources = {name: _source(array, name, self.shapes[name], self._cuda, index) for name, array in arrays.items()}
        for source in sources.values():
            if source.stream is None:
                self._cuda.synchronize()
            else:
                self._cuda.wait_for(self._stream, source.stream)
        self._compute({name: source.address for name, source in sources.items()})
        theirs = sources["output"].stream
        if theirs is None:
            self._cuda.synchronize(self._stream)
        else:
            self._cuda.wait_for(theirs, self._stream)
        return output

    def _compute(self, places: dict[str, int]) -> None:
        """Enqueue the work on pictures at these addresses, which may be in CPU or GPU memory."""
        for name in INPUTS:
            self._copy(self._gpu[name], places[name], name)
        self._uses += 1
        if self._uses == 2 and self._graph_wanted:  # a shape used once is not worth a graph
            self._graph = self._captured()
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda.launch(self._graph, self._stream)
        self._copy(places["output"], self._gpu["output"], "output")

    def _copy(self, target: int, source: int, name: str) -> None:
        if target != source:
            self._cuda.copy(target, source, self._bytes[name], self._stream)

    def _pinned(self, name: str) -> int:
        """Return the address of a buffer's pinned CPU memory, allocated on first use."""
        if name not in self._cpu:
            address = self._cpu[name] = self._cuda.host_alloc(self._bytes[name])
            self._frees.append(functools.partial(self._cuda.free_host, address))
        return self._cpu[name]

    def _view(self, name: str) -> Tensor:
        pointer = ctypes.cast(self._cpu[name], ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, self.shapes[name])

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise MisfError(f"the engine failed: {reason(self._logger)}")

    def _captured(self) -> int | None:
        """Return the kernels of a call as a graph, or None if they cannot be captured. They have run once before."""
        try:
            self._cuda.begin_capture(self._stream)
            self._enqueue()
            return self._cuda.end_capture(self._stream)
        except MisfError as error:
            self._cuda.abandon_capture(self._stream)
            log.info("running without a CUDA graph: %s", error)
            return None

    def drop_graph(self) -> None:
        """Discard the graph; the next use records a new one. Nothing may be running."""
        graph, self._graph = self._graph, None
        if graph is not None:
            self._uses = 1
            self._cuda.destroy_graph(graph)

    def close(self) -> None:
        """Free everything."""
        with contextlib.suppress(CudaError):
            self._cuda.synchronize(self._stream)
            self.drop_graph()
        self._context = None
        while self._frees:
            with contextlib.suppress(CudaError):
                self._frees.pop()()
