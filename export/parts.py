"""The graphs of a pipeline, made one at a time from its folder, written and checked.

A graph is described by a `Part`, which a second process can make again: the check of large
weights runs there, so that the export never holds more than it needs to write.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from closeup.errors import ExportError
from closeup.manifest import Component, LoraLayer
from export.components import TextEncoder, text_encoder_graph
from export.denoiser import DenoiserStep, denoiser_graph
from export.graphs import (
    BATCH,
    Agreement,
    Graph,
    GraphTensor,
    Sizes,
    check_graph,
    compare_with,
    component_of,
    reference_outputs,
    torch_dtype,
    write_graph,
)
from export.layouts import layout_of
from export.pipelines import VAE, load_component
from export.precisions import DENOISER, VAE_DECODER, VAE_ENCODER, Precision
from export.streaming import weight_bytes
from export.vae import vae_decoder_graph, vae_encoder_graph

logger = logging.getLogger(__name__)

# Weights past this are checked in a process of their own, which holds first PyTorch's copy and
# then ONNX Runtime's.
APART_BYTES = 1 << 30
# Rows times latent pixels of a check of large weights: PyTorch is slow at float16 on CPUs.
_LARGE_CASE = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One graph of a pipeline.

    Attributes:
        folder: of the pipeline.
        name: `DENOISER`, `VAE_ENCODER`, `VAE_DECODER`, or a text encoder's folder.
        precision: of the weights.
        max_rank: of the LoRA inputs; 0: it has none.
        max_batch: sequences in a denoiser call.
        max_tokens: of the prompt, for this text encoder; of the context, for the denoiser.
    """

    folder: Path
    name: str
    precision: Precision
    max_rank: int
    max_batch: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenPart:
    """A graph on disk, checked.

    Attributes:
        component: its entry of the manifest.
        inputs: of the graph.
        outputs: of the graph.
        layers: layout of its LoRA inputs; empty when it has none.
    """

    component: Component
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    layers: tuple[LoraLayer, ...]


def build_graph(part: Part) -> Graph:
    """Load a component and describe its graph.

    Raises:
        ExportError: it cannot be loaded, or is of a kind that cannot be exported.
    """
    layout = layout_of(part.folder)
    dtype = torch_dtype(part.precision)
    if part.name in (VAE_ENCODER, VAE_DECODER):
        vae = load_component(part.folder, layout, VAE, dtype)
        describe_vae = vae_encoder_graph if part.name == VAE_ENCODER else vae_decoder_graph
        return describe_vae(vae, precision=part.precision.value)
    if part.name == DENOISER:
        model = load_component(part.folder, layout, layout.denoiser, dtype)
        return denoiser_graph(
            model,
            max_tokens=part.max_tokens,
            max_rank=part.max_rank,
            max_batch=part.max_batch,
            precision=part.precision.value,
        )
    encoder = next(entry for entry in layout.encoders if entry.name == part.name)
    return text_encoder_graph(
        load_component(part.folder, layout, part.name, dtype),
        encoder,
        max_tokens=part.max_tokens,
        max_rank=part.max_rank,
        precision=part.precision.value,
    )


def export_part(part: Part, path: Path, model: str) -> WrittenPart:
    """Write a part's graph to ``path`` and compare it with PyTorch.

    Args:
        part: what to export.
        path: the ONNX file.
        model: its name in the manifest.

    Raises:
        ExportError: it cannot be exported or does not agree with PyTorch.
    """
    graph = build_graph(part)
    write_graph(graph, path)
    inputs, outputs, layers = graph.inputs, graph.outputs, _layers(graph.module)
    if weight_bytes(graph.module) > APART_BYTES:
        title = graph.title
        del graph
        gc.collect()
        logger.info("%s: %s written, checking it in a second process", model, title)
        agreement = _check_apart(part, path, title)
    else:
        agreement = check_graph(graph, path)
    component = component_of(path, model, part.precision.value, agreement)
    return WrittenPart(component=component, inputs=inputs, outputs=outputs, layers=layers)


def check_large_part(part: Part, path: Path) -> Agreement:
    """Compare a file with PyTorch; the module is gone when ONNX Runtime opens the file.

    Raises:
        ExportError: they differ.
    """
    graph = build_graph(part)
    cases = tuple(sizes for sizes in graph.cases if _cost(sizes) <= _LARGE_CASE)
    graph = dataclasses.replace(graph, cases=cases or graph.cases[:1])
    references = reference_outputs(graph)
    graph = dataclasses.replace(graph, module=nn.Identity())
    gc.collect()
    return compare_with(graph, path, references)


def _check_apart(part: Part, path: Path, title: str) -> Agreement:
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(check_large_part, part, path).result()
    except BrokenProcessPool as error:
        raise ExportError(
            f"the check of the {title} was killed: it needs about the weights in float32 as memory."
        ) from error


def _cost(sizes: Sizes) -> int:
    return sizes.get("rows", sizes[BATCH]) * sizes.get("height", 1) * sizes.get("width", 1)


def _layers(module: nn.Module) -> tuple[LoraLayer, ...]:
    return module.layers if isinstance(module, DenoiserStep | TextEncoder) else ()
