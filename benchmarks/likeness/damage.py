"""What happens to faces between drawing and judging, by plain image operations.

Small faces, super-resolution, an autoencoder's blur and drift of colour, noise, JPEG. No network is
part of it: the judge must not learn what this project's generator looks like. `break_eye` makes
eyes that do not match, `remove_features` heads without a face, `spoil_surroundings` faces without
much of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]

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
        pixels = _small_and_back(pixels, round(resolution), random)
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


def _small_and_back(pixels: Pixels, small: int, random: np.random.Generator) -> Pixels:
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


def break_eye(pixels: Pixels, landmarks: Points, side: int, random: np.random.Generator) -> Pixels:
    """Spoil one eye: displaced, of another size, turned, blurred or gone.

    Args:
        pixels: (S, S, 3) uint8.
        landmarks: (5, 2), px, as `demo.world.Face` has them.
        side: 0 for the eye at the picture's left, 1 for the other.
        random: decides how.

    Returns:
        A new picture; what is beyond an eye's width from that eye is as before.
    """
    apart = float(np.hypot(*(landmarks[1] - landmarks[0])))
    # What is near the eye is enough to work on.
    left, top = (max(0, int(value - apart)) for value in landmarks[side])
    near = pixels[top : top + int(2 * apart) + 1, left : left + int(2 * apart) + 1]
    x, y = float(landmarks[side][0]) - left, float(landmarks[side][1]) - top
    spoiled = _spoiled(near, (x, y), apart, random)
    column = (np.arange(near.shape[1], dtype=np.float32) + 0.5 - x) / (0.36 * apart)
    row = (np.arange(near.shape[0], dtype=np.float32) + 0.5 - y) / (0.3 * apart)
    away = np.hypot(column[None], row[:, None])[..., None]
    share = np.clip((1.15 - away) / 0.3, 0, 1)
    result = pixels.copy()
    result[top : top + near.shape[0], left : left + near.shape[1]] = (
        near + (spoiled - near.astype(np.float32)) * share + 0.5
    )
    return result


def _spoiled(
    pixels: Pixels, eye: tuple[float, float], apart: float, random: np.random.Generator
) -> Pixels:
    """The whole picture as it is to look around the eye."""
    kind = ("turned", "resized", "displaced", "blurred", "gone")[int(random.integers(5))]
    if kind == "blurred":
        return np.asarray(cv2.GaussianBlur(pixels, (0, 0), 0.14 * apart), np.uint8)
    if kind == "gone":
        below = min(max(int(eye[1] + 0.55 * apart), 0), pixels.shape[0] - 1)
        beside = min(max(int(eye[0]), 0), pixels.shape[1] - 1)
        return np.broadcast_to(pixels[below, beside], pixels.shape)
    angle = (1 if random.random() < 0.5 else -1) * (25 + 35 * random.random())
    scale = 0.5 if random.random() < 0.5 else 1.6
    matrix = cv2.getRotationMatrix2D(
        eye, angle if kind == "turned" else 0.0, scale if kind == "resized" else 1.0
    )
    if kind == "displaced":
        turn = random.random() * 2 * np.pi
        matrix[:, 2] += 0.22 * apart * np.array([np.cos(turn), np.sin(turn)])
    size = (pixels.shape[1], pixels.shape[0])
    return np.asarray(
        cv2.warpAffine(pixels, matrix, size, borderMode=cv2.BORDER_REPLICATE), np.uint8
    )


def remove_features(pixels: Pixels, landmarks: Points, random: np.random.Generator) -> Pixels:
    """Leave a head without a face: eyes, nose and mouth smoothed away, smeared, or in disorder.

    Nothing that leaves an eye or a mouth to be made out, such as a strong bend, is among these:
    whether that is a face is a matter of opinion, and generated faces are often a little bent.

    Args:
        pixels: (S, S, 3) uint8.
        landmarks: (5, 2), px, as `demo.world.Face` has them.
        random: decides how.

    Returns:
        A new picture; hair, ears and what is around the head are as before, except in the one of
        four whose whole is too coarse to show features.
    """
    apart = float(np.hypot(*(landmarks[1] - landmarks[0])))
    kind = ("smooth", "smeared", "shuffled", "coarse")[int(random.integers(4))]
    if kind == "coarse":
        # A face of a few pixels: the square is about 4.4 times as wide as the eyes are apart.
        small = max(3, round(pixels.shape[0] / apart * (1.0 + 0.8 * random.random())))
        return _small_and_back(pixels, small, random)
    x, y = (float(value) for value in landmarks.mean(0))
    reach = int(1.05 * apart)
    left, top = max(0, int(x) - reach), max(0, int(y) - reach)
    inner = pixels[top : top + 2 * reach, left : left + 2 * reach]
    changed = _without_features(inner, kind, apart, random)
    column = (np.arange(inner.shape[1], dtype=np.float32) + 0.5 + left - x) / apart
    row = (np.arange(inner.shape[0], dtype=np.float32) + 0.5 + top - y) / apart
    away = np.hypot(column[None], row[:, None])[..., None]
    share = np.clip((1.05 - away) / 0.15, 0, 1)
    result = pixels.copy()
    result[top : top + inner.shape[0], left : left + inner.shape[1]] = (
        inner + (changed - inner.astype(np.float32)) * share + 0.5
    )
    return result


def spoil_surroundings(pixels: Pixels, landmarks: Points, random: np.random.Generator) -> Pixels:
    """Leave a face as it is in a picture that is spoiled around it, as a face pass leaves it.

    The face may sit a little off its place, be smaller and be turned. Without such pictures, the
    seam around a face would tell the judge that there is none: `remove_features` leaves one too.

    Args:
        pixels: (S, S, 3) uint8.
        landmarks: (5, 2), px, as `demo.world.Face` has them.
        random: decides how.

    Returns:
        A new picture; within an eye distance of the face's middle it shows the face.
    """
    apart = float(np.hypot(*(landmarks[1] - landmarks[0])))
    height, width = pixels.shape[:2]
    coarse = max(4, round(height / apart * (1.0 + 2.5 * random.random())))
    around = _small_and_back(pixels, coarse, random).astype(np.float32)
    x, y = (float(value) for value in landmarks.mean(0))
    turn, scale = 24 * random.random() - 12, 0.75 + 0.35 * random.random()
    matrix = cv2.getRotationMatrix2D((x, y), turn, scale)
    shift = (random.random(2) * 2 - 1) * 0.15 * apart
    matrix[:, 2] += shift
    face = cv2.warpAffine(pixels, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
    column = (np.arange(width, dtype=np.float32) + 0.5 - x - shift[0]) / apart
    row = (np.arange(height, dtype=np.float32) + 0.5 - y - shift[1]) / apart
    away = np.hypot(column[None], row[:, None])[..., None]
    reach, edge = 1.0 + 0.6 * random.random(), 0.1 + 0.4 * random.random()
    share = np.clip((reach + edge - away) / edge, 0, 1)
    return np.asarray(around + (face - around) * share + 0.5, np.uint8)


def _without_features(
    inner: Pixels, kind: str, apart: float, random: np.random.Generator
) -> Pixels:
    """The middle of a face, spoiled as a whole."""
    if kind == "smooth":
        sigma = (0.3 + 0.4 * random.random()) * apart
        return np.asarray(cv2.GaussianBlur(inner, (0, 0), sigma), np.uint8)
    if kind == "smeared":
        length = max(3, int((0.9 + 0.8 * random.random()) * apart))
        across = random.random() < 0.5
        smeared = cv2.blur(inner, (length, 3) if across else (3, length))
        return np.asarray(cv2.GaussianBlur(smeared, (0, 0), 0.08 * apart), np.uint8)
    rows, columns = (np.array_split(np.arange(side), 4) for side in inner.shape[:2])
    shuffled = inner.copy()
    places = [(r, c) for r in rows for c in columns]
    for place, source in zip(places, random.permutation(len(places)), strict=True):
        part = inner[np.ix_(*places[int(source)])]
        size = (len(place[1]), len(place[0]))
        shuffled[np.ix_(*place)] = cv2.resize(part, size, interpolation=cv2.INTER_NEAREST)
    return np.asarray(cv2.GaussianBlur(shuffled, (0, 0), 0.1 * apart), np.uint8)
