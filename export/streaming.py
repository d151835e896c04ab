"""Graphs too large for one protobuf: traced without weights, then the weights written one by one.

The exporters of torch and optimum hold several copies of all weights. Here the trace leaves every
parameter as an input of the graph; afterwards each becomes an initializer whose bytes go straight
to the data file. The memory needed beside the module is that of one tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

if TYPE_CHECKING:
    from export.graphs import Graph

DATA_SUFFIX = "_data"
# ONNX Runtime maps tensors that begin at a page.
_ALIGNMENT = 4096
# Smaller ones stay in the graph, where shape inference can read them.
_INLINE_BYTES = 1024
_ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


def write_streamed(graph: Graph, path: Path, opset: int) -> None:
    """Write ``graph`` to ``path`` and its weights to ``model.onnx_data`` beside it."""
    weights = dict(_weights(graph.module))
    _trace(graph, path, opset)
    model = onnx.load(path, load_external_data=False)
    with path.with_name(path.name + DATA_SUFFIX).open("wb") as file:
        _move_weights(model.graph, weights, file)
    onnx.save(model, path)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for _, tensor in _weights(module, remove_duplicate=True))


def _weights(module: nn.Module, *, remove_duplicate: bool = False) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=remove_duplicate)
    yield from module.named_buffers(remove_duplicate=remove_duplicate)


def _trace(graph: Graph, path: Path, opset: int) -> None:
    inputs = graph.draw(graph.cases[0], 0)
    axes = {tensor.name: tensor.dynamic_axes for tensor in (*graph.inputs, *graph.outputs)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph.module,
            (inputs,),
            path,
            input_names=[tensor.name for tensor in graph.inputs],
            output_names=[tensor.name for tensor in graph.outputs],
            dynamic_axes={name: axis for name, axis in axes.items() if axis},
            opset_version=opset,
            export_params=False,
            do_constant_folding=False,
            dynamo=False,
        )


def _move_weights(graph: onnx.GraphProto, weights: dict[str, Tensor], file: IO[bytes]) -> None:
    """Turn the graph's inputs that are weights into initializers, bytes in ``file``."""
    transposed = _fold_transposes(graph, set(weights))
    inputs = list(graph.input)
    del graph.input[:]
    for value in inputs:
        if value.name not in weights:
            graph.input.append(value)
            continue
        tensor = weights[value.name].detach()
        if value.name in transposed:
            tensor = tensor.t()
        graph.initializer.append(_initializer(value.name, tensor, file))


def _fold_transposes(graph: onnx.GraphProto, weights: set[str]) -> set[str]:
    """Remove the transposes of weights that nothing else reads; returns the weights' names.

    A linear layer is traced as a product with its transposed weight; stored transposed, no engine
    has to make that copy when it is opened.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    names: set[str] = set()
    renamed: dict[str, str] = {}
    removed: set[int] = set()
    for name in weights:
        nodes = readers.get(name, [])
        if nodes and all(_is_transpose(node) for node in nodes):
            names.add(name)
            renamed |= {node.output[0]: name for node in nodes}
            removed |= {id(node) for node in nodes}
    kept = [node for node in graph.node if id(node) not in removed]
    for node in kept:
        for number, name in enumerate(node.input):
            if name in renamed:
                node.input[number] = renamed[name]
    # Copies are made before the field is emptied, which would free its nodes.
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(copies)
    return names


def _is_transpose(node: onnx.NodeProto) -> bool:
    order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
    return bool(node.op_type == "Transpose" and order == [1, 0])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    offset: int
    length: int


def _initializer(name: str, tensor: Tensor, file: IO[bytes]) -> onnx.TensorProto:
    values = _bits(tensor.cpu().contiguous()).numpy()  # a module on a GPU is traced there
    proto = TensorProto(name=name, dims=values.shape, data_type=_ONNX_TYPES[tensor.dtype])
    if values.nbytes <= _INLINE_BYTES:
        proto.raw_data = values.tobytes()
        return proto
    place = _append(values, file)
    proto.data_location = TensorProto.EXTERNAL
    location = Path(file.name).name
    for key, value in (
        ("location", location), ("offset", str(place.offset)), ("length", str(place.length)),
    ):  # fmt: skip
        proto.external_data.add(key=key, value=value)
    return proto


def _bits(tensor: Tensor) -> Tensor:
    """View bfloat16 as int16: numpy has no such type, and only the bytes are written."""
    return tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor


def _append(values: np.ndarray[Any, Any], file: IO[bytes]) -> _Place:
    padding = -file.tell() % _ALIGNMENT if values.nbytes >= _ALIGNMENT else 0
    file.write(b"\0" * padding)
    offset = file.tell()
    file.write(values.reshape(-1).view(np.uint8).data)
    return _Place(offset=offset, length=values.nbytes)
