"""Where a graph of lower precision changes between its own type and float32.

TensorRT keeps every type that the graph states, so a cast forgotten in the middle of the network
costs a conversion of whole activations at every step. The sampler update around the network is
float32 on purpose; inside it only norms, softmaxes and rotations of positions may be, where each
is one fused kernel of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto

from closeup.errors import ExportError

_LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_WIDE = (TensorProto.FLOAT, TensorProto.DOUBLE)
# Operations whose speed is the network's.
_HEAVY = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"})
# Operations that compute nothing.
_MOVES = frozenset(
    {
        "Reshape", "Transpose", "Slice", "Split", "Concat", "Squeeze", "Unsqueeze", "Expand",
        "Gather", "Identity", "Flatten", "Tile",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class CastReport:
    """The casts of one graph.

    Attributes:
        precision: of its network: fp32, fp16 or bf16.
        narrowing: casts from float32 to it.
        widening: casts from it to float32.
        stretches: stretches of float32 between two parts of the network, as the number of
            operations of each, by the name of its first node.
    """

    precision: str
    narrowing: int = 0
    widening: int = 0
    stretches: tuple[tuple[str, int], ...] = ()

    def describe(self) -> str:
        """Return the report as a clause, e.g. ``casts: 5 to bf16, 2 back, none inside``."""
        if not self.narrowing and not self.widening:
            return "no casts"
        inner = (
            f"{len(self.stretches)} stretches of float32 inside (at most "
            f"{max(count for _, count in self.stretches)} operations)"
            if self.stretches
            else "none inside the network"
        )
        return f"casts: {self.narrowing} to {self.precision}, {self.widening} back, {inner}"


def check_casts(path: Path, precision: str) -> CastReport:
    """Count the casts of a graph and refuse those that should not be there.

    Args:
        path: of the graph; its external data are not read.
        precision: of its network: fp32, fp16 or bf16.

    Raises:
        ExportError: in a graph of lower precision a product or convolution runs in float32, or
            values go to the other type and back with nothing computed in between.
    """
    if precision not in _LOW:
        return CastReport(precision=precision)
    graph = _Typed(onnx.load(path, load_external_data=False), _LOW[precision])
    for node in graph.nodes:
        if node.op_type in _HEAVY and any(graph.kinds.get(name) in _WIDE for name in node.input):
            raise ExportError(
                f"{path.name}: {node.op_type} {node.name} runs in float32 in a network of "
                f"{precision}: cast its inputs, or export the component in fp32."
            )
    stretches = tuple(graph.stretches())
    for name in graph.round_trips():
        raise ExportError(
            f"{path.name}: values before {name} change their type and come back with nothing "
            f"computed in between: leave both casts out (the network is {precision})."
        )
    low, kinds = graph.low, Counter(graph.cast_kinds())
    return CastReport(
        precision=precision,
        narrowing=sum(kinds[wide, low] for wide in _WIDE),
        widening=sum(kinds[low, wide] for wide in _WIDE),
        stretches=stretches,
    )


class _Typed:
    """A graph whose values' types are known."""

    def __init__(self, model: onnx.ModelProto, low: int) -> None:
        graph = onnx.shape_inference.infer_shapes(model).graph
        self.low = low
        self.nodes = list(graph.node)
        self.kinds = {
            value.name: value.type.tensor_type.elem_type
            for value in (*graph.value_info, *graph.input, *graph.output)
        }
        self.kinds |= {weight.name: weight.data_type for weight in graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                self.kinds[node.output[0]] = node.attribute[0].t.data_type
        self.casts = [node for node in self.nodes if node.op_type == "Cast"]
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        weights = {weight.name for weight in graph.initializer}
        self._after = self._reach_forward(weights)
        self._before = self._reach_backward()

    def cast_kinds(self) -> Iterator[tuple[int | None, int | None]]:
        """Yield the type before and after each cast."""
        for cast in self.casts:
            yield self.kinds.get(cast.input[0]), self.kinds.get(cast.output[0])

    def stretches(self) -> Iterator[tuple[str, int]]:
        """Yield the float32 stretches inside the network: first node, number of operations."""
        inside = {
            id(node): node
            for node in self.nodes
            if node.op_type not in ("Cast", "Constant")
            and any(self.kinds.get(name) in _WIDE for name in node.output)
            and any(name in self._after for name in node.output)
            and any(name in self._before for name in node.output)
        }
        while inside:
            _, first = next(iter(inside.items()))
            members = self._component(first, inside)
            yield first.name or first.output[0], len(members)
            for member in members:
                del inside[member]

    def round_trips(self) -> Iterator[str]:
        """Yield casts whose values were cast the other way before, and only moved since."""
        for cast in self.casts:
            kind = self.kinds.get(cast.output[0])
            source = self.maker.get(cast.input[0])
            while source is not None and source.op_type in _MOVES:
                source = self._moved_from(source)
            if source is None or source.op_type != "Cast" or source is cast:
                continue
            if not self._is_float(cast.output[0]) or not self._is_float(source.output[0]):
                continue
            if self.kinds.get(source.input[0]) == kind != self.kinds.get(source.output[0]):
                yield cast.name or cast.output[0]

    def _moved_from(self, node: NodeProto) -> NodeProto | None:
        """The maker of what a node moves; None when it joins several tensors."""
        if node.op_type == "Concat":
            return None
        return self.maker.get(node.input[0])

    def _is_float(self, name: str) -> bool:
        return self.kinds.get(name) in (*_WIDE, self.low)

    def _reach_forward(self, weights: set[str]) -> set[str]:
        """Values of any float type that depend on the network's activations."""
        reached: set[str] = set()
        for node in self.nodes:
            if node.op_type == "Constant":
                continue
            given = [name for name in node.input if self._is_float(name) and name not in weights]
            made = [name for name in node.output if self._is_float(name)]
            low = any(self.kinds.get(name) == self.low for name in made)
            if low or any(name in reached for name in given):
                reached.update(made)
        return reached

    def _reach_backward(self) -> set[str]:
        """Values of any float type that the network's activations depend on."""
        reached: set[str] = set()
        for node in reversed(self.nodes):
            low = any(self.kinds.get(name) == self.low for name in node.output)
            if low or any(name in reached for name in node.output):
                reached.update(name for name in node.input if self._is_float(name))
        return reached

    def _component(self, first: NodeProto, inside: dict[int, NodeProto]) -> set[int]:
        found, waiting = {id(first)}, [first]
        while waiting:
            node = waiting.pop()
            near = [self.maker.get(name) for name in node.input]
            near += [reader for name in node.output for reader in self.readers.get(name, ())]
            for other in near:
                if other is not None and id(other) in inside and id(other) not in found:
                    found.add(id(other))
                    waiting.append(other)
        return found
