"""Heads of the drawn world: hair, face, eyes, glasses, in head units (chin at y = 1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from demo.attributes import EYES, HAIR, Person, Placement
from demo.bodies import skin_tones
from demo.canvas import CIRCLE, Canvas, Colour, Points, curve, darken, lighten, mix, spline

_INK: Colour = (34, 24, 26)
_STREAK: Colour = (248, 248, 250)


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """Where the features of one face are, in head units.

    Attributes:
        yaw: sideways shift of all features.
        eye_x: distance of an eye from the middle.
        eye_y: height of the eyes.
        nose_y: height of the nose's tip.
        mouth_y: height of the mouth's corners.
        mouth_half: half the mouth's width.
        jaw: half the jaw's width.
    """

    yaw: float
    eye_x: float
    eye_y: float
    nose_y: float
    mouth_y: float
    mouth_half: float
    jaw: float

    def landmarks(self) -> Points:
        """(5, 2): eye at the picture's left, at its right, nose tip, mouth corners likewise."""
        return np.array(
            [
                [self.yaw - self.eye_x, self.eye_y],
                [self.yaw + self.eye_x, self.eye_y],
                [self.yaw * 1.3, self.nose_y],
                [self.yaw - self.mouth_half, self.mouth_y],
                [self.yaw + self.mouth_half, self.mouth_y],
            ]
        )

    def outline(self) -> Points:
        """The face's edge, ears and hair left out."""
        half = [[-0.36, 0.93], [-self.jaw, 0.62], [-0.82, 0.1], [-0.8, -0.5], [-0.45, -0.95]]
        mirrored = [[-x, y] for x, y in reversed(half)]
        return spline([[0, 1.02], *half, [0, -1.02], *mirrored])


def features_of(person: Person, placement: Placement) -> Features:
    """The features of a person as placed."""
    jaw, apart, nose, _, mouth, _ = person.build
    smile = person.expression == "smiling"
    half = {"smiling": 0.3, "serious": 0.23, "surprised": 0.15}[person.expression]
    return Features(
        yaw=placement.yaw,
        eye_x=0.35 + 0.02 * apart,
        eye_y=0.02,
        nose_y=0.36 + 0.03 * nose,
        mouth_y=0.575 if smile else 0.66,
        mouth_half=half + 0.02 * mouth,
        jaw=(0.6 if person.woman else 0.7) + 0.04 * jaw,
    )


def _hair_tones(person: Person) -> tuple[Colour, Colour, Colour]:
    hair = HAIR[person.hair]
    return lighten(hair, 0.28), hair, darken(hair, 0.62)


def draw_back_hair(canvas: Canvas, person: Person, placement: Placement) -> None:
    """The hair behind body and head; draw it before the body."""
    canvas.set_frame(placement.x, placement.y, placement.unit, placement.tilt)
    light, hair, dark = _hair_tones(person)
    if person.style == "long":
        low = 2.2 + 0.35 * (person.build[5] + 1)
        left = [[-1.12, 0.9], [-1.0, -0.3], [-0.55, -1.15]]
        right = [[-x, y] for x, y in reversed(left)]
        ends = [[1.05, low], [0.35, low + 0.15], [-0.35, low + 0.15], [-1.05, low]]
        canvas.polygon(spline([*left, *right, *ends]), hair, dark)
    elif person.style == "curly":
        for index in range(11):
            x, y = _around(0.8 + 1.4 * index / 10)
            colour = mix(hair, light, 0.3 * (index % 2))
            canvas.ellipse((x, -0.12 + y * 1.02), (0.42, 0.42), colour, dark, "round")
    elif person.style == "bun":
        canvas.ellipse((0.08, -1.38), (0.46, 0.42), light, dark, "round")
    elif person.style == "ponytail":
        side = 1 if person.build[5] > 0 else -1
        tail = [[0.5, -0.95], [1.15, -0.9], [1.5, -0.1], [1.45, 1.0], [1.15, 1.6], [1.1, 0.6]]
        points = np.array([*tail, [1.0, -0.2]]) * [side, 1]
        canvas.polygon(spline(points), hair, dark)


def _around(half_turns: float) -> tuple[float, float]:
    """A point of the unit circle at an angle in half turns, exactly rounded."""
    angle = half_turns * np.pi
    return round(float(np.cos(angle)) * 2**20) / 2**20, round(float(np.sin(angle)) * 2**20) / 2**20


def draw_head(canvas: Canvas, person: Person, placement: Placement) -> Features:
    """Head and face over the body; returns where the features are."""
    canvas.set_frame(placement.x, placement.y, placement.unit, placement.tilt)
    at = features_of(person, placement)
    _draw_skull(canvas, person, at)
    _draw_marks(canvas, person, at)
    if person.beard:
        _draw_beard(canvas, person, at)
    _draw_mouth(canvas, person, at)
    _draw_nose(canvas, person, at)
    for side in (-1, 1):
        _draw_eye(canvas, person, at, side, placement.gaze)
        _draw_brow(canvas, person, at, side)
    if person.glasses:
        _draw_glasses(canvas, at)
    _draw_front_hair(canvas, person)
    if person.earrings:
        for side in (-1, 1):
            centre = (side * 0.86 - at.yaw * 0.4, 0.42)
            canvas.ellipse(centre, (0.1, 0.12), (255, 226, 120), (196, 140, 40), "round")
    return at


def _draw_skull(canvas: Canvas, person: Person, at: Features) -> None:
    light, skin, shade = skin_tones(person)
    for side in (-1, 1):
        centre = (side * 0.84 - at.yaw * 0.4, 0.12)
        canvas.ellipse(centre, (0.14, 0.21), skin, shade, "round")
    outline = at.outline()
    canvas.polygon(outline, light, mix(skin, shade, 0.55), "round")
    canvas.clip_to(outline)
    canvas.glow((0.95 + at.yaw, 0.3), (0.8, 1.3), shade, 0.5)
    canvas.glow((at.yaw, 1.12), (0.8, 0.4), shade, 0.45)
    canvas.glow((-0.25 + at.yaw, -0.45), (0.6, 0.4), lighten(light, 0.4), 0.4)
    blush = (240, 110, 100) if person.skin in ("pale", "tan") else (190, 70, 50)
    for side in (-1, 1):
        canvas.glow((side * 0.5 + at.yaw, 0.4), (0.3, 0.22), blush, 0.4)
        socket = (at.yaw + side * at.eye_x, at.eye_y - 0.1)
        canvas.glow(socket, (0.36, 0.28), shade, 0.35)
    canvas.clip_to(None)


def _draw_marks(canvas: Canvas, person: Person, at: Features) -> None:
    _, _, shade = skin_tones(person)
    spot = darken(shade, 0.72)
    if person.freckles:
        places = ((0.18, 0.26), (0.34, 0.3), (0.5, 0.27), (0.27, 0.4), (0.43, 0.42), (0.58, 0.38))
        for x, y in places:
            for side in (-1, 1):
                canvas.ellipse((at.yaw + side * x, y), (0.035, 0.035), spot)
    if person.mole:
        canvas.ellipse((at.yaw + 0.42, 0.56), (0.055, 0.055), (44, 26, 22))


def _draw_beard(canvas: Canvas, person: Person, at: Features) -> None:
    _, hair, dark = _hair_tones(person)
    outer = [[-0.4, 1.0], [-0.7, 0.66], [-0.8, 0.12]]
    inner = [[-0.7, 0.2], [-0.56, 0.5]]
    lip = [[at.yaw - 0.3, 0.46], [at.yaw, 0.42], [at.yaw + 0.3, 0.46]]
    right_in = [[-x, y] for x, y in reversed(inner)]
    right_out = [[-x, y] for x, y in reversed(outer)]
    canvas.polygon(spline([[0, 1.1], *outer, *inner, *lip, *right_in, *right_out]), hair, dark)


def _draw_mouth(canvas: Canvas, person: Person, at: Features) -> None:
    _, _, shade = skin_tones(person)
    x, half, y = at.yaw, at.mouth_half, at.mouth_y
    lips = (200, 66, 80) if person.woman else mix(shade, (150, 60, 50), 0.5)
    if person.expression == "surprised":
        canvas.ellipse((x, y + 0.04), (half * 0.95, 0.16), lips)
        canvas.ellipse((x, y + 0.04), (half * 0.7, 0.11), (96, 26, 32), (60, 14, 22))
        return
    if person.expression == "serious":
        wide = half * 0.3
        lip = [[x - half, y], [x - wide, y - 0.035], [x, y - 0.02], [x + wide, y - 0.035]]
        low = [[x + half, y], [x + half * 0.43, y + 0.07], [x - half * 0.43, y + 0.07]]
        canvas.polygon(spline([*lip, *low]), lips, darken(lips, 0.8))
        canvas.line([[x - half, y], [x + half, y]], 0.03, darken(lips, 0.55))
        return
    mouth = [[-1, -0.01], [-0.47, 0.06], [0.47, 0.06], [1, -0.01], [0.67, 0.2], [0, 0.27]]
    teeth = [[-0.8, 0.03], [-0.33, 0.075], [0.33, 0.075], [0.8, 0.03], [0.47, 0.13]]
    scale = np.array([half, 1.0])
    place = np.array([x, y])
    open_mouth = np.array([*mouth, [-0.67, 0.2]]) * scale + place
    canvas.polygon(spline(open_mouth), (130, 36, 40))
    canvas.polygon(spline(np.array([*teeth, [-0.47, 0.13]]) * scale + place), (252, 250, 248))
    lower = np.array([[-1, -0.01], [-0.55, 0.2], [0, 0.27], [0.55, 0.2], [1, -0.01]])
    canvas.line(curve(lower * scale + place), 0.05 if person.woman else 0.03, lips)


def _draw_nose(canvas: Canvas, person: Person, at: Features) -> None:
    light, skin, shade = skin_tones(person)
    x, y = at.yaw * 1.3, at.nose_y
    nose = [[x - 0.02, 0.02], [x - 0.14, y], [x, y + 0.06], [x + 0.14, y]]
    canvas.polygon(spline(nose), mix(skin, shade, 0.12), mix(skin, shade, 0.75))
    canvas.glow((x - 0.03, y - 0.06), (0.11, 0.16), lighten(light, 0.5), 0.75)


def _draw_eye(canvas: Canvas, person: Person, at: Features, side: int, gaze: float) -> None:
    x, y = at.yaw + side * at.eye_x, at.eye_y
    iris = EYES[person.other_eye] if side > 0 and person.other_eye else EYES[person.eyes]
    tall = 1.18 if person.expression == "surprised" else 1.0
    white = [
        [-0.23, 0.02],
        [-0.12, -0.14],
        [0.12, -0.14],
        [0.23, 0.02],
        [0.11, 0.13],
        [-0.11, 0.13],
    ]
    scale, place = np.array([1.0, tall]), np.array([x, y])
    opening = spline(np.array(white) * scale + place)
    canvas.polygon(opening, (222, 222, 230), (255, 255, 255))
    canvas.clip_to(opening)
    centre = x + gaze
    canvas.ellipse((centre, y - 0.01), (0.13, 0.14), darken(iris, 0.5), darken(iris, 0.6))
    canvas.ellipse((centre, y + 0.005), (0.1, 0.112), darken(iris, 0.95), lighten(iris, 0.35))
    canvas.ellipse((centre, y - 0.01), (0.056, 0.062), (16, 14, 18))
    canvas.clip_to(None)
    canvas.ellipse((centre - 0.045, y - 0.065), (0.042, 0.044), (255, 255, 255))
    canvas.ellipse((centre + 0.05, y + 0.055), (0.02, 0.02), (235, 240, 248))
    lid = np.array([[-0.24, 0.02], [-0.12, -0.145], [0.12, -0.145], [0.24, 0.02]]) * scale + place
    canvas.line(curve(lid), 0.06 if person.woman else 0.045, _INK)
    if person.woman:
        canvas.line([[x + side * 0.22, y], [x + side * 0.32, y - 0.1]], 0.045, _INK)


def _draw_brow(canvas: Canvas, person: Person, at: Features, side: int) -> None:
    _, _, dark = _hair_tones(person)
    x = at.yaw + side * at.eye_x
    lift = {"smiling": -0.28, "serious": -0.24, "surprised": -0.38}[person.expression]
    lift -= 0.02 * person.build[3]
    colour = (150, 150, 156) if person.hair == "white" else dark
    points = [[x - side * 0.2, lift + 0.03], [x, lift - 0.03], [x + side * 0.22, lift + 0.03]]
    canvas.line(curve(points), 0.06 if person.woman else 0.095, colour)


def _draw_glasses(canvas: Canvas, at: Features) -> None:
    x, y, frame = at.yaw, at.eye_y, (30, 30, 36)
    for side in (-1, 1):
        ring = CIRCLE * [0.3, 0.26] + [x + side * at.eye_x, y + 0.02]
        canvas.line(np.concatenate([ring, ring[:1]]), 0.055, frame)
        outer = x + side * (at.eye_x + 0.29)
        canvas.line([[outer, y - 0.03], [side * 0.84, y - 0.06]], 0.05, frame)
    canvas.line([[x - at.eye_x + 0.29, y - 0.02], [x + at.eye_x - 0.29, y - 0.02]], 0.055, frame)


def _draw_front_hair(canvas: Canvas, person: Person) -> None:
    light, hair, dark = _hair_tones(person)
    parting = 0.35 * person.build[5]
    if person.style == "short":
        crown = [[-0.92, 0.1], [-0.98, -0.5], [-0.62, -1.15], [0, -1.3], [0.62, -1.15]]
        fringe = [[0.78, -0.35], [0.4, -0.58], [parting, -0.5], [-0.45, -0.6], [-0.78, -0.35]]
        canvas.polygon(spline([*crown, [0.98, -0.5], [0.92, 0.1], *fringe]), light, dark)
    elif person.style == "curly":
        for index in range(8):
            x, y = _around(1.06 + 0.88 * index / 7)
            colour = light if index % 2 else hair
            canvas.ellipse((x * 0.74, -0.28 + y * 0.72), (0.29, 0.27), colour, dark, "round")
    else:
        _draw_parted(canvas, person, parting)
    if person.streak:
        left = parting - 0.02
        points = [[left, -0.8], [left - 0.2, -1.2], [left - 0.52, -1.08], [left - 0.72, -0.5]]
        drop = 0.6 if person.style in ("long", "braids") else 0.0
        canvas.polygon(spline([*points, [-0.86, drop], [-0.74, -0.36]]), _STREAK, (214, 214, 222))


def _draw_parted(canvas: Canvas, person: Person, parting: float) -> None:
    """Hair combed to both sides: long, bun, ponytail, braids."""
    light, _, dark = _hair_tones(person)
    drop = {"long": 0.55, "braids": 0.3}.get(person.style, 0.0)
    left = [[-0.98, 0.2 + drop], [-1.0, -0.5], [-0.6, -1.12]]
    right = [[-x, y] for x, y in reversed(left)]
    inner = [[0.84, 0.1 + drop * 0.6], [0.74, -0.35], [parting + 0.1, -0.86]]
    back = [[parting - 0.1, -0.86], [-0.74, -0.35], [-0.84, 0.1 + drop * 0.6]]
    canvas.polygon(spline([*left, [0, -1.24], *right, *inner, *back]), light, dark)
    shine = lighten(HAIR[person.hair], 0.45)
    canvas.line(curve([[-0.7, -0.62], [-0.35, -0.98], [0.05, -1.08]]), 0.05, shine)
    if person.style == "braids":
        _draw_braids(canvas, person)


def _draw_braids(canvas: Canvas, person: Person) -> None:
    light, hair, dark = _hair_tones(person)
    for side in (-1, 1):
        for index in range(6):
            y = 0.55 + 0.3 * index
            width = 0.24 - 0.015 * index
            colour = light if index % 2 else hair
            canvas.ellipse((side * (0.95 + 0.02 * index), y), (width, 0.22), colour, dark, "round")
        canvas.ellipse((side * 1.06, 2.3), (0.12, 0.1), (214, 60, 70))
        canvas.ellipse((side * 1.06, 2.5), (0.16, 0.2), hair, dark)
