"""Execution contexts of TensorRT-RTX: graphs captured by itself, compiled kernels kept in a file.

TensorRT-RTX compiles kernels when it first meets a shape, and shape-specialised ones later, beside
the calls: a capture of ours would keep the fallback kernels for good, its own knows when. Not run
on a GPU yet.

Source: NVIDIA, TensorRT for RTX, "Working with RTX CUDA Graphs" and "Working with Runtime Cache".
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from closeup.cache_files import read_file, replace_file

log = logging.getLogger(__name__)


def captures_by_itself(trt: Any) -> bool:
    """Whether a TensorRT makes CUDA graphs of its own: TensorRT-RTX from 1.2 on."""
    return hasattr(trt, "CudaGraphStrategy")


class RtxContexts:
    """Makes the execution contexts of one engine; they share one cache of compiled kernels.

    Args:
        engine: TensorRT-RTX's; the GPU is current.
        trt: the module ``tensorrt_rtx``.
        has_graphs: let TensorRT-RTX capture CUDA graphs.
        cache: file of compiled kernels; one of another GPU, driver or version is made anew. None:
            they are compiled at every start.
    """

    def __init__(self, engine: Any, trt: Any, *, has_graphs: bool, cache: Path | None) -> None:
        self._engine = engine
        self._memory = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        strategies = trt.CudaGraphStrategy
        self._graphs = strategies.WHOLE_GRAPH_CAPTURE if has_graphs else strategies.DISABLED
        self._path = cache
        self._kernels = engine.create_runtime_config().create_runtime_cache()
        self._known = b""
        if cache is not None:
            self._load(cache)

    def make(self) -> Any:
        """Return a context without activation memory; None where TensorRT-RTX refuses."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._memory)
        config.cuda_graph_strategy = self._graphs
        config.set_runtime_cache(self._kernels)
        return self._engine.create_execution_context(config)

    def save(self) -> None:
        """Write what was compiled; a cache that cannot be kept is no fault."""
        if self._path is None:
            return
        written = self._kernels.serialize()
        data = b"" if written is None else bytes(memoryview(written))
        if data in (b"", self._known):
            return
        try:
            replace_file(self._path, data)
        except OSError as error:
            log.warning(
                "compiled kernels cannot be kept in %s (%s): CLOSEUP_PLAN_CACHE names a folder "
                "that can be written", self._path, error.strerror or error,
            )  # fmt: skip
        else:
            self._known = data

    def _load(self, path: Path) -> None:
        try:
            data = read_file(path)
        except OSError as error:
            log.warning("compiled kernels in %s cannot be read: %s", path, error.strerror or error)
            return
        if data and self._kernels.deserialize(data):
            self._known = data
