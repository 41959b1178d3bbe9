"""The few functions of the CUDA runtime that engines need, through ctypes, without torch or pycuda; CUDA 12 and 13.

The signatures are in cuda_runtime_api.h. Only functions with the same signature in CUDA 12 and 13 are used, such as
cudaGraphInstantiateWithFlags instead of cudaGraphInstantiate, and attributes instead of cudaDeviceProp.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

from ...plugins.shared.errors import EnvironmentMismatch, MisfError

CUDA_MAJORS = (13, 12)
OUT_OF_MEMORY = 2
DRIVER_TOO_OLD = 35
GPU_MEMORY = (2, 3)  # enum cudaMemoryType: device and managed
STREAM_NON_BLOCKING = 1
EVENT_DISABLE_TIMING = 2
CAPTURE_THREAD_LOCAL = 1
HOST_ALLOC_MAPPED = 2
COPY_DEFAULT = 4  # the direction follows from the addresses
ATTRIBUTES = {"integrated": 18, "can_map_host_memory": 19, "major": 75, "minor": 76}  # enum cudaDeviceAttr

_HANDLE = POINTER(c_void_p)
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaRuntimeGetVersion": (POINTER(c_int),),
    "cudaGetDeviceCount": (POINTER(c_int),),
    "cudaGetDevice": (POINTER(c_int),),
    "cudaSetDevice": (c_int,),
    "cudaPointerGetAttributes": (c_void_p, c_void_p),
    "cudaDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cudaDeviceSynchronize": (),
    "cudaGetLastError": (),
    "cudaMalloc": (_HANDLE, c_size_t),
    "cudaFree": (c_void_p,),
    "cudaHostAlloc": (_HANDLE, c_size_t, c_uint),
    "cudaFreeHost": (c_void_p,),
    "cudaHostGetDevicePointer": (_HANDLE, c_void_p, c_uint),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaStreamCreateWithFlags": (_HANDLE, c_uint),
    "cudaStreamDestroy": (c_void_p,),
    "cudaStreamSynchronize": (c_void_p,),
    "cudaStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cudaEventCreateWithFlags": (_HANDLE, c_uint),
    "cudaEventRecord": (c_void_p, c_void_p),
    "cudaEventDestroy": (c_void_p,),
    "cudaStreamBeginCapture": (c_void_p, c_int),
    "cudaStreamEndCapture": (c_void_p, _HANDLE),
    "cudaGraphInstantiateWithFlags": (_HANDLE, c_void_p, c_ulonglong),
    "cudaGraphLaunch": (c_void_p, c_void_p),
    "cudaGraphDestroy": (c_void_p,),
    "cudaGraphExecDestroy": (c_void_p,),
}


class CudaError(MisfError):
    """A CUDA call failed; `code` is its cudaError_t."""

    def __init__(self, function: str, code: int, text: str):
        super().__init__(f"{function}: {text}" + (" (out of memory)" if code == OUT_OF_MEMORY else f" (error {code})"))
        self.code = code


class CudaRuntime:
    """libcudart, with its errors as CudaError. Handles (streams, events, graphs) and addresses are ints.

    Args:
        library: a loaded libcudart, or any object with its functions; None finds one.

    Raises:
        EnvironmentMismatch: no libcudart was found.

    """

    def __init__(self, library: Any = None):
        self._library = find_cudart() if library is None else library
        for name, arguments in SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, c_int
        self._library.cudaGetErrorString.argtypes = (c_int,)
        self._library.cudaGetErrorString.restype = c_char_p

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise CudaError(name, code, (self._library.cudaGetErrorString(code) or b"unknown error").decode())

    def _made(self, name: str, *arguments: Any) -> int:
        """Call a function and return the handle or address that it writes to its first argument."""
        handle = c_void_p()
        self._call(name, byref(handle), *arguments)
        return handle.value or 0

    def version(self) -> tuple[int, int]:
        """Return the major and minor version of the library."""
        value = c_int()
        self._call("cudaRuntimeGetVersion", byref(value))
        return value.value // 1000, value.value % 1000 // 10

    def device_count(self) -> int:
        """Return the number of GPUs; CudaError if the driver is missing or too old."""
        value = c_int()
        self._call("cudaGetDeviceCount", byref(value))
        return value.value

    def set_device(self, index: int) -> None:
        """Make a GPU current in the calling thread."""
        self._call("cudaSetDevice", index)

    @contextlib.contextmanager
    def on(self, index: int) -> Iterator[None]:
        """Make a GPU current in the calling thread for a block.

        Afterwards the previous GPU is restored if it was in use. Otherwise restoring it would create a context there,
        which takes some hundred MB of its memory.
        """
        before = c_int()
        self._call("cudaGetDevice", byref(before))
        self.set_device(index)
        try:
            yield
        finally:
            if before.value != index and in_use(before.value):
                self.set_device(before.value)

    def device_of(self, address: int) -> int | None:
        """Return the index of the GPU whose memory contains an address, or None if it is not GPU memory."""
        attributes = (c_int * 32)()  # struct cudaPointerAttributes: type, device, more; 88 bytes in CUDA 13
        self._call("cudaPointerGetAttributes", attributes, address)
        return attributes[1] if attributes[0] in GPU_MEMORY else None

    def attribute(self, name: str, device: int) -> int:
        """Return an attribute of a GPU; `name` is one of ATTRIBUTES."""
        value = c_int()
        self._call("cudaDeviceGetAttribute", byref(value), ATTRIBUTES[name], device)
        return value.value

    def compute_capability(self, device: int) -> str:
        """Return the compute capability of a GPU as 'major.minor'."""
        return f"{self.attribute('major', device)}.{self.attribute('minor', device)}"

    def malloc(self, size: int) -> int:
        """Return the address of `size` new bytes on the GPU."""
        return self._made("cudaMalloc", size)

    def free(self, address: int) -> None:
        """Free what `malloc` returned."""
        self._call("cudaFree", address)

    def host_alloc(self, size: int) -> int:
        """Return the address of `size` new pinned bytes, which the GPU can read and write too."""
        return self._made("cudaHostAlloc", size, HOST_ALLOC_MAPPED)

    def free_host(self, address: int) -> None:
        """Free what `host_alloc` returned."""
        self._call("cudaFreeHost", address)

    def device_pointer(self, host: int) -> int:
        """Return the GPU's address of pinned memory."""
        return self._made("cudaHostGetDevicePointer", host, 0)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Enqueue a copy of `size` bytes, between CPU and GPU or within one."""
        self._call("cudaMemcpyAsync", target, source, size, COPY_DEFAULT, stream)

    def stream(self) -> int:
        """Return a new stream that does not wait for the default stream."""
        return self._made("cudaStreamCreateWithFlags", STREAM_NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        """Destroy what `stream` returned."""
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int | None = None) -> None:
        """Wait for a stream, or for the whole GPU."""
        if stream is None:
            self._call("cudaDeviceSynchronize")
        else:
            self._call("cudaStreamSynchronize", stream)

    def wait_for(self, stream: int, other: int) -> None:
        """Make later work on `stream` wait for the work that is now enqueued on `other`."""
        event = self._made("cudaEventCreateWithFlags", EVENT_DISABLE_TIMING)
        try:
            self._call("cudaEventRecord", event, other)
            self._call("cudaStreamWaitEvent", stream, event, 0)
        finally:
            self._call("cudaEventDestroy", event)

    def begin_capture(self, stream: int) -> None:
        """Record the work that this thread enqueues on a stream, instead of running it."""
        self._call("cudaStreamBeginCapture", stream, CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """Return the recorded work as a graph, which can be launched repeatedly."""
        graph = c_void_p()
        self._call("cudaStreamEndCapture", stream, byref(graph))
        try:
            return self._made("cudaGraphInstantiateWithFlags", graph.value, 0)
        finally:
            self._call("cudaGraphDestroy", graph.value)

    def abandon_capture(self, stream: int) -> None:
        """End a capture that failed, and clear its error."""
        graph = c_void_p()
        if self._library.cudaStreamEndCapture(stream, byref(graph)) == 0 and graph.value:
            self._library.cudaGraphDestroy(graph)
        self._library.cudaGetLastError()

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue a graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Destroy what `end_capture` returned."""
        self._call("cudaGraphExecDestroy", graph)


def find_cudart() -> Any:
    """Return a loaded libcudart: one already in the process, the system's, or one of a pip package.

    It is the first one for which the driver is new enough, or else the first one; EnvironmentMismatch if there is none.
    """
    found: list[Any] = []
    problems = []
    loaded = getattr(os, "RTLD_NOLOAD", ctypes.DEFAULT_MODE)  # absent on Windows
    tries = [(f"libcudart.so.{major}", loaded) for major in CUDA_MAJORS]
    for name, mode in [*tries, *((name, ctypes.DEFAULT_MODE) for name in _candidates())]:
        try:
            library = ctypes.CDLL(name, mode=mode)
        except OSError as error:
            if Path(name).is_absolute():
                problems.append(str(error))
            continue
        if library.cudaGetDeviceCount(byref(c_int())) != DRIVER_TOO_OLD:
            return library
        found.append(library)
    if found:
        return found[0]
    raise EnvironmentMismatch(
        "the CUDA runtime library libcudart was not found"
        + (f" ({'; '.join(problems)})" if problems else "")
        + ": install CUDA 12 or 13, or pip install nvidia-cuda-runtime"
    )


def cudart_folders() -> list[str]:
    """Return the non-system folders with a libcudart, for libraries that search fewer folders."""
    return list(dict.fromkeys(str(Path(name).parent) for name in _candidates() if Path(name).is_absolute()))


def _candidates() -> Iterator[str]:
    for major in CUDA_MAJORS:
        yield f"libcudart.so.{major}"
    for folder in ("/usr/local/cuda/lib64", "/usr/local/cuda/lib"):
        yield from sorted(map(str, Path(folder).glob("libcudart.so.1[23]")), reverse=True)
    for entry in map(Path, sys.path):
        for pattern in ("nvidia/cu13/lib/libcudart.so.13", "nvidia/cuda_runtime/lib/libcudart.so.1[23]"):
            yield from sorted(map(str, entry.glob(pattern)), reverse=True)


def gpu_name(device: int) -> str:
    """Return a GPU's name from the driver, or 'unknown GPU'.

    The CUDA runtime has the name only in a structure that differs between CUDA 12 and 13.
    """
    driver = _driver()
    name, handle = ctypes.create_string_buffer(256), c_int()
    if driver is None or driver.cuDeviceGet(byref(handle), device) or driver.cuDeviceGetName(name, 256, handle):
        return "unknown GPU"
    return name.value.decode(errors="replace")


def in_use(device: int) -> bool:
    """Return whether this process has a context on a GPU; True if there is no driver to query."""
    driver, handle, flags, active = _driver(), c_int(), c_uint(), c_int()
    if driver is None or driver.cuDeviceGet(byref(handle), device):
        return True
    failed = driver.cuDevicePrimaryCtxGetState(handle, byref(flags), byref(active))
    return bool(failed or active.value)


def _driver() -> Any:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return None if driver.cuInit(0) else driver
