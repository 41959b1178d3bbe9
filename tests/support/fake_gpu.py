"""A GPU for machines without one: libcudart on the CPU's memory, and the part of TensorRT that runs engines.

The fake libcudart is strict: copies must lie inside living allocations, frees must match, memory belongs to the GPU
that is the thread's, work enqueued on a stream that captures is recorded and runs when its graph is launched. The fake
engine computes with ONNX Runtime, from the addresses that it was given to the addresses that it was given, in scratch
memory that it was given, on the GPU where it was loaded.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from misf.runtime.engines.cudart import OUT_OF_MEMORY, SIGNATURES

SCRATCH_BYTES_PER_PIXEL = 4
STREAM = 77


class FakeCudart:
    """What CudaRuntime takes for libcudart: one GPU of compute capability 8.9."""

    def __init__(self, memory: int = 1 << 30, gpus: int = 1, integrated: bool = False):
        self.memory, self.gpus, self.integrated = memory, gpus, integrated
        self.compute_capability = (8, 9)
        self.live: dict[int, tuple[str, ctypes.Array[Any]]] = {}
        self._thread = threading.local()
        self.device_of: dict[int, int] = {}
        self.capturing: list[Callable[[], None]] | None = None
        self.capture_fails = False
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.calls: list[str] = []
        self.waits: list[tuple[int, int]] = []
        """Of a stream for another."""
        self._recorded = 0
        self.last_error = 0
        for name in (*SIGNATURES, "cudaGetErrorString"):
            setattr(self, name, self._logged(name, getattr(self, "_" + name)))

    def _logged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            return function(*arguments)

        return call

    @property
    def current(self) -> int:
        """The GPU of this thread."""
        return getattr(self._thread, "gpu", 0)

    @current.setter
    def current(self, gpu: int) -> None:
        self._thread.gpu = gpu

    def count(self, name: str) -> int:
        return self.calls.count(name)

    @property
    def device_bytes(self) -> int:
        return sum(len(buffer) for kind, buffer in self.live.values() if kind == "gpu")

    def holds(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + len(b) for start, (_, b) in self.live.items())

    def enqueue(self, work: Callable[[], None], stream: int) -> None:
        assert stream == STREAM
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def _new(self, out: Any, size: int, kind: str) -> int:
        if kind == "gpu" and self.device_bytes + size > self.memory:
            return OUT_OF_MEMORY
        buffer = (ctypes.c_char * size)(*b"\xff" * min(size, 1))
        ctypes.memset(buffer, 0xFF, size)  # as float32: NaN, which no test would miss
        out._obj.value = ctypes.addressof(buffer)
        self.live[out._obj.value] = (kind, buffer)
        self.device_of[out._obj.value] = self.current
        return 0

    def _release(self, address: int, kind: str) -> int:
        assert self.live.pop(address)[0] == kind
        return 0

    def _cudaRuntimeGetVersion(self, out: Any) -> int:  # noqa: N802 - CUDA's names, here and below
        out._obj.value = 13000
        return 0

    def _cudaGetDeviceCount(self, out: Any) -> int:  # noqa: N802
        out._obj.value = self.gpus
        return 0 if self.gpus else 100

    def _cudaGetDevice(self, out: Any) -> int:  # noqa: N802
        out._obj.value = self.current
        return 0

    def _cudaSetDevice(self, index: int) -> int:  # noqa: N802
        if index >= self.gpus:
            return 101
        self.current = index
        return 0

    def _cudaPointerGetAttributes(self, out: Any, address: int) -> int:  # noqa: N802
        kind = self.live[address][0] if address in self.live else ""
        out[0], out[1] = {"host": 1, "gpu": 2}.get(kind, 0), self.device_of.get(address, -2)
        return 0

    def _cudaDeviceGetAttribute(self, out: Any, attribute: int, _device: int) -> int:  # noqa: N802
        major, minor = self.compute_capability
        out._obj.value = {18: int(self.integrated), 19: 1, 75: major, 76: minor}[attribute]
        return 0

    def _cudaDeviceSynchronize(self) -> int:  # noqa: N802
        return 0

    def _cudaGetLastError(self) -> int:  # noqa: N802
        error, self.last_error = self.last_error, 0
        return error

    def _cudaGetErrorString(self, code: int) -> bytes:  # noqa: N802
        return {2: b"out of memory", 100: b"no CUDA-capable device is detected"}.get(code, b"unspecified")

    def _cudaMalloc(self, out: Any, size: int) -> int:  # noqa: N802
        return self._new(out, size, "gpu")

    def _cudaFree(self, address: int) -> int:  # noqa: N802
        return self._release(address, "gpu")

    def _cudaHostAlloc(self, out: Any, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 2
        return self._new(out, size, "host")

    def _cudaFreeHost(self, address: int) -> int:  # noqa: N802
        return self._release(address, "host")

    def _cudaHostGetDevicePointer(self, out: Any, address: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        assert self.live[address][0] == "host"
        out._obj.value = address
        return 0

    def _cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> int:  # noqa: N802
        assert kind == 4
        assert self.holds(target, size)
        assert self.holds(source, size)
        self.enqueue(lambda: ctypes.memmove(target, source, size) and None, stream)
        return 0

    def _cudaStreamCreateWithFlags(self, out: Any, flags: int) -> int:  # noqa: N802
        assert flags == 1
        out._obj.value = STREAM
        return 0

    def _cudaStreamDestroy(self, stream: int) -> int:  # noqa: N802
        assert stream == STREAM
        return 0

    def _cudaStreamSynchronize(self, stream: int) -> int:  # noqa: N802
        assert self.capturing is None
        assert stream == STREAM
        return 0

    def _cudaStreamWaitEvent(self, stream: int, _event: int, _flags: int) -> int:  # noqa: N802
        self.waits.append((stream, self._recorded))
        return 0

    def _cudaEventCreateWithFlags(self, out: Any, _flags: int) -> int:  # noqa: N802
        out._obj.value = 5
        return 0

    def _cudaEventRecord(self, _event: int, stream: int) -> int:  # noqa: N802
        self._recorded = stream
        return 0

    def _cudaEventDestroy(self, _event: int) -> int:  # noqa: N802
        return 0

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> int:  # noqa: N802
        assert (stream, mode) == (STREAM, 1)
        self.capturing = []
        return 0

    def _cudaStreamEndCapture(self, _stream: int, out: Any) -> int:  # noqa: N802
        recorded, self.capturing = self.capturing, None
        if self.capture_fails:
            self.last_error = 901
            return 901
        assert recorded is not None
        out._obj.value = 1000 + self.count("cudaStreamEndCapture")
        self.graphs[out._obj.value] = recorded
        return 0

    def _cudaGraphInstantiateWithFlags(self, out: Any, graph: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        out._obj.value = graph.value if isinstance(graph, ctypes.c_void_p) else graph
        return 0

    def _cudaGraphLaunch(self, graph: int, stream: int) -> int:  # noqa: N802
        for work in self.graphs[graph]:
            self.enqueue(work, stream)
        return 0

    def _cudaGraphDestroy(self, _graph: int) -> int:  # noqa: N802
        return 0

    def _cudaGraphExecDestroy(self, graph: int) -> int:  # noqa: N802
        del self.graphs[graph]
        return 0


def array_at(address: int, shape: tuple[int, ...]) -> Any:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), shape)


class FakeContext:
    """IExecutionContext."""

    def __init__(self, engine: FakeEngine):
        self._engine, self._cudart = engine, engine._cudart
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return 0 if self._engine.does_not_tell else self._needed()

    def _needed(self) -> int:
        needed = SCRATCH_BYTES_PER_PIXEL * int(np.prod(self._shapes["image"]))
        return self._engine.device_memory_size_v2 if self._engine.does_not_tell else needed

    def set_device_memory(self, memory: int, size: int) -> None:
        assert self._cudart.holds(memory, size)
        self._engine.registered.append((memory, size))
        if size < self._needed():
            self._engine.logger.log(FakeLogger.Severity.ERROR, "the memory is too small")
            return
        self._scratch = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        n, _, height, width = self._shapes["image"]
        shapes = {**self._shapes, "output": (n, 3, height, width)}
        places = {name: (self._addresses[name], shape) for name, shape in shapes.items()}
        assert self._cudart.current == self._engine.device
        scratch, needed = self._scratch, self._needed()

        def work() -> None:  # of a graph too: in the memory that it was captured with
            assert needed == 0 or (self._cudart.holds(*scratch) and scratch[1] >= needed)
            feed = {name: array_at(*places[name]).copy() for name in ("image", "mask")}
            array_at(*places["output"])[...] = self._engine.session.run(["output"], feed)[0]

        self._cudart.enqueue(work, stream_handle)
        return True


class FakeEngine:
    """ICudaEngine."""

    num_io_tensors = 3
    device_memory_size_v2 = 1 << 16
    compiled = 0
    does_not_tell = False
    """Whether it says of no shape how much memory it needs."""

    def __init__(self, cudart: FakeCudart, session: Any, logger: Any = None):
        self._cudart, self.session, self.logger = cudart, session, logger
        self.device = cudart.current
        self.registered: list[tuple[int, int]] = []

    def get_tensor_name(self, index: int) -> str:
        return ("image", "mask", "output")[index]

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "USER_MANAGED"
        return FakeContext(self)


class FakeRuntimeCache:
    """IRuntimeCache: remembers which shapes were compiled, and takes only what it wrote itself."""

    def __init__(self) -> None:
        self.kernels = b"cache:"

    def serialize(self) -> memoryview:
        return memoryview(self.kernels)

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"cache:"):
            return False
        self.kernels = bytes(blob)
        return True


class FakeRuntimeConfig:
    """IRuntimeConfig, with what it is by default."""

    def __init__(self) -> None:
        self.cuda_graph_strategy = "DISABLED"
        self.dynamic_shapes_kernel_specialization_strategy = "LAZY"
        self._strategy = "STATIC"
        self._cache: FakeRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self._cache = cache
        return True


class RtxContext(FakeContext):
    """Of TensorRT for RTX: a capture from outside would record the kernels of the moment, so here none is allowed."""

    config: FakeRuntimeConfig

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self._cudart.capturing is None
        assert self.config._cache is not None
        shape = repr(self._shapes["image"]).encode()
        if shape not in self.config._cache.kernels:
            self._engine.compiled += 1
            self.config._cache.kernels += shape
        return super().execute_async_v3(stream_handle)


class RtxEngine(FakeEngine):
    """Of TensorRT for RTX."""

    def create_runtime_config(self) -> FakeRuntimeConfig:
        assert self._cudart.current == self.device
        return FakeRuntimeConfig()

    def create_execution_context(self, runtime_config: Any) -> RtxContext:
        assert runtime_config._strategy == "USER_MANAGED"
        context = RtxContext(self)
        context.config = runtime_config
        self.graphs = runtime_config.cuda_graph_strategy
        return context


class FakeLogger:
    """ILogger."""

    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

    def __init__(self) -> None:
        pass


def fake_tensorrt(cudart: FakeCudart, onnx_file: Any, plan: bytes, engine: type[FakeEngine] = FakeEngine) -> Any:
    """Return a module that loads `plan`, and nothing else, as an engine that computes what `onnx_file` says.

    Its `engines` are those that it loaded.
    """
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    engines: list[FakeEngine] = []

    class Runtime:
        def __init__(self, logger: Any):
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> FakeEngine | None:
            assert isinstance(serialized_engine, mmap.mmap)  # a gigabyte is not read into memory to be copied once more
            if serialized_engine[:] == plan:
                engines.append(engine(cudart, session, self._logger))
                return engines[-1]
            self._logger.log(FakeLogger.Severity.ERROR, "Serialization assertion magicTagRead == kMAGIC_TAG failed.")
            return None

    return SimpleNamespace(
        ILogger=FakeLogger,
        Runtime=Runtime,
        engines=engines,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="USER_MANAGED"),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE_GRAPH_CAPTURE"),
    )
