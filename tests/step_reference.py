"""One denoiser step in numpy around a network in PyTorch, and LoRAs fused into weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from closeup.manifest import LoraLayer
from export.denoiser import DenoiserStep, denoiser_graph
from export.graphs import Graph, export_graph, open_session

Array = npt.NDArray[Any]
# Inputs with one entry a network row.
ROW_INPUTS = ("timestep", "context", "lora_row", "pooled", "time_ids", "guidance_embed")
# What a network predicts for scaled latents x (C, h, w) and the entries of one row.
Predict = Callable[[Array, dict[str, Array]], Array]


class ExportedStep:
    """A tiny denoiser in ONNX Runtime beside the network it came from.

    Args:
        model: is copied.
        path: of the ONNX file.
        max_tokens: L.
    """

    def __init__(self, model: nn.Module, path: Any, *, max_tokens: int) -> None:
        self.model = model
        self.graph: Graph = denoiser_graph(
            copy.deepcopy(model), max_tokens=max_tokens, max_rank=4, max_batch=3, precision="fp32"
        )
        self.component = export_graph(self.graph, path, "tiny_denoiser")
        assert isinstance(self.graph.module, DenoiserStep)
        self.layers: tuple[LoraLayer, ...] = self.graph.module.layers
        self.session = open_session(path)

    def inputs(self, seed: int, sizes: dict[str, int]) -> dict[str, Array]:
        drawn = self.graph.draw(sizes, seed)
        return {name: value.numpy() for name, value in drawn.items()}

    def run(self, inputs: dict[str, Array]) -> Array:
        """(B, 3, C, h, w): next sample and both memories."""
        sample, memory = self.session.run(["next_sample", "next_memory"], inputs)
        return np.concatenate([sample[:, None], memory], 1)


def reference_step(inputs: dict[str, Array], predict: Predict) -> Array:
    """The step sequence by sequence, (B, 3, C, h, w); rows' LoRAs are ignored."""
    results = []
    for b in range(len(inputs["sample"])):
        eps = np.zeros_like(inputs["sample"][b])
        for weight, row in zip(inputs["guidance"][b], inputs["pick"][b], strict=True):
            owner = inputs["rows"][row]
            x = inputs["sample"][owner] * inputs["input_scale"][owner]
            entries = {name: inputs[name][row] for name in ROW_INPUTS if name in inputs}
            eps += weight * predict(x, entries)
        state = np.stack([inputs["sample"][b], eps, *inputs["memory"][b], inputs["noise"][b]])
        moved = np.einsum("ij,jchw->ichw", inputs["step"][b], state)
        shown = inputs["known_step"][b][0] * inputs["known"][b]
        shown = shown + inputs["known_step"][b][1] * inputs["known_noise"][b]
        mask = inputs["mask"][b]
        results.append(np.stack([mask * moved[0] + (1 - mask) * shown, moved[1], moved[2]]))
    return np.stack(results)


def relative(got: Array, expected: Array) -> float:
    """Relative 2-norm of the difference."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def single(inputs: dict[str, Array], b: int) -> dict[str, Array]:
    """The inputs of sequence ``b`` alone."""
    rows = np.flatnonzero(inputs["rows"] == b)
    chosen = {name: inputs[name][rows] for name in ROW_INPUTS if name in inputs}
    by_batch = {
        name: inputs[name][b : b + 1]
        for name in inputs
        if name not in (*chosen, "rows", "pick", "lora")
    }
    pick = np.searchsorted(rows, inputs["pick"][b : b + 1])
    zeros = np.zeros(len(rows), np.int64)
    return {**by_batch, **chosen, "rows": zeros, "pick": pick, "lora": inputs["lora"]}


def fuse(model: Any, layers: tuple[LoraLayer, ...], adapter: Array) -> Any:
    """A copy of ``model`` with one slice (M, r) of the bank added to its weights."""
    fused = copy.deepcopy(model)
    offset = 0
    for layer in layers:
        middle = offset + layer.in_features
        end = middle + layer.out_features
        delta = adapter[middle:end] @ adapter[offset:middle].T
        weight = fused.get_submodule(layer.name).weight
        with torch.no_grad():
            weight += torch.tensor(delta).reshape(weight.shape)
        offset = end
    return fused
