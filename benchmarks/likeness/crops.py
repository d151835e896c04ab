"""The square of a face that the judge looks at. Pure."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]

CROP_PX = 128
#: Side of the square over the face's longer side: holds a bun and the ends of long hair.
CROP_FACTOR = 2.1


def cut_face(
    pixels: Pixels,
    box: Box,
    *,
    factor: float = CROP_FACTOR,
    shift: tuple[float, float] = (0.0, 0.0),
    size: int = CROP_PX,
) -> Pixels:
    """Cut the upright square around a face.

    Args:
        pixels: (H, W, 3) uint8.
        box: x0, y0, x1, y1 of the face, px; of two sides the longer counts.
        factor: side of the square over the face's.
        shift: of the square in shares of its side.
        size: side of the result, px.

    Returns:
        (size, size, 3) uint8: areas averaged where it shrinks, cubic where it grows; beyond the
        picture its border goes on.

    Raises:
        ValueError: the box is empty.
    """
    side = max(box[2] - box[0], box[3] - box[1]) * factor
    if side <= 0:
        raise ValueError(f"the box {box} is empty; expected x0 < x1 and y0 < y1.")
    x = (box[0] + box[2] - side) / 2 + shift[0] * side
    y = (box[1] + box[3] - side) / 2 + shift[1] * side
    # Drawn at a multiple of the size and averaged, so that no pixel is missed.
    fine = size * max(1, round(side / size))
    scale = side / fine
    matrix = np.array([[scale, 0, x + scale / 2 - 0.5], [0, scale, y + scale / 2 - 0.5]])
    flags = (cv2.INTER_CUBIC if scale < 1 else cv2.INTER_LINEAR) | cv2.WARP_INVERSE_MAP
    cut = cv2.warpAffine(pixels, matrix, (fine, fine), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    if fine != size:
        cut = cv2.resize(cut, (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(cut, np.uint8)
