"""Python-based Triton backend ``tensorrt``, for servers that lack the native one.

Triton runs this class for every model with ``backend: "tensorrt"``; NVIDIA's container serves the
same model folder with its native backend. Not run on a GPU yet.
"""

from __future__ import annotations

from pathlib import Path

from closeup.engine_backend import EngineBackend
from closeup.engines import Described
from closeup.plan_engine import describe_plan
from closeup.plans import read_record


class TritonPythonModel(EngineBackend):
    """One plan of the repository, in its own process with its own CUDA context."""

    model_file = "model.plan"

    @classmethod
    def describe(cls, path: Path) -> Described:
        """Read the plan's record: a config is completed without a GPU."""
        return describe_plan(read_record(path))
