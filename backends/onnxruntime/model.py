"""Python-based Triton backend ``onnxruntime``, for servers that lack the native one.

Triton runs this class for every model with ``backend: "onnxruntime"``.
"""

from __future__ import annotations

from pathlib import Path

from closeup.engine_backend import EngineBackend
from closeup.engines import Described, EngineOptions, open_engine
from closeup.onnx_serving import MODEL_FILE


class TritonPythonModel(EngineBackend):
    """One graph of the repository, in its own process."""

    model_file = MODEL_FILE

    @classmethod
    def describe(cls, path: Path) -> Described:
        """Open the graph: nothing runs here, so nothing is optimised."""
        return open_engine(
            path, options=EngineOptions(graph_optimization="disabled", use_cuda=False)
        )
