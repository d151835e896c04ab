"""What happens to eyes, noses and mouths of drawn faces, by plain image operations.

`break_eye` makes eyes that do not match, `remove_features` heads without a face,
`spoil_surroundings` faces without much of a head. A face has two eyes to be seen. A head that lacks
one is none; a faint nose or mouth is a matter of opinion.

Landmarks are (5, 2) float64, px, as `demo.world.Face` has them: the eye at the picture's left, the
other one, the nose's tip, the mouth's corners. Lengths are in shares of the eyes' distance.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from benchmarks.likeness.damage import small_and_back

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Points = npt.NDArray[np.float64]
Colour = npt.NDArray[np.float64]

_EYE_REACH = (0.36, 0.3)
_WHOLE = ("smooth", "smeared", "shuffled", "coarse")
_PARTS = ("one eye", "both eyes", "bar")
#: A cover reaches over the lashes, a bar from temple to temple.
_COVER_REACH, _BAR_REACH = (0.46, 0.36), (0.85, 0.36)


def break_eye(pixels: Pixels, landmarks: Points, side: int, random: np.random.Generator) -> Pixels:
    """Spoil one eye: displaced, of another size, turned or blurred.

    Args:
        pixels: (S, S, 3) uint8.
        landmarks: of the face.
        side: 0 for the eye at the picture's left, 1 for the other.
        random: decides how.

    Returns:
        A new picture; what is beyond an eye's width from that eye is as before.
    """
    apart = _eye_distance(landmarks)
    spoiled = _spoiled(pixels, landmarks[side], apart, random)
    return _laid(pixels, spoiled, _away(pixels, landmarks[side], apart, _EYE_REACH), 0.85, 0.3)


def _spoiled(pixels: Pixels, eye: Points, apart: float, random: np.random.Generator) -> Pixels:
    """The whole picture as it is to look around the eye."""
    kind = ("turned", "resized", "displaced", "blurred")[int(random.integers(4))]
    if kind == "blurred":
        return np.asarray(cv2.GaussianBlur(pixels, (0, 0), 0.14 * apart), np.uint8)
    angle = (1 if random.random() < 0.5 else -1) * (25 + 35 * random.random())
    scale = 0.5 if random.random() < 0.5 else 1.6
    matrix = cv2.getRotationMatrix2D(
        (float(eye[0]), float(eye[1])),
        angle if kind == "turned" else 0.0,
        scale if kind == "resized" else 1.0,
    )
    if kind == "displaced":
        turn = random.random() * 2 * np.pi
        matrix[:, 2] += 0.22 * apart * np.array([np.cos(turn), np.sin(turn)])
    return _moved(pixels, matrix)


def remove_features(pixels: Pixels, landmarks: Points, random: np.random.Generator) -> Pixels:
    """Leave a head without a face.

    In four of seven all of eyes, nose and mouth are smoothed away, smeared, in disorder or too
    coarse; in the others an eye or both are covered, or a bar lies across them.

    Nothing that leaves both eyes to be made out, such as a strong bend, is among these: whether
    that is a face is a matter of opinion, and generated faces are often a little bent.

    Args:
        pixels: (S, S, 3) uint8.
        landmarks: of the face.
        random: decides how.

    Returns:
        A new picture; hair, ears and what is around the head are as before, except in the one of
        seven whose whole is too coarse to show features.
    """
    apart = _eye_distance(landmarks)
    kind = (*_WHOLE, *_PARTS)[int(random.integers(len(_WHOLE) + len(_PARTS)))]
    if kind == "coarse":
        # A face of a few pixels: the square is about 4.4 times as wide as the eyes are apart.
        small = max(3, round(pixels.shape[0] / apart * (1.0 + 0.8 * random.random())))
        return small_and_back(pixels, small, random)
    if kind in _WHOLE:
        changed = _without_features(pixels, landmarks.mean(0), kind, apart, random)
        return _laid(pixels, changed, _away(pixels, landmarks.mean(0), apart, (1, 1)), 0.9, 0.15)
    eyes = list(landmarks[:2])
    if kind == "one eye":
        return _covered(pixels, [eyes[int(random.integers(2))]], apart, _COVER_REACH, random)
    if kind == "both eyes":
        return _covered(pixels, eyes, apart, _COVER_REACH, random)
    return _covered(pixels, [landmarks[:2].mean(0)], apart, _BAR_REACH, random)


def _without_features(
    pixels: Pixels, middle: Points, kind: str, apart: float, random: np.random.Generator
) -> Pixels:
    """The picture with the middle of its face spoiled as a whole."""
    if kind == "smooth":
        sigma = (0.3 + 0.4 * random.random()) * apart
        return np.asarray(cv2.GaussianBlur(pixels, (0, 0), sigma), np.uint8)
    if kind == "smeared":
        length = max(3, int((0.9 + 0.8 * random.random()) * apart))
        across = random.random() < 0.5
        smeared = cv2.blur(pixels, (length, 3) if across else (3, length))
        return np.asarray(cv2.GaussianBlur(smeared, (0, 0), 0.08 * apart), np.uint8)
    reach = int(1.05 * apart)
    left, top = (max(0, int(value) - reach) for value in middle)
    inner = pixels[top : top + 2 * reach, left : left + 2 * reach]
    rows, columns = (np.array_split(np.arange(side), 4) for side in inner.shape[:2])
    places = [(r, c) for r in rows for c in columns]
    result = pixels.copy()
    shuffled = result[top : top + 2 * reach, left : left + 2 * reach]
    for place, source in zip(places, random.permutation(len(places)), strict=True):
        part = inner[np.ix_(*places[int(source)])]
        size = (len(place[1]), len(place[0]))
        shuffled[np.ix_(*place)] = cv2.resize(part, size, interpolation=cv2.INTER_NEAREST)
    return np.asarray(cv2.GaussianBlur(result, (0, 0), 0.1 * apart), np.uint8)


def _covered(
    pixels: Pixels,
    points: Sequence[Points],
    apart: float,
    reach: tuple[float, float],
    random: np.random.Generator,
) -> Pixels:
    """Lay skin, hair, darkness or a blur of the picture over some points of a face."""
    kind = ("skin", "hair", "dark", "blurred")[int(random.integers(4))]
    edge = 0.1 + 0.2 * random.random()
    if kind == "blurred":
        sigma = (0.25 + 0.3 * random.random()) * apart
        cover = np.asarray(cv2.GaussianBlur(pixels, (0, 0), sigma), np.uint8)
        return _laid_at(pixels, cover, points, apart, reach, edge)
    if kind == "dark":
        colour = 10 + 50 * random.random(3)
    else:
        # The cheek below an eye, or what is above the brows.
        down = 0.55 if kind == "skin" else -(0.9 + 0.4 * random.random())
        row, column = (
            int(np.clip(value, 0, side - 1))
            for value, side in zip(
                (points[0][1] + down * apart, points[0][0]), pixels.shape[:2], strict=True
            )
        )
        colour = pixels[row, column].astype(np.float64)
    cover = np.clip(np.broadcast_to(colour, pixels.shape), 0, 255).astype(np.uint8)
    return _laid_at(pixels, cover, points, apart, reach, edge)


def spoil_surroundings(pixels: Pixels, landmarks: Points, random: np.random.Generator) -> Pixels:
    """Leave a face as it is in a picture that is spoiled around it, as a face pass leaves it.

    The face may sit a little off its place, be smaller and be turned. Without such pictures, the
    seam around a face would tell the judge that there is none: `remove_features` leaves one too.

    Args:
        pixels: (S, S, 3) uint8.
        landmarks: of the face.
        random: decides how.

    Returns:
        A new picture; within an eye distance of the face's middle it shows the face.
    """
    apart = _eye_distance(landmarks)
    coarse = max(4, round(pixels.shape[0] / apart * (1.0 + 2.5 * random.random())))
    around = small_and_back(pixels, coarse, random)
    middle = landmarks.mean(0)
    turn, scale = 24 * random.random() - 12, 0.75 + 0.35 * random.random()
    matrix = cv2.getRotationMatrix2D((float(middle[0]), float(middle[1])), turn, scale)
    shift = (random.random(2) * 2 - 1) * 0.15 * apart
    matrix[:, 2] += shift
    away = _away(pixels, middle + shift, apart, (1, 1))
    reach, edge = 1.0 + 0.6 * random.random(), 0.1 + 0.4 * random.random()
    return _laid(around, _moved(pixels, matrix), away, reach, edge)


def _eye_distance(landmarks: Points) -> float:
    return float(np.hypot(*(landmarks[1] - landmarks[0])))


def _moved(pixels: Pixels, matrix: Floats) -> Pixels:
    size = (pixels.shape[1], pixels.shape[0])
    return np.asarray(
        cv2.warpAffine(pixels, matrix, size, borderMode=cv2.BORDER_REPLICATE), np.uint8
    )


def _away(pixels: Pixels, point: Points, apart: float, reach: tuple[float, float]) -> Floats:
    """(H, W): how far every pixel is from a point, 1 on the ellipse that ``reach`` spans."""
    rows, columns = (np.arange(side) + 0.5 for side in pixels.shape[:2])
    across, down = (
        (columns - point[0]) / (reach[0] * apart),
        (rows - point[1]) / (reach[1] * apart),
    )
    return np.asarray(np.hypot(across[None], down[:, None]), np.float64)


def _laid(under: Pixels, over: Pixels, away: Floats, inside: float, edge: float) -> Pixels:
    """Lay one picture over another: wholly up to ``inside``, not at all from ``edge`` further."""
    share = np.clip((inside + edge - away) / edge, 0, 1)[..., None]
    return np.asarray(under + (over - under.astype(np.float64)) * share + 0.5, np.uint8)


def _laid_at(
    under: Pixels,
    over: Pixels,
    points: Sequence[Points],
    apart: float,
    reach: tuple[float, float],
    edge: float,
) -> Pixels:
    away = np.min([_away(under, point, apart, reach) for point in points], axis=0)
    return _laid(under, over, away, 1.0, edge)
