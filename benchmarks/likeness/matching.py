"""Which face of a picture is which person of its prompt. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

Point = tuple[float, float]
#: A face further than this from a person's place, in shares of the picture's side, is not theirs.
FARTHEST = 0.35


def match_faces(
    places: Sequence[Point], faces: Sequence[Point], *, farthest: float = FARTHEST
) -> list[int | None]:
    """Give each person at most one face, so that as many as can be have one, as near as can be.

    Args:
        places: where the people are expected, in shares of the picture's sides; up to three.
        faces: middles of the faces found, likewise.
        farthest: the longest distance allowed.

    Returns:
        For each person the index of a face, or None.
    """
    spots: list[int | None] = [*range(len(faces)), *[None] * len(places)]
    best: tuple[int, float, list[int | None]] | None = None
    for choice in set(permutations(spots, len(places))):
        distance = _distance(places, faces, choice, farthest)
        if distance is None:
            continue
        rank = (choice.count(None), distance, list(choice))
        if best is None or rank[:2] < best[:2]:
            best = rank
    assert best is not None  # nobody having a face is always possible
    return best[2]


def _distance(
    places: Sequence[Point],
    faces: Sequence[Point],
    choice: Sequence[int | None],
    farthest: float,
) -> float | None:
    """Sum of the distances of a choice; None when one of them is too long."""
    total = 0.0
    for place, index in zip(places, choice, strict=True):
        if index is None:
            continue
        distance = math.dist(place, faces[index])
        if distance > farthest:
            return None
        total += distance
    return total
