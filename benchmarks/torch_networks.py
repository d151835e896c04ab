"""Upscaler and face detector in PyTorch between closeup's numpy, for both diffusers sides."""

from __future__ import annotations

import asyncio

import torch

from closeup.detection import (
    OUTPUT_NAMES,
    Face,
    decode_detections,
    detection_long_sides,
    detector_input,
    merge_detections,
)
from closeup.images import Floats, Pixels
from closeup.upscale import super_resolve
from export.detector import FaceDetector
from export.upscalers import LoadedUpscaler

TILE_BATCH = 4


def enlarge(
    picture: Floats, factor: int, *, upscaler: LoadedUpscaler, device: str = "cpu"
) -> Floats:
    """Super-resolve a picture; call it where gradients are off.

    Args:
        picture: (H, W, 3) float32 RGB in [0, 1].
        factor: of both sides.
        upscaler: its network on ``device``.
        device: where the tiles are enlarged.

    Returns:
        (factor * H, factor * W, 3) float32 RGB.
    """

    async def infer(tiles: Floats) -> Floats:
        given = torch.from_numpy(tiles).to(device)
        enlarged: Floats = upscaler.network(given).cpu().numpy()
        return enlarged

    return asyncio.run(
        super_resolve(
            picture, infer=infer, scale=upscaler.scale, factor=factor, tile=upscaler.tile_px,
            overlap=upscaler.overlap_px, max_batch=TILE_BATCH,
        )
    )  # fmt: skip


def find_faces(pixels: Pixels, *, detector: FaceDetector, device: str = "cpu") -> list[Face]:
    """Look for faces at every size that closeup looks at; call it where gradients are off.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        detector: on ``device``.
        device: where it runs.

    Returns:
        The faces in pixels of the picture, each once.
    """
    height, width = pixels.shape[:2]
    looks = []
    for long_side in detection_long_sides(height, width):
        tensor, scale = detector_input(pixels, long_side=long_side)
        outputs = detector(torch.from_numpy(tensor).to(device))
        named = {
            name: output.cpu().numpy() for name, output in zip(OUTPUT_NAMES, outputs, strict=True)
        }
        looks.append(decode_detections(named, scale=scale, size=(height, width)))
    return merge_detections(*looks)
