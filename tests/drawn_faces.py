"""Faces of known place, size and tilt, and their plans, for the tests of the face pass."""

from __future__ import annotations

import math

from closeup.detection import Face, Point
from closeup.faces import FaceOptions, FacePlan, plan_faces

SIZE = (600, 800)


def make_face(
    x: float, y: float, side: float = 60.0, *, tilt_deg: float = 0.0, score: float = 0.9
) -> Face:
    """Return a face with landmarks in their usual places, turned clockwise by ``tilt_deg``."""
    cos, sin = math.cos(math.radians(tilt_deg)), math.sin(math.radians(tilt_deg))
    usual = ((-0.2, -0.12), (0.2, -0.12), (0.0, 0.08), (-0.15, 0.27), (0.15, 0.27))

    def turned(point: Point) -> Point:
        u, v = point
        return x + side * (cos * u - sin * v), y + side * (sin * u + cos * v)

    half_w, half_h = 0.4 * side, 0.5 * side
    reach_x = math.hypot(half_w * cos, half_h * sin)
    reach_y = math.hypot(half_w * sin, half_h * cos)
    a, b, c, d, e = (turned(point) for point in usual)
    return Face(
        box=(x - reach_x, y - reach_y, x + reach_x, y + reach_y),
        score=score,
        landmarks=(a, b, c, d, e),
    )


def make_plans(
    faces: list[Face],
    options: FaceOptions | None = None,
    *,
    size: tuple[int, int] = SIZE,
    seed: int = 7,
    work_px: int = 512,
) -> list[FacePlan]:
    return plan_faces(
        faces, image_size=size, work_px=work_px, options=options or FaceOptions(), seed=seed
    )
