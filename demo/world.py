"""The drawn world: scenes of people to pictures, with face boxes, landmarks and every attribute.

``python -m demo.world out.png`` draws a contact sheet.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from demo.attributes import Framing, Person, Placement, Scene, sample_scene
from demo.backgrounds import draw_background, tint_night
from demo.bodies import draw_body, draw_shadow
from demo.canvas import Canvas, View
from demo.heads import draw_back_hair, draw_head, features_of

cv2.setNumThreads(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Face:
    """A face in a picture.

    Attributes:
        person: index into the scene's people.
        box: x0, y0, x1, y1 in pixels, the visible part.
        landmarks: (5, 2) float64 in pixels, inside the box's whole face: eye at the picture's
            left, at its right, nose tip, mouth corner at the left, at the right.
    """

    person: int
    box: tuple[float, float, float, float]
    landmarks: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A drawn picture and what is known about it.

    Attributes:
        pixels: (size, size, 3) uint8 RGB.
        faces: those whose centre is visible, in the order of the scene's people.
        scene: all attributes.
        view: the part of the scene shown.
    """

    pixels: NDArray[np.uint8]
    faces: tuple[Face, ...]
    scene: Scene
    view: View


def draw_scene(
    scene: Scene, *, view: View | None = None, size: int = 128, supersample: int = 2
) -> Picture:
    """Draw a scene, or one square of it.

    Args:
        scene: what to draw.
        view: the square shown; the whole scene when None.
        size: side of the picture in pixels.
        supersample: pixels drawn per pixel and side; below 1 is refused.

    Raises:
        ValueError: ``size`` or ``supersample`` is below 1.
    """
    if size < 1 or supersample < 1:
        raise ValueError(f"size {size} and supersample {supersample} must be at least 1.")
    view = view or View()
    canvas = Canvas(size, view, supersample)
    draw_background(canvas, scene)
    if scene.framing is Framing.FULL:
        for _, placement in scene.people:
            draw_shadow(canvas, placement)
    found: list[Face] = []
    for index, (person, placement) in enumerate(scene.people):
        draw_back_hair(canvas, person, placement)
        draw_body(canvas, person, placement)
        draw_head(canvas, person, placement)
        face = locate_face(scene, index, view, size)
        if face is not None:
            found.append(face)
    if scene.place == "night":
        tint_night(canvas)
    return Picture(pixels=canvas.finish(), faces=tuple(found), scene=scene, view=view)


def _whole_face(
    person: Person, placement: Placement, view: View, size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Outline and landmarks in pixels, uncut."""
    canvas = Canvas(1, view, 1)
    canvas.set_frame(placement.x, placement.y, placement.unit, placement.tilt)
    at = features_of(person, placement)
    return canvas.to_pixels(at.outline()) * size, canvas.to_pixels(at.landmarks()) * size


def locate_face(scene: Scene, index: int, view: View, size: int) -> Face | None:
    """Box and landmarks of one person's face in a view; None when its centre is not visible."""
    person, placement = scene.people[index]
    outline, landmarks = _whole_face(person, placement, view, size)
    low, high = outline.min(0), outline.max(0)
    centre = (low + high) / 2
    if (centre < 0).any() or (centre > size).any() or (landmarks < 0).any():
        return None
    if (landmarks > size).any():
        return None
    low, high = np.clip(low, 0, size), np.clip(high, 0, size)
    box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
    return Face(person=index, box=box, landmarks=landmarks)


def face_view(scene: Scene, index: int, factor: float, dx: float = 0.0, dy: float = 0.0) -> View:
    """The square around one face that the face pass would cut out.

    Args:
        scene: the scene.
        index: of the person.
        factor: side over the larger side of the face's box.
        dx: shift in shares of the side, before it is moved inside the scene.
        dy: likewise.
    """
    person, placement = scene.people[index]
    outline, _ = _whole_face(person, placement, View(), 1)
    low, high = outline.min(0), outline.max(0)
    side = min(1.0, float((high - low).max()) * factor)
    centre = (low + high) / 2 + np.array([dx, dy]) * side
    x, y = np.clip(centre - side / 2, 0.0, 1.0 - side)
    return View(x=float(x), y=float(y), side=side)


def contact_sheet(columns: int = 8, size: int = 192) -> NDArray[np.uint8]:
    """Rows: full, half, portrait, face, several people, tight crops of full-body scenes."""
    rows = []
    for row, framing in enumerate(Framing):
        seeds = range(1000 * row, 1000 * row + columns)
        scenes = [sample_scene(seed, framing=framing, people=1) for seed in seeds]
        rows.append([draw_scene(scene, size=size).pixels for scene in scenes])
    groups = [
        sample_scene(
            9000 + i,
            framing=(Framing.FULL, Framing.HALF, Framing.PORTRAIT)[i % 3],
            people=2 + i % 2,
        )
        for i in range(columns)
    ]
    rows.append([draw_scene(scene, size=size).pixels for scene in groups])
    far = [sample_scene(seed, framing=Framing.FULL, people=1) for seed in range(columns)]
    rows.append(
        [
            draw_scene(s, view=face_view(s, 0, 1.5 + i / 8), size=size).pixels
            for i, s in enumerate(far)
        ]
    )
    return np.concatenate([np.concatenate(row, 1) for row in rows])


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "world.png")
    cv2.imwrite(str(target), cv2.cvtColor(contact_sheet(), cv2.COLOR_RGB2BGR))
