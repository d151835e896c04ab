"""Bodies and clothes of the drawn world, in head units (the head's centre is 0, its chin 1)."""

from __future__ import annotations

import numpy as np

from demo.attributes import CLOTH, SKIN, Person, Placement
from demo.canvas import CIRCLE, Canvas, Colour, Points, darken, lighten, mix, spline

_SHOE: Colour = (60, 44, 40)


def skin_tones(person: Person) -> tuple[Colour, Colour, Colour]:
    """Lit, plain and shaded skin."""
    skin = SKIN[person.skin]
    return lighten(skin, 0.18), skin, mix(darken(skin, 0.72), (120, 40, 30), 0.12)


def _shoulder(person: Person) -> float:
    return 1.28 if person.woman else 1.55


def draw_shadow(canvas: Canvas, placement: Placement) -> None:
    """The soft shadow on the ground."""
    canvas.set_frame(placement.x, placement.y, placement.unit, 0.0)
    canvas.glow((0.2, 11.0), (2.4, 0.55), (10, 10, 24), 0.5)


def draw_body(canvas: Canvas, person: Person, placement: Placement) -> None:
    """Everything below the chin, neck included; draw the head after it."""
    canvas.set_frame(placement.x, placement.y, placement.unit, placement.tilt * 0.12)
    for side in (-1, 1):
        _draw_leg(canvas, person, placement, side)
    if person.bottom == "skirt":
        _draw_skirt(canvas, person, placement)
    for side in (-1, 1):
        _draw_arm(canvas, person, placement, side)
    if person.top == "dress":
        _draw_dress(canvas, person, placement)
    else:
        _draw_top(canvas, person)
    _draw_neck(canvas, person)


def _draw_leg(canvas: Canvas, person: Person, placement: Placement, side: int) -> None:
    _, skin, shade = skin_tones(person)
    stride = placement.stride * (1.1 if placement.pose == "walking" else 0.35)
    hip, foot = side * 0.52, side * 0.62 + stride * (side if placement.pose == "walking" else 1)
    lift = 0.25 * abs(stride) if placement.pose == "walking" and side > 0 else 0.0
    knee = (hip + foot) / 2 + side * 0.06
    spine = [[hip, 5.3], [knee, 8.0], [foot, 10.5 - lift]]
    canvas.limb(spine, (0.42, 0.24), skin, shade)
    cloth = CLOTH[person.bottom_colour]
    light, dark = lighten(cloth, 0.14), darken(cloth, 0.68)
    if person.bottom == "trousers":
        canvas.limb([[hip, 5.2], *spine[1:]], (0.6, 0.34), light, dark)
    elif person.bottom == "shorts":
        canvas.limb([[hip, 5.2], [(hip + knee) / 2, 6.3], [knee, 7.3]], (0.6, 0.56), light, dark)
    shoe = darken(CLOTH[person.top_colour], 0.68) if person.top == "dress" else _SHOE
    at = (foot + side * 0.14, 10.82 - lift)
    canvas.ellipse(at, (0.46, 0.24), lighten(shoe, 0.15), darken(shoe, 0.7))


def _elbow_and_hand(person: Person, placement: Placement, side: int) -> tuple[Points, Points]:
    """Where the arm of one side goes, from its shoulder."""
    shoulder = np.array([side * (_shoulder(person) - 0.22), 1.85])
    raised = -1 if placement.mirror else 1
    if placement.pose == "waving" and side == raised:
        elbow = shoulder + [side * 0.9, 1.0]
        return elbow, elbow + [side * 0.35, -1.75]
    if placement.pose == "hands on hips":
        elbow = shoulder + [side * 0.95, 1.35]
        return elbow, elbow + [-side * 0.75, 1.2]
    if placement.pose == "walking":
        swing = placement.stride * 0.5 * side
        elbow = shoulder + [side * 0.4 + swing * 0.4, 1.7]
        return elbow, elbow + [side * 0.05 + swing, 1.5]
    spread = abs(placement.stride) * 0.3
    elbow = shoulder + [side * (0.3 + spread), 1.75]
    return elbow, elbow + [side * (spread * 1.4 - 0.1), 1.6]


def _draw_arm(canvas: Canvas, person: Person, placement: Placement, side: int) -> None:
    _, skin, shade = skin_tones(person)
    shoulder = np.array([side * (_shoulder(person) - 0.22), 1.85])
    elbow, hand = _elbow_and_hand(person, placement, side)
    canvas.limb([shoulder, elbow, hand], (0.3, 0.2), skin, shade)
    palm = hand + (hand - elbow) * 0.1
    canvas.ellipse((float(palm[0]), float(palm[1])), (0.26, 0.27), skin, shade, "round")
    cloth = CLOTH[person.top_colour]
    light, dark = lighten(cloth, 0.16), darken(cloth, 0.68)
    if person.top == "dress":
        canvas.limb([shoulder, shoulder + (elbow - shoulder) * 0.38], (0.38, 0.36), light, dark)
    else:
        wrist = elbow + (hand - elbow) * (0.85 if person.top != "shirt" else 0.72)
        canvas.limb([shoulder, elbow, wrist], (0.42, 0.3), light, dark)


def _draw_skirt(canvas: Canvas, person: Person, placement: Placement) -> None:
    cloth, hem = CLOTH[person.bottom_colour], 6.8 + 1.2 * placement.hem
    outline = [[-1.1, 4.7], [-1.4, 5.6], [-1.75, hem], [0, hem + 0.15], [1.75, hem], [1.4, 5.6]]
    canvas.polygon(
        spline([*outline, [1.1, 4.7], [0, 4.6]]), lighten(cloth, 0.14), darken(cloth, 0.68), "x"
    )


def _stripes(canvas: Canvas, outline: Points, colour: Colour) -> None:
    """Light bands across a garment."""
    band = lighten(colour, 0.6) if sum(colour) < 600 else darken(colour, 0.55)
    canvas.clip_to(outline)
    for row in range(6):
        y = 1.95 + row * 0.6
        canvas.polygon([[-2.2, y], [2.2, y], [2.2, y + 0.26], [-2.2, y + 0.26]], band)
    canvas.clip_to(None)


def _draw_dress(canvas: Canvas, person: Person, placement: Placement) -> None:
    cloth, wide, hem = CLOTH[person.top_colour], _shoulder(person), 6.8 + 1.4 * placement.hem
    left = [
        [-0.45, 1.42],
        [-wide, 1.72],
        [-0.98, 2.9],
        [-0.82, 3.9],
        [-1.3, 5.4],
        [-1.95, hem],
    ]
    right = [[-x, y] for x, y in reversed(left)]
    outline = spline([*left, [0, hem + 0.18], *right])
    canvas.polygon(outline, lighten(cloth, 0.16), darken(cloth, 0.68), "x")
    if person.striped:
        _stripes(canvas, outline, cloth)
    belt = [[-0.84, 3.75], [0.84, 3.75], [0.84, 4.05], [-0.84, 4.05]]
    canvas.polygon(belt, darken(cloth, 0.55))
    for fold in (-0.7, 0, 0.7):
        canvas.line([[fold * 0.7, 4.6], [fold * 1.5, hem - 0.2]], 0.05, darken(cloth, 0.78))


def _draw_top(canvas: Canvas, person: Person) -> None:
    cloth, wide = CLOTH[person.top_colour], _shoulder(person)
    light, dark = lighten(cloth, 0.16), darken(cloth, 0.68)
    waist = 1.05 if person.woman else 1.22
    if person.bottom != "skirt":
        trousers = CLOTH[person.bottom_colour]
        seat = [[-waist, 4.6], [-waist * 0.95, 5.2], [-0.98, 6.2], [-0.1, 6.0]]
        outline = spline([*seat, *([-x, y] for x, y in reversed(seat))])
        canvas.polygon(outline, lighten(trousers, 0.14), darken(trousers, 0.68), "x")
    left = [[-0.5, 1.42], [-wide, 1.7], [-waist - 0.1, 3.0], [-waist, 5.1]]
    right = [[-x, y] for x, y in reversed(left)]
    outline = spline([*left, [0, 5.25], *right])
    canvas.polygon(outline, light, dark, "x")
    if person.striped:
        _stripes(canvas, outline, cloth)
    canvas.glow((0.0, 1.75), (0.95, 0.6), dark, 0.55)
    if person.top == "shirt":
        canvas.line([[0, 1.9], [0, 5.1]], 0.05, darken(cloth, 0.7))
        button = lighten(cloth, 0.55) if sum(cloth) < 600 else darken(cloth, 0.6)
        for row in range(4):
            canvas.ellipse((0, 2.3 + 0.8 * row), (0.07, 0.07), button)
    elif person.top == "jacket":
        inner = (238, 238, 240) if sum(cloth) < 600 else (90, 96, 110)
        canvas.polygon([[-0.42, 1.4], [0.42, 1.4], [0.16, 4.4], [-0.16, 4.4]], inner)
        for side in (-1, 1):
            lapel = [[side * 0.4, 1.35], [side * 0.85, 1.9], [side * 0.62, 2.4], [side * 0.2, 3.6]]
            canvas.polygon(lapel, darken(cloth, 0.82), darken(cloth, 0.6))
    else:
        for share in (0.25, 0.5, 0.75):
            x = (share - 0.5) * 1.8
            canvas.line([[x, 4.85], [x, 5.15]], 0.06, darken(cloth, 0.72))


def _draw_neck(canvas: Canvas, person: Person) -> None:
    _, skin, shade = skin_tones(person)
    low = 2.0 if person.top == "dress" else 1.85 if person.top == "shirt" else 1.68
    left = [[-0.36, 0.7], [-0.36, 1.3], [-0.62, 1.52]]
    right = [[-x, y] for x, y in reversed(left)]
    canvas.polygon(spline([*left, [0, low], *right]), shade, skin)
    canvas.glow((0.05, 1.0), (0.6, 0.42), darken(shade, 0.55), 0.75)
    cloth = CLOTH[person.top_colour]
    if person.top == "shirt":
        for side in (-1, 1):
            collar = [[side * 0.34, 1.2], [side * 0.78, 1.5], [side * 0.42, 2.05], [0, 1.85]]
            canvas.polygon(collar, lighten(cloth, 0.25), darken(cloth, 0.68))
    elif person.top == "sweater":
        ring = CIRCLE * [0.6, 0.26] + [0, 1.5]
        rows = ring[(ring[:, 1] > 1.45)]
        canvas.line(rows[np.argsort(rows[:, 0])], 0.2, darken(cloth, 0.8))
