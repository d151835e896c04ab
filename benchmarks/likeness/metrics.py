"""What a face pass did to a picture and to a face, in numbers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Box = tuple[float, float, float, float]


class Outcome(str, Enum):
    """What became of a face's likeness."""

    IMPROVED = "improved"
    UNCHANGED = "unchanged"
    MIXED = "mixed"
    WORSENED = "worsened"


def outcome_of(right: tuple[int, int], cosine: tuple[float, float], margin: float) -> Outcome:
    """Compare a face before and after by both measures of likeness.

    Improved: attributes or cosine rose and neither fell. Worsened: one of them fell and neither
    rose. Mixed: one rose, the other fell.

    Args:
        right: number of attributes right, before and after.
        cosine: to the reference, before and after.
        margin: a smaller change of the cosine is noise.
    """
    changes = [right[1] - right[0], 0.0 if _near(cosine, margin) else cosine[1] - cosine[0]]
    rose, fell = any(change > 0 for change in changes), any(change < 0 for change in changes)
    if rose and fell:
        return Outcome.MIXED
    return Outcome.IMPROVED if rose else Outcome.WORSENED if fell else Outcome.UNCHANGED


def _near(values: tuple[float, float], margin: float) -> bool:
    return abs(values[1] - values[0]) <= margin


def seam_score(before: Pixels, after: Pixels, alpha: Floats) -> float:
    """By how much the steps between neighbouring pixels have grown where the mask has its edge.

    Over all pairs of neighbours, in rows and columns: the mean of the step after less the step
    before, each weighted with the mask's own step. A hard mask counts the pairs across its edge, a
    soft one its whole ramp, in proportion to its slope.

    Args:
        before: (H, W, 3) uint8.
        after: the same shape.
        alpha: (H, W) float32 in [0, 1], the share of the repainted face.

    Returns:
        Levels of 255 a pixel, mean of the channels; 0 without an edge. Below 0 where the picture
        has become smoother there.
    """
    grown = weight = 0.0
    old, new = before.astype(np.float64), after.astype(np.float64)
    for axis in (0, 1):
        slope = np.abs(np.diff(alpha.astype(np.float64), axis=axis))
        step = np.abs(np.diff(new, axis=axis)) - np.abs(np.diff(old, axis=axis))
        grown += float((step.mean(-1) * slope).sum())
        weight += float(slope.sum())
    return grown / weight if weight else 0.0


def changed_outside(before: Pixels, after: Pixels, inside: npt.NDArray[np.bool_]) -> int:
    """Return how many bytes differ where ``inside``, (H, W), is false."""
    return int((before != after)[~inside].sum())


def box_area(shape: tuple[int, int], boxes: Sequence[Box], grown: float) -> npt.NDArray[np.bool_]:
    """Return where a picture (H, W) shows faces: boxes grown by a share of their sides."""
    inside = np.zeros(shape, bool)
    for x0, y0, x1, y1 in boxes:
        more_x, more_y = (x1 - x0) * grown / 2, (y1 - y0) * grown / 2
        rows = slice(max(0, int(y0 - more_y)), max(0, int(np.ceil(y1 + more_y))))
        columns = slice(max(0, int(x0 - more_x)), max(0, int(np.ceil(x1 + more_x))))
        inside[rows, columns] = True
    return inside
