"""A face detector that comes as an ONNX file already, as YuNet does.

The published YuNet is traced at one size, (1, 3, 640, 640), and works at any: only what its inputs
and outputs declare is fixed, and the batch in its reshapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, ValueInfoProto, numpy_helper

from closeup.errors import ExportError
from closeup.manifest import Component
from export.components import face_detector_tensors
from export.graphs import BATCH, LIMITS, Sizes, compare, describe, open_session
from export.options import hash_file

# Other than each other, and than any size that a detector is traced at.
_CASES: tuple[Sizes, ...] = (
    {BATCH: 2, "height": 96, "width": 160},
    {BATCH: 3, "height": 224, "width": 64},
)

Outputs = Mapping[str, np.ndarray[Any, Any]]


def adopt_detector(path: Path, target: Path, names: tuple[str, ...]) -> Component:
    """Write a detector to ``target``; there is no PyTorch to compare it with.

    Args:
        path: an ONNX file in YuNet's layout.
        target: of the graph; its batch, height and width vary, its outputs are ``names``.
        names: of the outputs to keep.

    Returns:
        Its entry of the manifest.

    Raises:
        ExportError: as `read_detector`.
    """
    target.write_bytes(read_detector(path, names))
    return Component(
        model="face_detector",
        sha256=hash_file(target),
        bytes=target.stat().st_size,
        precision=_precision(onnx.load(target)),
        max_abs_error=0.0,
        max_rel_error=0.0,
        checks=("taken as ONNX, not compared with PyTorch", *map(describe, _CASES)),
    )


def read_detector(path: Path, names: tuple[str, ...]) -> bytes:
    """Read a detector, with its batch, height and width freed where they are fixed.

    Args:
        path: an ONNX file in YuNet's layout: input (B, 3, H, W) float32.
        names: of the outputs (B, H * W / stride**2, channels) to keep, as ``cls_8``.

    Returns:
        The graph, the file's own bytes where nothing had to be changed.

    Raises:
        ExportError: ONNX Runtime cannot open it, it has other tensors, or it runs at one size only.
    """
    data = path.read_bytes()
    try:
        session = open_session(data)
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot open {path}: {error}") from error
    _check_tensors(path, session, names)
    model = onnx.load_from_string(data)
    if not _is_free(session, names):
        _free_axes(model, names)
        data = model.SerializeToString()
    _check_cases(path, data, session, names, limit=LIMITS[_precision(model)])
    return data


def _check_tensors(path: Path, session: ort.InferenceSession, names: tuple[str, ...]) -> None:
    inputs = {tensor.name: tensor for tensor in session.get_inputs()}
    outputs = {tensor.name: tensor for tensor in session.get_outputs()}
    expected = f"expected YuNet's: input, and {', '.join(names)}."
    if list(inputs) != ["input"] or not outputs.keys() >= set(names):
        raise ExportError(
            f"{path} has inputs {list(inputs)} and outputs {sorted(outputs)}; {expected}"
        )
    (image,) = inputs.values()
    shape = list(image.shape)
    if image.type != "tensor(float)" or len(shape) != 4 or shape[1] != 3:
        raise ExportError(
            f"{path}: input is {image.type} {shape}; expected float (batch, 3, height, width)."
        )
    for name in names:
        if len(outputs[name].shape) != 3:
            raise ExportError(
                f"{path}: output {name} is {outputs[name].shape}; expected (batch, cells, "
                "channels)."
            )


def _is_free(session: ort.InferenceSession, names: tuple[str, ...]) -> bool:
    """Whether the file can be served as it is."""
    (image,) = session.get_inputs()
    varying = [image.shape[0], *image.shape[2:]]
    for tensor in session.get_outputs():
        varying += tensor.shape[:2]
    is_whole = {tensor.name for tensor in session.get_outputs()} == set(names)
    return is_whole and not any(isinstance(axis, int) for axis in varying)


def _free_axes(model: onnx.ModelProto, names: tuple[str, ...]) -> None:
    """Declare what varies, keep the outputs ``names`` alone, and free the reshapes, in place."""
    graph = model.graph
    image, outputs = face_detector_tensors(names)
    axes = {tensor.name: tensor.axes for tensor in (image, *outputs)}
    by_name = {value.name: value for value in (*graph.input, *graph.output)}
    for name, sizes in axes.items():
        _declare(by_name[name], sizes)
    kept = [ValueInfoProto.FromString(by_name[name].SerializeToString()) for name in names]
    del graph.output[:]
    graph.output.extend(kept)
    del graph.value_info[:]  # of the one size
    _free_reshapes(graph)


def _declare(value: ValueInfoProto, axes: tuple[int | str, ...]) -> None:
    shape = value.type.tensor_type.shape
    del shape.dim[:]
    for axis in axes:
        if isinstance(axis, str):
            shape.dim.add().dim_param = axis
        else:
            shape.dim.add().dim_value = axis


def _free_reshapes(graph: onnx.GraphProto) -> None:
    """Let a reshape to (1, ...) keep the first axis of what it reshapes: 0 stands for that."""
    shapes = {weight.name: weight for weight in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    shapes[node.output[0]] = attribute.t
    for node in graph.node:
        keeps_zeros = any(one.name == "allowzero" and one.i for one in node.attribute)
        if node.op_type != "Reshape" or keeps_zeros or node.input[1] not in shapes:
            continue
        tensor = shapes[node.input[1]]
        sizes = numpy_helper.to_array(tensor).copy()
        if sizes.size > 1 and sizes[0] == 1:
            sizes[0] = 0
            tensor.CopyFrom(numpy_helper.from_array(sizes, tensor.name))


def _check_cases(
    path: Path,
    data: bytes,
    original: ort.InferenceSession,
    names: tuple[str, ...],
    *,
    limit: float,
) -> None:
    """Run the graph at other sizes: it must give every cell, and each picture what it gives alone.

    Where the original takes one size only, the graph must give there what the original gives.

    Raises:
        ExportError: it does not.
    """
    image, outputs = face_detector_tensors(names)
    refusal = (
        f"{path} is fixed inside to the size that it was traced at ({{}}); export it from its "
        "project with batch, height and width as dynamic axes."
    )
    try:
        freed = open_session(data, log_severity=4)
        for sizes in _CASES:
            pictures = _draw(image.shape(sizes))
            together = _run(freed, pictures, names)
            cells = {f"cells_{s}": sizes["height"] * sizes["width"] // s**2 for s in (8, 16, 32)}
            for tensor in outputs:
                expected = tensor.shape({**sizes, **cells})
                if together[tensor.name].shape != expected:
                    got = f"at {describe(sizes)} {tensor.name} is {together[tensor.name].shape}"
                    raise ExportError(refusal.format(f"{got}, expected {expected}"))
            alone = [_run(freed, picture[None], names) for picture in pictures]
            joined = {name: np.concatenate([one[name] for one in alone]) for name in names}
            _check_same(together, joined, limit, refusal)
        traced = [axis if isinstance(axis, int) else 64 for axis in original.get_inputs()[0].shape]
        pictures = _draw(tuple(traced))
        expected_there = _run(original, pictures, names)
        _check_same(_run(freed, pictures, names), expected_there, limit, refusal)
    except ExportError:
        raise
    except Exception as error:  # ONNX Runtime's own kinds share no base
        raise ExportError(refusal.format("it fails at others")) from error


def _check_same(got: Outputs, expected: Outputs, limit: float, refusal: str) -> None:
    for name, values in expected.items():
        if not compare(values, got[name])[1] <= limit:
            raise ExportError(refusal.format(f"{name} changes with the batch or the size"))


def _draw(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Noise in 0 to 255, float32, always the same."""
    return np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)


def _run(
    session: ort.InferenceSession, pictures: np.ndarray[Any, Any], names: tuple[str, ...]
) -> Outputs:
    return dict(zip(names, session.run(list(names), {"input": pictures}), strict=True))


def _precision(model: onnx.ModelProto) -> str:
    weights = model.graph.initializer
    return "fp16" if any(w.data_type == TensorProto.FLOAT16 for w in weights) else "fp32"
