"""Small repairs of a traced graph that change no value."""

from __future__ import annotations

import onnx
from onnx import NodeProto, TensorProto

_LOW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def tidy_model(model: onnx.ModelProto) -> None:
    """Repair what the exporter writes badly, in place."""
    drop_zero_pads(model.graph)
    drop_cast_pairs(model)


def drop_zero_pads(graph: onnx.GraphProto) -> None:
    """Leave out Pad's value where it is zero, its default: in bfloat16 it is traced as a double."""
    constants = {
        node.output[0]: onnx.numpy_helper.to_array(attribute.t)
        for node in graph.node
        for attribute in node.attribute
        if node.op_type == "Constant" and attribute.name == "value"
    }
    for node in graph.node:
        if node.op_type == "Pad" and len(node.input) == 3:
            value = constants.get(node.input[2])
            if value is not None and not value.any():
                del node.input[2]
    read = {name for node in graph.node for name in node.input}
    _remove(graph, set(constants) - read - {value.name for value in graph.output})


def drop_cast_pairs(model: onnx.ModelProto) -> None:
    """Remove casts to float32 that are only cast back.

    ``softmax(x, dtype=float32).to(x.dtype)`` is traced as a softmax and two casts behind it.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    pairs = [
        (node, makers[node.input[0]])
        for node in graph.node
        if _target(node) in _LOW
        and node.input[0] in makers
        and _target(makers[node.input[0]]) == TensorProto.FLOAT
    ]
    if not pairs:
        return
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.value_info, *inferred.input)
    }
    outputs = {value.name for value in graph.output}
    sources = {
        back.output[0]: wide.input[0]
        for back, wide in pairs
        if kinds.get(wide.input[0]) == _target(back) and back.output[0] not in outputs
    }
    for node in graph.node:
        for number, name in enumerate(node.input):
            if name in sources:
                node.input[number] = sources[name]
    _remove(graph, set(sources))
    read = {name for node in graph.node for name in node.input} | outputs
    _remove(graph, {n.output[0] for n in graph.node if n.op_type == "Cast"} - read)


def _target(node: NodeProto) -> int | None:
    """The type that a cast casts to; None for other nodes."""
    if node.op_type != "Cast":
        return None
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == "to")


def _remove(graph: onnx.GraphProto, made: set[str]) -> None:
    """Take out the nodes whose only output is one of ``made``."""
    # Copies are made before the field is emptied, which would free its nodes.
    kept = [
        NodeProto.FromString(node.SerializeToString())
        for node in graph.node
        if not (len(node.output) == 1 and node.output[0] in made)
    ]
    del graph.node[:]
    graph.node.extend(kept)
