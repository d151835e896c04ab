"""A bfloat16 graph with all its arithmetic in float32, to be compared with PyTorch on a CPU.

ONNX Runtime has no bfloat16 kernels on a CPU. The twin keeps the weights as they are, widens each
where it is read, and drops every rounding in between: run beside the same module in float32, with
the same rounded weights, it agrees to float32's rounding, so a wrong layer or constant shows as
clearly as in a float32 export.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

TWIN_SUFFIX = ".float32.onnx"


def write_float_twin(path: Path) -> Path:
    """Write the twin of ``path`` beside it; external data is shared.

    Args:
        path: a graph in bfloat16.

    Returns:
        The twin's path. Its inputs and outputs are float32 where the graph's are bfloat16.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    widened = {weight.name for weight in graph.initializer if _is_bfloat(weight.data_type)}
    for node in graph.node:
        for number, name in enumerate(node.input):
            if name in widened:
                node.input[number] = f"{name}/float32"
        for attribute in node.attribute:
            _widen_attribute(node, attribute)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if _is_bfloat(value.type.tensor_type.elem_type):
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes = [*_casts(widened), *graph.node]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    target = path.with_name(path.name + TWIN_SUFFIX)
    onnx.save(model, target)
    return target


def _casts(widened: set[str]) -> Iterator[NodeProto]:
    for name in sorted(widened):
        yield helper.make_node("Cast", [name], [f"{name}/float32"], to=TensorProto.FLOAT)


def _widen_attribute(node: NodeProto, attribute: AttributeProto) -> None:
    """Turn a target type or a constant of bfloat16 into float32."""
    if attribute.name in ("to", "dtype") and _is_bfloat(attribute.i):
        attribute.i = TensorProto.FLOAT
    elif attribute.type == AttributeProto.TENSOR and _is_bfloat(attribute.t.data_type):
        values = np.asarray(numpy_helper.to_array(attribute.t)).astype(np.float32)
        attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
    elif attribute.type == AttributeProto.GRAPH:
        raise ValueError(f"{node.op_type} {node.name} has a graph of its own")


def _is_bfloat(kind: int) -> bool:
    return kind == TensorProto.BFLOAT16
