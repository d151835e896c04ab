"""A graph to export: a torch module with named tensors, written and checked through optimum.

The same `GraphTensor` declarations name the ONNX file's inputs and outputs, draw the inputs that
it is checked with, and become the ``config.pbtxt`` beside it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from optimum.exporters.onnx import OnnxConfig
from optimum.exporters.onnx.convert import export_pytorch, validate_model_outputs
from optimum.utils import NormalizedConfig
from torch import Tensor, nn

from closeup.errors import ExportError
from closeup.manifest import Component
from closeup.plans import graph_bytes, hash_graph
from closeup.tensors import TritonTensor
from export.float_twin import write_float_twin
from export.precisions import Precision
from export.streaming import weight_bytes, write_streamed
from export.tidy import tidy_model

OPSET = 18
BATCH = "batch"
# Relative 2-norm of the difference to PyTorch. Rounding gives about 1e-6 in float32 (deep
# networks 1e-5) and 2e-3 in float16; a missing layer or a wrong constant gives 1e-1 and more.
# bfloat16 graphs are compared in float32 (`export.float_twin`), which leaves their constants' own
# rounding, up to 4e-3 each.
LIMITS = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-2}
# Optimum writes smaller ones, folding constants on the way.
STREAM_BYTES = 1 << 30
_TRITON_TYPES = {
    torch.float32: "TYPE_FP32",
    torch.float16: "TYPE_FP16",
    torch.bfloat16: "TYPE_BF16",
    torch.int64: "TYPE_INT64",
}
_DTYPES = {
    Precision.FP32: torch.float32,
    Precision.FP16: torch.float16,
    Precision.BF16: torch.bfloat16,
}

Sizes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphTensor:
    """An input or output of a graph.

    Attributes:
        name: in the ONNX file and in Triton.
        axes: one entry a dimension: its size, or the name of a size that varies.
        dtype: element type.
    """

    name: str
    axes: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Axis -> name of the sizes that vary."""
        return {i: axis for i, axis in enumerate(self.axes) if isinstance(axis, str)}

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The shape when the varying sizes are ``sizes``."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.axes)

    def triton(self) -> TritonTensor:
        """The declaration for config.pbtxt; a first axis called batch is left out."""
        axes = self.axes[1:] if self.axes[0] == BATCH else self.axes
        return TritonTensor(
            name=self.name,
            data_type=_TRITON_TYPES[self.dtype],
            dims=tuple(-1 if isinstance(axis, str) else axis for axis in axes),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """What is exported to one ``model.onnx``.

    Attributes:
        title: for messages, e.g. ``VAE decoder``.
        module: forward takes the inputs by name and returns a dict by output name.
        inputs: in the order of forward's arguments.
        outputs: in order.
        draw: draws inputs of given sizes from a seed.
        cases: sizes to check at; the first is also the one that is traced.
        precision: of the weights: fp32, fp16 or bf16.
        use_validation: let optimum validate it too (it opens one more session).
    """

    title: str
    module: nn.Module
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    draw: Callable[[Sizes, int], dict[str, Tensor]]
    cases: tuple[Sizes, ...]
    precision: str = "fp32"
    use_validation: bool = True


class GraphOnnxConfig(OnnxConfig):  # type: ignore[misc]
    """optimum's description of a `Graph`."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig
    DEFAULT_ONNX_OPSET = OPSET

    def __init__(self, graph: Graph, seed: int) -> None:
        super().__init__(graph.module.config)
        self.graph = graph
        self.seed = seed

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Input name -> varying axes."""
        return {tensor.name: tensor.dynamic_axes for tensor in self.graph.inputs}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Output name -> varying axes."""
        return {tensor.name: tensor.dynamic_axes for tensor in self.graph.outputs}

    def generate_dummy_inputs(self, framework: str = "pt", **sizes: int) -> dict[str, Tensor]:
        """Draw inputs; sizes that are not given are the first case's."""
        return self.graph.draw({**self.graph.cases[0], **sizes}, self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far a graph in ONNX Runtime is from PyTorch, over all cases."""

    max_abs_error: float
    max_rel_error: float
    checks: tuple[str, ...]


def normal_inputs(*tensors: GraphTensor) -> Callable[[Sizes, int], dict[str, Tensor]]:
    """Make a ``draw`` that gives every tensor standard normal values."""

    def draw(sizes: Sizes, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {t.name: torch.randn(t.shape(sizes), generator=generator) for t in tensors}

    return draw


def uniform_inputs(
    low: float, high: float, *tensors: GraphTensor
) -> Callable[[Sizes, int], dict[str, Tensor]]:
    """Make a ``draw`` that gives every tensor uniform values in [low, high)."""

    def draw(sizes: Sizes, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            t.name: low + (high - low) * torch.rand(t.shape(sizes), generator=generator)
            for t in tensors
        }

    return draw


def write_graph(graph: Graph, path: Path) -> None:
    """Export ``graph`` to ``path``; weights past `STREAM_BYTES` to ``model.onnx_data`` beside it.

    Raises:
        ExportError: torch or optimum cannot export it.
    """
    _prepare_module(graph.module)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with quiet_exporters():
            if weight_bytes(graph.module) > STREAM_BYTES:
                write_streamed(graph, path, OPSET)
            else:
                export_pytorch(graph.module, GraphOnnxConfig(graph, seed=0), OPSET, path)
            _declare_shapes(graph, path)
        for file in path.parent.glob(f"{path.name}*"):
            file.chmod(0o644)  # external data is written for its owner alone
    except Exception as error:
        raise ExportError(
            f"the {graph.title} cannot be exported to ONNX: {type(error).__name__}: {error}"
        ) from error


def check_graph(graph: Graph, path: Path, *, limit: float | None = None) -> Agreement:
    """Compare the file with PyTorch on fresh random inputs of every case.

    Raises:
        ExportError: a difference is past ``limit``, by default `LIMITS` of the precision.
    """
    if graph.use_validation and graph.precision != Precision.BF16:
        _validate_with_optimum(graph, path)
    return compare_with(graph, path, reference_outputs(graph), limit=limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """PyTorch's outputs at one case.

    Attributes:
        sizes: the case.
        inputs: by name.
        outputs: by name.
    """

    sizes: Sizes
    inputs: Mapping[str, np.ndarray[Any, Any]]
    outputs: Mapping[str, np.ndarray[Any, Any]]


def reference_outputs(graph: Graph) -> tuple[Reference, ...]:
    """Run the module on fresh random inputs of every case.

    A module in bfloat16 is turned into float32 in place: see `export.float_twin`.
    """
    references = []
    _prepare_module(graph.module)
    if graph.precision == Precision.BF16:
        graph.module.float()
    for number, sizes in enumerate(graph.cases):
        drawn = graph.draw(sizes, 1000 + number)
        inputs = {name: _readable(value) for name, value in drawn.items()}
        with torch.inference_mode():
            outputs = graph.module(**inputs)
        references.append(
            Reference(
                sizes=sizes,
                inputs={name: value.numpy() for name, value in inputs.items()},
                outputs={tensor.name: outputs[tensor.name].numpy() for tensor in graph.outputs},
            )
        )
    return tuple(references)


def compare_with(
    graph: Graph, path: Path, references: Sequence[Reference], *, limit: float | None = None
) -> Agreement:
    """Compare the file with what PyTorch gave.

    Raises:
        ExportError: a difference is past ``limit``, by default `LIMITS` of the precision.
    """
    limit = LIMITS[graph.precision] if limit is None else limit
    session = _session_to_compare(graph, path)
    absolute = relative = 0.0
    for case in references:
        results = session.run(list(case.outputs), dict(case.inputs))
        for (name, expected), result in zip(case.outputs.items(), results, strict=True):
            error = compare(expected, result)
            if not error[1] <= limit:
                raise ExportError(
                    f"the {graph.title} does not agree with PyTorch: output {name} at "
                    f"{describe(case.sizes)} differs by {error[1]:.2e} of its norm (largest value "
                    f"{error[0]:.2e}), the limit is {limit:.0e}. Nothing was written."
                )
            absolute, relative = max(absolute, error[0]), max(relative, error[1])
    return Agreement(
        max_abs_error=absolute,
        max_rel_error=relative,
        checks=tuple(describe(case.sizes) for case in references),
    )


def compare(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the largest absolute difference and the relative difference of the 2-norms.

    Both are infinite when the shapes differ or a value is not finite.
    """
    if expected.shape != got.shape:
        return float("inf"), float("inf")
    difference = got.astype(np.float64) - expected.astype(np.float64)
    if not np.isfinite(difference).all():
        return float("inf"), float("inf")
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.abs(difference).max()), float(np.linalg.norm(difference)) / max(norm, 1e-12)


def export_graph(graph: Graph, path: Path, model: str) -> Component:
    """Write and check ``graph``; returns its entry of the manifest.

    Raises:
        ExportError: it cannot be exported or does not agree with PyTorch.
    """
    write_graph(graph, path)
    return component_of(path, model, graph.precision, check_graph(graph, path))


def component_of(path: Path, model: str, precision: str, agreement: Agreement) -> Component:
    """Return the manifest's entry of a file that was checked."""
    return Component(
        model=model,
        sha256=hash_graph(path),
        bytes=graph_bytes(path),
        precision=precision,
        max_abs_error=agreement.max_abs_error,
        max_rel_error=agreement.max_rel_error,
        checks=agreement.checks,
    )


def torch_dtype(precision: Precision) -> torch.dtype:
    """Return the element type of a precision."""
    return _DTYPES[precision]


def describe(sizes: Sizes) -> str:
    """Sizes in words, e.g. ``batch 2, height 16, width 24``."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def open_session(graph: Path | bytes, *, log_severity: int = 3) -> ort.InferenceSession:
    """Open a file, or its bytes, in ONNX Runtime on the CPU with torch's number of threads.

    Args:
        graph: without external data where it is bytes.
        log_severity: of what ONNX Runtime prints; 3 are errors, 4 only what is fatal.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = log_severity
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _session_to_compare(graph: Graph, path: Path) -> ort.InferenceSession:
    """Open the file, or in its place the float32 twin of a bfloat16 one."""
    if graph.precision != Precision.BF16:
        return open_session(path)
    twin = write_float_twin(path)
    try:
        return open_session(twin)
    finally:
        twin.unlink()


def _readable(value: Tensor) -> Tensor:
    """Widen bfloat16, which numpy has not."""
    return value.float() if value.dtype is torch.bfloat16 else value


def _declare_shapes(graph: Graph, path: Path) -> None:
    """Give the file's inputs and outputs the declared axes; tracing leaves some of them open."""
    model = onnx.load(path, load_external_data=False)
    tidy_model(model)
    declared = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
    for value in (*model.graph.input, *model.graph.output):
        shape = value.type.tensor_type.shape
        del shape.dim[:]
        for axis in declared[value.name].axes:
            if isinstance(axis, str):
                shape.dim.add().dim_param = axis
            else:
                shape.dim.add().dim_value = axis
    onnx.save(model, path)


def _validate_with_optimum(graph: Graph, path: Path) -> None:
    # optimum compares absolutely; this only asks for the right names, axes and shapes, and for
    # values that are not far off. The strict, relative comparison is `check_graph`.
    try:
        with quiet_exporters():
            validate_model_outputs(
                GraphOnnxConfig(graph, seed=1),
                graph.module,
                path,
                [tensor.name for tensor in graph.outputs],
                atol=1e-2 if graph.precision == "fp32" else 1e-1,
                use_subprocess=False,
            )
    except Exception as error:
        raise ExportError(f"optimum refuses the exported {graph.title}: {error}") from error


def _prepare_module(module: nn.Module) -> None:
    module.eval().requires_grad_(False)
    if not hasattr(module, "config"):
        module.config = SimpleNamespace()  # type: ignore[assignment]


@contextlib.contextmanager
def quiet_exporters() -> Iterator[None]:
    """Keep the exporters' chatter off the terminal."""
    levels = {name: logging.getLogger(name).level for name in ("optimum", "torch.onnx")}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
