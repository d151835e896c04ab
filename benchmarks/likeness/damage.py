"""What happens to faces between drawing and judging, by plain image operations.

Small faces, super-resolution, an autoencoder's blur and drift of colour, noise, JPEG. No network is
part of it: the judge must not learn what this project's generator looks like.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

_ENLARGING = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)
_SMALLEST_PX = 22.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Damaged:
    """A damaged crop.

    Attributes:
        pixels: (S, S, 3) uint8.
        resolution_px: side of the smallest grid that it went through, px.
    """

    pixels: Pixels
    resolution_px: float


def damage(pixels: Pixels, random: np.random.Generator) -> Damaged:
    """Damage a crop (S, S, 3) uint8 at random; three in ten are left as they are."""
    side = pixels.shape[0]
    if random.random() < 0.3:
        return Damaged(pixels=pixels, resolution_px=float(side))
    resolution = float(side)
    if random.random() < 0.6:
        resolution = side * (_SMALLEST_PX / side) ** float(random.random())
        pixels = small_and_back(pixels, round(resolution), random)
    if random.random() < 0.4:
        pixels = _softened(pixels, random)
    if random.random() < 0.3:
        pixels = _bent(pixels, random)
    if random.random() < 0.5:
        pixels = _recoloured(pixels, random)
    if random.random() < 0.3:
        noise = random.standard_normal(pixels.shape, np.float32) * np.float32(8 * random.random())
        pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    if random.random() < 0.25:
        pixels = _through_jpeg(pixels, int(random.integers(35, 96)))
    return Damaged(pixels=pixels, resolution_px=resolution)


def small_and_back(pixels: Pixels, small: int, random: np.random.Generator) -> Pixels:
    """Shrink a square (S, S, 3) uint8 to ``small`` px a side and enlarge it again."""
    side = pixels.shape[0]
    shrunk = cv2.resize(pixels, (small, small), interpolation=cv2.INTER_AREA)
    how = _ENLARGING[int(random.integers(len(_ENLARGING)))]
    back = cv2.resize(shrunk, (side, side), interpolation=how)
    if random.random() < 0.4:  # super-resolution sharpens
        soft = cv2.GaussianBlur(back, (0, 0), side / small)
        back = cv2.addWeighted(back, 1.6, soft, -0.6, 0)
    return np.asarray(back, np.uint8)


def _softened(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """An autoencoder smooths areas and keeps strong edges, more or less."""
    draw = random.random()
    if draw < 0.4:
        return np.asarray(cv2.GaussianBlur(pixels, (0, 0), 0.4 + 1.8 * random.random()), np.uint8)
    if draw < 0.7:
        return np.asarray(cv2.medianBlur(pixels, 3 if random.random() < 0.6 else 5), np.uint8)
    strength = 15 + 45 * random.random()
    return np.asarray(cv2.bilateralFilter(pixels, 7, strength, 3.0), np.uint8)


def _bent(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Shapes are a little off: a smooth field of shifts of up to about 2 % of the side."""
    side = pixels.shape[0]
    coarse = random.standard_normal((2, 5, 5)).astype(np.float32) * np.float32(
        side * 0.01 * random.random()
    )
    across, down = (
        cv2.resize(field, (side, side), interpolation=cv2.INTER_CUBIC) for field in coarse
    )
    column, row = np.meshgrid(np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32))
    bent = cv2.remap(
        pixels, column + across, row + down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return np.asarray(bent, np.uint8)


def _recoloured(pixels: Pixels, random: np.random.Generator) -> Pixels:
    gain = 1 + (random.random(3) * 2 - 1) * 0.07
    bias = (random.random(3) * 2 - 1) * 8
    levels = np.clip(np.arange(256)[:, None] * gain + bias, 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(pixels, levels[None]), np.uint8)


def _through_jpeg(pixels: Pixels, quality: int) -> Pixels:
    _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)
