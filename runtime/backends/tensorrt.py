"""Engines of misf-build on TensorRT and TensorRT for RTX. Needs their Python module and libcudart, nothing else.

The side-car is compared with this machine before TensorRT sees the plan. Each shape of picture has its own execution
context, buffers and, from its second use on, a CUDA graph of copies and kernels; the least recently used are dropped.
Everything runs on a stream of its own.

Pictures may lie in NumPy arrays, or on the GPU in torch tensors or anything else with __cuda_array_interface__: those
are not copied, and the result is of the same kind.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...plugins.shared.errors import EnvironmentMismatch, MisfError
from ...plugins.shared.files import sha256
from ..engines.cudart import OUT_OF_MEMORY, CudaError, CudaRuntime, gpu_name
from ..engines.flavors import TITLES, Flavor, load_flavor, make_logger, reason, use_plugin
from ..engines.side_car import EngineInfo, check_flavor, check_gpu, check_machine, read_info
from . import Tensor, device_index

log = logging.getLogger(__name__)

CACHED_SHAPES = 4
CHANNELS = {"image": 3, "mask": 1, "output": 3}
INPUTS = ("image", "mask")
FLOAT_BYTES = 4


class TensorRtBackend:
    """An engine, loaded. See `Backend` for the call.

    cuda_graph: replay copies and kernels as one graph. zero_copy: let the GPU read and write pinned CPU memory instead
    of copying; pays where both share their memory (Jetson); None: MISF_ZERO_COPY=1, else off. flavor, cuda: only for
    tests. Raises EnvironmentMismatch: this machine is not what the engine was built for. MisfError: it does not load.
    """

    multiple = 1  # the graph pads by itself

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
                f"{path} is {info.precision_obtained} and {precision} was asked for: an engine computes in the "
                "precision that it was built in, so build another"
            )
        if device == "cpu":
            raise EnvironmentMismatch(f"{path} is an engine, which runs on NVIDIA GPUs only: give the .onnx file")
        flavor = flavor or _flavor(path, info)
        check_flavor(path, info, flavor.version, flavor.title)
        self._cuda, index = _device(path, device, cuda)
        check_gpu(path, info, self._cuda.compute_capability(index))
        if info.gpu not in (None, found := gpu_name(index)):
            log.warning("%s was tuned on %s, this is %s: it runs, perhaps slower", path.name, info.gpu, found)
        _load_plugin(path, info, flavor)
        self.name, self.device, self.precision = flavor.name, f"cuda:{index}", info.precision_obtained
        self.config, self.limits, self.checkpoint_sha256 = info.config, info.limits, info.checkpoint_sha256
        self._index, self._trt, self._logger = index, flavor.module, make_logger(flavor)
        self._engine = self._load(path, flavor)
        self._stream = self._cuda.stream()
        self._graphs = cuda_graph
        self._zero_copy = self._wants_zero_copy(zero_copy)
        self._runs: OrderedDict[tuple[int, int, int], _Run] = OrderedDict()
        self._lock = threading.Lock()  # contexts, buffers and the stream serve one call at a time

    def _load(self, path: Path, flavor: Flavor) -> Any:
        self._runtime = self._trt.Runtime(self._logger)
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise MisfError(f"{flavor.title} cannot load {path}: {reason(self._logger)}")
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if names != set(CHANNELS):
            raise MisfError(f"{path} is not an engine of ours: expected {sorted(CHANNELS)}, found {sorted(names)}")
        return engine

    def _wants_zero_copy(self, asked: bool | None) -> bool:
        wanted = os.environ.get("MISF_ZERO_COPY", "0") not in ("", "0") if asked is None else asked
        if wanted and not self._cuda.attribute("can_map_host_memory", self._index):
            raise EnvironmentMismatch("zero copy was asked for and this GPU cannot map the CPU's memory")
        if wanted and not self._cuda.attribute("integrated", self._index):
            log.info("zero copy on a GPU with memory of its own: every access goes over the bus")
        return wanted

    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the finished picture, where and as what `image` came."""
        shape = (int(image.shape[0]), int(image.shape[2]), int(image.shape[3]))
        if fault := self.limits.fault(*shape):
            raise ValueError(f"the engine does not take this size: {fault} (misf-build --max-shape makes others)")
        on_gpu = [hasattr(array, "__cuda_array_interface__") for array in (image, mask)]
        if any(on_gpu) and not all(on_gpu):
            raise ValueError("image and mask must both be on the GPU, or both on the CPU")
        with self._lock:
            self._cuda.set_device(self._index)
            alone = not self._runs
            try:
                return self._compute(shape, image, mask, any(on_gpu))
            except CudaError as error:
                if error.code != OUT_OF_MEMORY:
                    raise
                self.close()  # what the other shapes hold may be what is missing
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
        return run.on_gpu(image, mask) if on_gpu else run.on_cpu(image, mask)

    def _run(self, shape: tuple[int, int, int]) -> _Run:
        """Return what runs this shape, made when it is new."""
        if shape in self._runs:
            self._runs.move_to_end(shape)
            return self._runs[shape]
        while len(self._runs) >= CACHED_SHAPES:
            self._runs.popitem(last=False)[1].close()
        context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise MisfError(f"the engine makes no execution context: {reason(self._logger)}")
        run = _Run(context, self._cuda, self._stream, self._logger, shape, self._zero_copy, self._graphs)
        self._runs[shape] = run
        return run

    def close(self) -> None:
        """Free the buffers and graphs of all shapes; they come back when they are needed."""
        while self._runs:
            self._runs.popitem()[1].close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half made, or the process is ending
            self.close()
            self._cuda.destroy_stream(self._stream)


def _flavor(path: Path, info: EngineInfo) -> Flavor:
    try:
        return load_flavor(info.flavor)
    except EnvironmentMismatch as error:
        raise EnvironmentMismatch(f"{path} is for {TITLES[info.flavor]} {info.version}. {error}") from error


def _device(path: Path, device: str, cuda: CudaRuntime | None) -> tuple[CudaRuntime, int]:
    """Return the CUDA runtime with the asked GPU as this thread's, and the GPU's number."""
    try:
        cuda = cuda or CudaRuntime()
        count, index = cuda.device_count(), 0 if device == "auto" else device_index(device)
    except CudaError as error:
        raise EnvironmentMismatch(f"{path} needs an NVIDIA GPU, and none is usable. {error}") from error
    if index >= count:
        raise EnvironmentMismatch(f"device cuda:{index} was asked for and there are {count} GPUs")
    cuda.set_device(index)
    return cuda, index


def _load_plugin(path: Path, info: EngineInfo, flavor: Flavor) -> None:
    if info.plugin is None:
        return
    try:
        library = use_plugin(flavor, None)
    except EnvironmentMismatch as error:
        raise EnvironmentMismatch(f"{path} needs the plugin library {info.plugin}. {error}") from error
    if sha256(library) != info.plugin_sha256:
        log.info("%s is another build of the plugin than the one %s was made with", library, path.name)


class _DeviceArray:
    """Memory on the GPU that is freed with this object: float32 N,3,H,W."""

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
    """An array on the GPU: where it lies, and the stream that writes it (None: not known)."""

    address: int
    stream: int | None


def _source(array: Any, name: str, shape: tuple[int, ...]) -> _Source:
    """Return a GPU array's place; ValueError unless it is a contiguous float32 array of the shape."""
    interface = array.__cuda_array_interface__
    found, strides = tuple(interface["shape"]), interface.get("strides")
    contiguous = tuple(FLOAT_BYTES * int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    if found != shape or interface["typestr"] != "<f4" or strides not in (None, contiguous):
        raise ValueError(
            f"{name} on the GPU must be a contiguous float32 array of {shape}, got {interface['typestr']} of {found}"
            + ("" if strides in (None, contiguous) else f" with strides {strides}")
        )
    stream = interface.get("stream")
    if type(array).__module__.partition(".")[0] == "torch":
        import torch

        stream = torch.cuda.current_stream(array.device).cuda_stream
    return _Source(interface["data"][0], stream)


class _Run:
    """One shape: an execution context, its memory, its buffers, its graph."""

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
        self._cuda, self._stream, self._logger = cuda, stream, logger
        n, height, width = shape
        self.shapes = {name: (n, channels, height, width) for name, channels in CHANNELS.items()}
        self._frees: list[Callable[[], None]] = []
        self._zero_copy, self._graph_wanted = zero_copy, graph
        self._graph: int | None = None
        self._uses = 0
        self._buffers: dict[str, tuple[Any, int, int]] | None = None  # name -> NumPy view, CPU address, GPU address
        self._context = context
        try:
            for name in INPUTS:
                if not self._context.set_input_shape(name, self.shapes[name]):
                    raise MisfError(f"the engine does not take {name} of {self.shapes[name]}: {reason(logger)}")
            # Memory for this very shape, not for the largest that the engine takes.
            size = self._context.update_device_memory_size_for_shapes()
            self._context.set_device_memory(self._device_memory(max(size, 1)), size)
        except BaseException:
            self.close()
            raise

    def on_cpu(self, image: Any, mask: Any) -> Tensor:
        """Return the finished picture for arrays on the CPU."""
        if self._buffers is None:
            self._buffers = {name: self._buffer(shape) for name, shape in self.shapes.items()}
        for name, array in zip(INPUTS, (image, mask), strict=True):
            np.copyto(self._buffers[name][0], np.asarray(array), casting="same_kind")
        self._uses += 1
        if self._uses == 2 and self._graph_wanted:  # a shape that comes once is not worth a graph
            self._graph = self._captured()
        if self._graph is None:
            self._enqueue_with_copies()
        else:
            self._cuda.launch(self._graph, self._stream)
        self._cuda.synchronize(self._stream)
        result: Tensor = self._buffers["output"][0].copy()
        return result

    def on_gpu(self, image: Any, mask: Any) -> Any:
        """Return the finished picture for arrays on the GPU, which are used where they lie."""
        output = (
            image.new_empty(self.shapes["output"])
            if hasattr(image, "new_empty")
            else _DeviceArray(self._cuda, self.shapes["output"])
        )
        arrays = {"image": image, "mask": mask, "output": output}
        sources = {name: _source(array, name, self.shapes[name]) for name, array in arrays.items()}
        for source in sources.values():
            if source.stream is None:
                self._cuda.synchronize()
            else:
                self._cuda.wait_for(self._stream, source.stream)
        self._enqueue({name: source.address for name, source in sources.items()})
        self._cuda.synchronize(self._stream)
        return output

    def _buffer(self, shape: tuple[int, ...]) -> tuple[Any, int, int]:
        size = FLOAT_BYTES * int(np.prod(shape))
        host = self._cuda.host_alloc(size)
        self._frees.append(lambda: self._cuda.free_host(host))
        view = np.ctypeslib.as_array(ctypes.cast(host, ctypes.POINTER(ctypes.c_float)), shape)
        return view, host, self._cuda.device_pointer(host) if self._zero_copy else self._device_memory(size)

    def _device_memory(self, size: int) -> int:
        address = self._cuda.malloc(size)
        self._frees.append(lambda: self._cuda.free(address))
        return address

    def _enqueue(self, addresses: dict[str, int]) -> None:
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise MisfError(f"the engine does not take the address of {name}: {reason(self._logger)}")
        if not self._context.execute_async_v3(self._stream):
            raise MisfError(f"the engine failed: {reason(self._logger)}")

    def _enqueue_with_copies(self) -> None:
        assert self._buffers is not None
        copies = {} if self._zero_copy else self._buffers
        for name in INPUTS:
            if name in copies:
                view, host, gpu = copies[name]
                self._cuda.copy(gpu, host, view.nbytes, self._stream)
        self._enqueue({name: gpu for name, (_, _, gpu) in self._buffers.items()})
        if "output" in copies:
            view, host, gpu = copies["output"]
            self._cuda.copy(host, gpu, view.nbytes, self._stream)

    def _captured(self) -> int | None:
        """Return the work of a call as a graph, or None where it cannot be captured. It has run once before."""
        try:
            self._cuda.begin_capture(self._stream)
            self._enqueue_with_copies()
            return self._cuda.end_capture(self._stream)
        except MisfError as error:
            self._cuda.abandon_capture(self._stream)
            log.info("running without a CUDA graph: %s", error)
            return None

    def close(self) -> None:
        """Free everything."""
        graph, self._graph = self._graph, None
        with contextlib.suppress(CudaError):
            self._cuda.synchronize(self._stream)
            if graph is not None:
                self._cuda.destroy_graph(graph)
        self._buffers = None
        self._context = None
        while self._frees:
            with contextlib.suppress(CudaError):
                self._frees.pop()()
