"""closeup's own denoiser graph at a family's real size in ONNX Runtime, and through our engine."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from benchmarks.gpu_blocks import NotRun, first_line
from benchmarks.gpu_findings import ORT, ORT_ENGINE, ORT_GRAPH, Findings
from benchmarks.gpu_models import Subject, build_network
from benchmarks.gpu_timing import median_ms
from closeup.engines import EngineOptions, open_engine
from closeup.onnx_engine import CUDA_PROVIDER
from export.denoiser import denoiser_graph
from export.graphs import OPSET, Graph, Sizes, compare
from export.streaming import write_streamed

# As `make gpu-check`: half precision against PyTorch's own half precision on the same weights.
HALF_LIMIT = 2e-2
_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(kw_only=True)
class OnnxSteps:
    """Exports a subject's denoiser on the device and times it.

    Attributes:
        subject: which network.
        device: cuda or cpu; both for the export and for ONNX Runtime.
        dtype: of the weights.
        rank: of the LoRA inputs; 0 leaves them out.
        folder: for the graph and its weights.
        found: takes the figures.
    """

    subject: Subject
    device: str
    dtype: torch.dtype
    rank: int
    folder: Path
    found: Findings
    _graph: Graph | None = None
    _reference: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The graph's file."""
        return self.folder / f"{self.subject.name}_denoiser" / "1" / "model.onnx"

    @property
    def precision(self) -> str:
        """Of the network: fp32, fp16 or bf16."""
        return _PRECISIONS[self.dtype]

    def export(self) -> None:
        """Write the graph, and keep PyTorch's answer to one call for `compare_reference`."""
        graph = self._describe()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_streamed(graph, self.path, OPSET)
        with torch.inference_mode():
            outputs = graph.module(**graph.draw(self._sizes(1), 1))
        self._reference = {name: value.cpu() for name, value in outputs.items()}
        # Only the tensors' names, axes and `draw` are needed from here on.
        self._graph = dataclasses.replace(graph, module=torch.nn.Identity())
        del graph, outputs
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        weights = self.path.with_name(f"{self.path.name}_data").stat().st_size
        self.found.note(
            self.subject.name,
            f"closeup's graph: exported in opset {OPSET}, LoRA rank {self.rank}, "
            f"{weights / 1e9:.2f} GB of weights, {_count_casts(self.path)} Cast nodes.",
        )

    def _describe(self) -> Graph:
        """The graph, with its network and the inputs it draws on the device."""
        graph = denoiser_graph(
            build_network(self.subject, device=self.device, dtype=self.dtype),
            max_tokens=self.subject.tokens,
            max_rank=self.rank,
            max_batch=8,
            precision=self.precision,
        )
        graph.module.eval().requires_grad_(False)
        draw = graph.draw

        def draw_on_device(sizes: Sizes, seed: int) -> dict[str, Tensor]:
            return {name: value.to(self.device) for name, value in draw(sizes, seed).items()}

        return dataclasses.replace(graph, draw=draw_on_device)

    def time_session(self, batches: Sequence[int], *, nhwc: bool, use_graph: bool) -> None:
        """Time ONNX Runtime with every tensor on the device.

        Args:
            batches: pictures in a call.
            nhwc: let the provider run convolutions with channels last.
            use_graph: replay calls from a CUDA graph.

        Raises:
            NotRun: no CUDA provider, a bfloat16 graph, or it was not exported.
        """
        if self.dtype is torch.bfloat16:
            raise NotRun("the graph is bf16, for TensorRT; ONNX Runtime has too few kernels of it.")
        self._require_graph()
        session = self._session(nhwc=nhwc, use_graph=use_graph)
        for batch in batches:
            call, outputs = self._bound(session, batch)
            if batch == 1:
                call()
                self.compare_reference({n: value.cpu().numpy() for n, value in outputs.items()})
            ms = median_ms(call, device=self.device)
            side = ORT_GRAPH if use_graph else ORT
            key = (self.subject.name, side, batch)
            self.found.step_ms[key] = min(ms, self.found.step_ms.get(key, ms))
            layout = "channels last" if nhwc else "channels first"
            self.found.note(
                self.subject.name, f"{side}, convolutions {layout}, batch {batch}: {ms:.2f} ms."
            )

    def time_engine(self, batches: Sequence[int]) -> None:
        """Time the same graph through `closeup.engines`, as the denoiser's process runs it.

        Raises:
            NotRun: it was not exported.
        """
        self._require_graph()
        engine = open_engine(self.path, options=EngineOptions(threads=4))
        try:
            for batch in batches:
                feeds = self.host_inputs(batch)
                ms = median_ms(partial(engine.run, feeds), device="cpu")
                self.found.step_ms[self.subject.name, ORT_ENGINE, batch] = ms
        finally:
            engine.close()

    def host_inputs(self, batch: int) -> dict[str, np.ndarray[Any, Any]]:
        """Return the inputs of a call for ``batch`` pictures, read-only, by name."""
        feeds = {name: value.cpu().numpy() for name, value in self._draw(batch).items()}
        for array in feeds.values():
            array.setflags(write=False)  # engines on a GPU take such an array there once
        return feeds

    def _require_graph(self) -> None:
        if self._graph is None:
            raise NotRun("its graph was not exported.")

    def _session(self, *, nhwc: bool, use_graph: bool) -> Any:
        import onnxruntime as ort

        ort.set_default_logger_severity(3)
        if self.device == "cpu":
            return ort.InferenceSession(str(self.path), providers=["CPUExecutionProvider"])
        if CUDA_PROVIDER not in ort.get_available_providers():
            raise NotRun(missing_cuda_provider())
        options = {
            "cudnn_conv_algo_search": "HEURISTIC",
            "prefer_nhwc": "1" if nhwc else "0",
            "use_tf32": "0",
            "enable_cuda_graph": "1" if use_graph else "0",
        }
        session = ort.InferenceSession(str(self.path), providers=[(CUDA_PROVIDER, options)])
        if session.get_providers()[0] != CUDA_PROVIDER:
            raise NotRun(f"ONNX Runtime could not start its {CUDA_PROVIDER}.")
        return session

    def _bound(self, session: Any, batch: int) -> tuple[Callable[[], None], dict[str, Tensor]]:
        """One call with tensors of PyTorch bound as inputs and outputs."""
        inputs = self._draw(batch)
        sample, memory = inputs["sample"], inputs["memory"]
        outputs = {
            "next_sample": torch.empty_like(sample),
            "next_memory": torch.empty_like(memory),
        }
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_input(name, *_place(value))
        for name, value in outputs.items():
            binding.bind_output(name, *_place(value))
        # The binding holds addresses only: the tensors live as long as the call.
        held = (inputs, outputs)

        def call() -> None:
            assert held
            session.run_with_iobinding(binding)

        return call, outputs

    def compare_reference(self, outputs: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Compare with PyTorch's answer to `host_inputs` of one picture.

        Args:
            outputs: of that call, by name.

        Raises:
            ValueError: they differ by more than half precision explains.
        """
        worst = max(
            compare(expected.numpy(), outputs[name])[1]
            for name, expected in self._reference.items()
        )
        if not worst <= HALF_LIMIT:
            raise ValueError(f"relative error {worst:.1e} against PyTorch, limit {HALF_LIMIT:.0e}")
        self.found.note(self.subject.name, f"Relative error against PyTorch {worst:.1e}.")

    def _draw(self, batch: int) -> dict[str, Tensor]:
        assert self._graph is not None
        drawn = self._graph.draw(self._sizes(batch), batch)
        return {name: value.contiguous() for name, value in drawn.items()}

    def _sizes(self, batch: int) -> dict[str, int]:
        sizes = {
            "batch": batch, "rows": self.subject.rows(batch), "height": self.subject.side,
            "width": self.subject.side, "tokens": self.subject.tokens,
        }  # fmt: skip
        return {**sizes, "adapters": 1, "rank": 1} if self.rank else sizes


def _place(value: Tensor) -> tuple[str, int, Any, list[int], int]:
    """A tensor as ONNX Runtime's binding takes it: device, id, dtype, shape, address."""
    types: dict[torch.dtype, Any] = {
        torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64,
    }  # fmt: skip
    device = value.device.type
    return device, value.device.index or 0, types[value.dtype], list(value.shape), value.data_ptr()


def _count_casts(path: Path) -> int:
    graph = onnx.load(path, load_external_data=False).graph
    return sum(node.op_type == "Cast" for node in graph.node)


def missing_cuda_provider() -> str:
    """Say in one sentence why ONNX Runtime cannot use a GPU; empty where its build can."""
    try:
        import onnxruntime as ort
    except Exception as error:
        return f"ONNX Runtime cannot be imported: {first_line(error)}"
    if CUDA_PROVIDER in ort.get_available_providers():
        return ""
    return (
        f"this onnxruntime {ort.__version__} has no {CUDA_PROVIDER}; install onnxruntime-gpu in "
        "its place."
    )


def describe_onnxruntime() -> str:
    """Version and providers of the installed ONNX Runtime, or why it cannot be imported."""
    try:
        import onnxruntime as ort
    except Exception as error:
        return first_line(error)
    return f"{ort.__version__}, {', '.join(ort.get_available_providers())}"
