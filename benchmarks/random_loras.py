"""LoRA files with random factors for every layer that a model takes them in."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from closeup.lora_keys import DENOISER
from closeup.lora_read import Layouts

# Small enough that activations stay in range at any rank.
SCALE = 0.01


def random_tensors(layouts: Layouts, *, rank: int, seed: int) -> dict[str, npt.NDArray[np.float16]]:
    """Return the tensors of a file in diffusers' key style.

    Args:
        layouts: of the networks with LoRA inputs; None for those without.
        rank: r of every layer.
        seed: of the random numbers.

    Returns:
        For each layer ``....lora_A.weight`` (r, in) and ``....lora_B.weight`` (out, r), float16.
    """
    random = np.random.default_rng(seed)
    tensors: dict[str, npt.NDArray[np.float16]] = {}

    def draw(*shape: int) -> npt.NDArray[np.float16]:
        return (random.standard_normal(shape, np.float32) * SCALE).astype(np.float16)

    for network, layout in layouts.items():
        prefix = "unet" if network == DENOISER else network
        for layer in () if layout is None else layout.layers:
            stem = f"{prefix}.{layer.name}"
            tensors[f"{stem}.lora_A.weight"] = draw(rank, layer.in_features)
            tensors[f"{stem}.lora_B.weight"] = draw(layer.out_features, rank)
    return tensors


def write_random_lora(path: Path, layouts: Layouts, *, rank: int, seed: int) -> Path:
    """Write such a file and have the system forget its content, so that reading it is reading."""
    save_file(random_tensors(layouts, rank=rank, seed=seed), path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # only what is on the disk can be forgotten
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return path
