"""The denoiser engine's contract in numpy, with a toy network: what the ONNX graphs must do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def toy_network(x: Array, timestep: Array, context: Array, lora: Array) -> Array:
    """Mix each row's own inputs, and no other row's.

    Args:
        x: (R, C, h, w).
        timestep: (R,).
        context: (R, L, D).
        lora: (R, M, r) the adapter of each row.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.tanh(timestep / 1000 + context.mean((1, 2))) + lora.sum((1, 2))
        mixed: Array = np.float32(0.5) * np.tanh(x) + scale[:, None, None, None] * x
    return mixed


def run_numpy_engine(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run one step; inputs and outputs as the exported denoiser's."""
    f = feeds
    x = (f["sample"] * f["input_scale"][:, None, None, None])[f["rows"]]
    net = toy_network(x, f["timestep"], f["context"], f["lora"][f["lora_row"]])
    g = f["guidance"][:, :, None, None, None]
    with np.errstate(over="ignore", invalid="ignore"):
        eps = g[:, 0] * net[f["pick"][:, 0]] + g[:, 1] * net[f["pick"][:, 1]]
        stacked = np.concatenate(
            [f["sample"][:, None], eps[:, None], f["memory"], f["noise"][:, None]], 1
        )
        out = np.einsum("bij,bjchw->bichw", f["step"], stacked)
    k = f["known_step"][:, :, None, None, None]
    known = k[:, 0] * f["known"] + k[:, 1] * f["known_noise"]
    mask = f["mask"]
    return {
        "next_sample": (mask * out[:, 0] + (1 - mask) * known).astype(np.float32),
        "next_memory": out[:, 1:].astype(np.float32),
    }
