"""Face detection around a YuNet-shaped network: its input, and what its outputs mean.

The network sees raw 0-255 BGR, its sides multiples of 32, and answers at strides 8, 16 and 32
with ``cls_s`` and ``obj_s`` (n, 1) in [0, 1], ``bbox_s`` (n, 4) and ``kps_s`` (n, 10).

Source: Wu, Peng, Yu, "YuNet: A Tiny Millisecond-level Face Detector", 2023; the decoding was
checked against OpenCV's own (the score is the geometric mean of class and objectness).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt

from closeup.images import Floats, Pixels, ResizeHow, floats_from_pixels, resize

Point = tuple[float, float]
Box = tuple[float, float, float, float]

STRIDES = (8, 16, 32)
#: Sides of the network's input are padded to a multiple of this.
SIDE_MULTIPLE = 32
#: Long side, px, that a picture is brought to before detection. YuNet is trained on faces of 10 to
#: 300 px: smaller pictures are enlarged until the faces of a long shot get there.
MIN_LONG_SIDE, MAX_LONG_SIDE = 512, 1280
#: The second look is at this fraction of the first's long side, for a sixteenth of its cost: it
#: finds the close-ups that are too large for the network at full scale.
SECOND_LOOK = 4
#: Of two boxes that overlap by more than this (intersection over union) one is dropped.
NMS_IOU = 0.3
OUTPUT_NAMES = tuple(f"{kind}_{s}" for kind in ("cls", "obj", "bbox", "kps") for s in STRIDES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Face:
    """One detected face, in continuous coordinates of the picture (its left edge is x = 0).

    Attributes:
        box: (x0, y0, x1, y1), px, inside the picture.
        score: confidence in [0, 1].
        landmarks: right eye, left eye, nose, right and left corner of the mouth, px; "right" is
            the person's own, so left in an upright picture. They may lie outside the picture.
    """

    box: Box
    score: float
    landmarks: tuple[Point, Point, Point, Point, Point]

    @property
    def width(self) -> float:
        """Width of the box, px."""
        return self.box[2] - self.box[0]

    @property
    def height(self) -> float:
        """Height of the box, px."""
        return self.box[3] - self.box[1]

    @property
    def side(self) -> float:
        """The longer side of the box, px: the face's size wherever a fraction of it is meant."""
        return max(self.width, self.height)

    @property
    def center(self) -> Point:
        """Middle of the box, px."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def detection_long_sides(height: int, width: int) -> tuple[int, int]:
    """Return the two long sides, px, at which faces of such a picture are looked for.

    Measured with YuNet on drawn people, 24 of each framing: at 128 px (looked at in 512 px) one
    look finds 21 full figures, 23 half figures and all portraits and close-ups, two find all 96;
    at 512 px (in 640) one finds 24, 21, 16 and 19, two find 24, 23, 22 and 23.
    """
    first = min(max(height, width, MIN_LONG_SIDE), MAX_LONG_SIDE)
    return first, first // SECOND_LOOK


def detector_input(image: Pixels, *, long_side: int | None = None) -> tuple[Floats, float]:
    """Prepare a picture for the detector.

    Args:
        image: (H, W, 3) uint8 RGB.
        long_side: length its longer side is brought to, px; by default the first of
            :func:`detection_long_sides`.

    Returns:
        The network's input, (1, 3, h, w) float32 BGR in [0, 255] with black below and to the
        right up to multiples of 32; and the scale, detector pixels a picture pixel.
    """
    height, width = image.shape[:2]
    scale = (long_side or detection_long_sides(height, width)[0]) / max(height, width)
    inner_h, inner_w = _scaled_size((height, width), scale)
    outer_h, outer_w = _padded_size((height, width), scale)
    how: ResizeHow = "cubic" if scale > 1 else "auto"
    tensor = np.zeros((1, 3, outer_h, outer_w), np.float32)
    colours = cv2.split(floats_from_pixels(image))
    for plane, colour in zip(tensor[0], reversed(colours), strict=True):
        scaled = resize(colour, (inner_h, inner_w), how=how)
        np.multiply(scaled, np.float32(255.0), out=plane[:inner_h, :inner_w])
    return tensor, scale


def _scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _padded_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    height, width = _scaled_size(size, scale)
    return -(-height // SIDE_MULTIPLE) * SIDE_MULTIPLE, -(-width // SIDE_MULTIPLE) * SIDE_MULTIPLE


def decode_detections(
    outputs: Mapping[str, npt.NDArray[np.float32]],
    *,
    scale: float,
    size: tuple[int, int],
    score_threshold: float = 0.6,
    nms_iou: float = NMS_IOU,
) -> list[Face]:
    """Turn the network's outputs for one picture into faces.

    With cell (c, r) of stride s: centre ``((c + dx) s, (r + dy) s)``, size ``(s e^dw, s e^dh)``,
    landmark ``((kx + c) s, (ky + r) s)``, score ``sqrt(cls * obj)``.

    Args:
        outputs: the twelve outputs, each (1, n, k) or (n, k).
        scale: as returned by :func:`detector_input`.
        size: (height, width) of the picture, px.
        score_threshold: faces below are dropped.
        nms_iou: of two boxes that overlap by more than this, the one of lower score is dropped.

    Returns:
        The faces, best score first (ties: left to right, then top to bottom).

    Raises:
        KeyError: an output is missing.
        ValueError: an output's length does not belong to this size and scale.
    """
    padded = _padded_size(size, scale)
    rows = np.concatenate([_decode_stride(outputs, s, padded, score_threshold) for s in STRIDES])
    rows = rows[np.isfinite(rows).all(axis=1)]
    # The picture was scaled to whole pixels, so the two axes differ by a trifle.
    inner_h, inner_w = _scaled_size(size, scale)
    rows[:, 0:14:2] *= size[1] / inner_w
    rows[:, 1:14:2] *= size[0] / inner_h
    rows[:, 0:4:2] = np.clip(rows[:, 0:4:2], 0, size[1])
    rows[:, 1:4:2] = np.clip(rows[:, 1:4:2], 0, size[0])
    rows = rows[(rows[:, 2] - rows[:, 0] >= 1) & (rows[:, 3] - rows[:, 1] >= 1)]
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0], -rows[:, 14]))]
    return [_face(row) for row in rows[_kept_by_nms(rows[:, :4], nms_iou)]]


def merge_detections(*looks: Sequence[Face], nms_iou: float = NMS_IOU) -> list[Face]:
    """Join what several looks at one picture found.

    Args:
        looks: the faces of each look.
        nms_iou: of two boxes that overlap by more than this, the one of lower score is dropped.

    Returns:
        The faces, best score first, each once.
    """
    faces = sorted(
        (face for look in looks for face in look), key=lambda face: (-face.score, face.box)
    )
    boxes = np.array([face.box for face in faces], dtype=np.float64).reshape(-1, 4)
    return [faces[i] for i in _kept_by_nms(boxes, nms_iou)]


def scale_faces(faces: Sequence[Face], factor: float) -> list[Face]:
    """Return the same faces in the coordinates of the picture enlarged by ``factor``."""
    scaled = []
    for face in faces:
        x0, y0, x1, y1 = (value * factor for value in face.box)
        a, b, c, d, e = ((x * factor, y * factor) for x, y in face.landmarks)
        scaled.append(replace(face, box=(x0, y0, x1, y1), landmarks=(a, b, c, d, e)))
    return scaled


def _decode_stride(
    outputs: Mapping[str, npt.NDArray[np.float32]],
    stride: int,
    padded: tuple[int, int],
    threshold: float,
) -> npt.NDArray[np.float64]:
    """Return (n, 15): box corners, five landmarks, score; detector pixels.

    Only of the cells, few of thousands, whose score reaches the threshold.
    """
    high, wide = padded[0] // stride, padded[1] // stride

    def output(kind: str, width: int) -> npt.NDArray[np.float32]:
        value = np.asarray(outputs[f"{kind}_{stride}"])
        if value.size != high * wide * width:
            raise ValueError(
                f"Output {kind}_{stride} has shape {value.shape}, expected "
                f"({high * wide}, {width}) for an input of {padded[0]}x{padded[1]}."
            )
        return value.reshape(high * wide, width)

    boxes, landmarks = output("bbox", 4), output("kps", 10)
    certainties = np.concatenate([output("cls", 1), output("obj", 1)], axis=1).astype(np.float64)
    score = np.sqrt(np.clip(certainties, 0, 1).prod(axis=1))
    found = np.flatnonzero(score >= threshold)
    cells = np.stack([found % wide, found // wide], axis=1).astype(np.float64)
    box = boxes[found].astype(np.float64)
    center = (box[:, :2] + cells) * stride
    # Sizes past e^20 are nonsense of a broken network; the cap keeps them finite and clippable.
    half = np.exp(np.minimum(box[:, 2:], 20.0)) * stride / 2
    points = (landmarks[found].astype(np.float64).reshape(-1, 5, 2) + cells[:, None]) * stride
    return np.concatenate(
        [center - half, center + half, points.reshape(-1, 10), score[found, None]], axis=1
    )


def _kept_by_nms(boxes: npt.NDArray[np.float64], iou: float) -> list[int]:
    """Return the indices that greedy suppression keeps; ``boxes`` come best first."""
    kept: list[int] = []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = np.arange(len(boxes))
    while left.size:
        best, left = int(left[0]), left[1:]
        kept.append(best)
        corner0 = np.maximum(boxes[best, :2], boxes[left, :2])
        corner1 = np.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = np.prod(np.clip(corner1 - corner0, 0, None), axis=1)
        left = left[shared <= iou * (areas[best] + areas[left] - shared)]
    return kept


def _face(row: Sequence[float] | npt.NDArray[np.float64]) -> Face:
    x0, y0, x1, y1, *rest = (float(value) for value in row)
    points = list(zip(rest[0:10:2], rest[1:10:2], strict=True))
    return Face(
        box=(x0, y0, x1, y1),
        score=rest[10],
        landmarks=(points[0], points[1], points[2], points[3], points[4]),
    )
