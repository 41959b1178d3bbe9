"""Running engines of TensorRT for RTX, which compiles kernels for each shape in the process that runs the engine.

A new shape starts on general kernels while specialised ones are compiled in the background. Our CUDA graph would keep
the general ones, so TensorRT captures its own; misf-build makes engines that allow this (REQUIRE_USER_ALLOCATION).
"""

from __future__ import annotations

import logging
import re
from typing import Any

from ...plugins.dynamic_filter.tensorrt import library
from ...plugins.shared.command import one_line
from ...plugins.shared.files import written_whole

log = logging.getLogger(__name__)


class RtxKernels:
    """The compiled kernels for a version of TensorRT for RTX and a GPU, kept in misf's cache folder."""

    def __init__(self, version: str, gpu: str):
        name = f"kernels-tensorrt-rtx-{version}-{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}.cache"
        self._path = library.install_folder().parent / name
        self._cache: Any = None
        self._stored = b""

    def runtime_config(self, trt: Any, engine: Any, cuda_graph: bool) -> Any:
        """Return the configuration for the contexts of `engine`. Its GPU must be current in this thread."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if cuda_graph:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = config.create_runtime_cache()
        self._stored = self._path.read_bytes() if self._path.is_file() else b""
        if self._stored and not self._cache.deserialize(self._stored):
            log.info("the kernels in %s are for another driver or damaged: compiling them again", self._path)
        config.set_runtime_cache(self._cache)
        return config

    def save(self) -> None:
        """Save the kernels if there are new ones."""
        data = bytes(self._cache.serialize())
        if data == self._stored:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(self._path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            log.warning("the compiled kernels were not saved: %s", one_line(error))
