"""A face detector that comes as an ONNX file already, as YuNet does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from closeup.errors import ExportError
from closeup.manifest import Component
from export.graphs import open_session
from export.options import hash_file


@dataclass(frozen=True, kw_only=True, slots=True)
class AdoptedDetector:
    """A detector taken over.

    Attributes:
        component: its entry of the manifest.
        has_batch: its first axis varies.
    """

    component: Component
    has_batch: bool


def adopt_detector(path: Path, target: Path, names: tuple[str, ...]) -> AdoptedDetector:
    """Copy a detector to ``target``; there is no PyTorch to compare it with.

    Raises:
        ExportError: ONNX Runtime cannot open it, or it lacks one of the outputs ``names``.
    """
    target.write_bytes(path.read_bytes())
    try:
        session = open_session(target)
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot open {path}: {error}") from error
    inputs = [tensor.name for tensor in session.get_inputs()]
    outputs = {tensor.name for tensor in session.get_outputs()}
    if inputs != ["input"] or not outputs.issuperset(names):
        raise ExportError(
            f"{path} has inputs {inputs} and outputs {sorted(outputs)}; expected YuNet's: "
            f"input, and {', '.join(names)}."
        )
    component = Component(
        model="face_detector",
        sha256=hash_file(target),
        bytes=target.stat().st_size,
        precision=_precision(target),
        max_abs_error=0.0,
        max_rel_error=0.0,
        checks=("taken as ONNX, not compared with PyTorch",),
    )
    has_batch = isinstance(session.get_inputs()[0].shape[0], str)
    return AdoptedDetector(component=component, has_batch=has_batch)


def _precision(path: Path) -> str:
    weights = onnx.load(path).graph.initializer
    return "fp16" if any(w.data_type == TensorProto.FLOAT16 for w in weights) else "fp32"
