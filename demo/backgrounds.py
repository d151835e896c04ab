"""The nine places that people of the drawn world stand in."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from demo.attributes import Scene
from demo.canvas import Canvas, Colour, Points, darken, lighten, spline

Random = np.random.Generator


class _Backdrop:
    """Shapes in scene units for one background.

    Attributes:
        horizon: height of the ground's edge.
        zoom: size of things.
    """

    def __init__(self, canvas: Canvas, scene: Scene) -> None:
        self.canvas = canvas
        self.random: Random = np.random.default_rng(scene.background_seed)
        self.horizon = scene.horizon
        self.zoom = scene.zoom

    def draw(self, low: float, high: float) -> float:
        return low + (high - low) * self.random.random()

    def fill(self, top: Colour, bottom: Colour) -> None:
        self.rectangle(-0.02, -0.02, 1.02, 1.02, top, bottom)

    def rectangle(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        colour: Colour,
        shade: Colour | None = None,
        along: str = "y",
    ) -> None:
        self.canvas.polygon([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], colour, shade, along)

    def disc(
        self, x: float, y: float, radius: float, colour: Colour, shade: Colour | None = None
    ) -> None:
        self.canvas.ellipse((x, y), (radius, radius), colour, shade, "round")

    def wave(self, height: float, swing: float, pace: float, phase: float) -> Points:
        """A polygon from a sine-like edge down to the bottom."""
        x = np.arange(15) / 14 * 1.1 - 0.05
        turn = x * pace + phase
        turn = turn - np.floor(turn / 2) * 2 - 1  # -1 to 1, then a parabola in a sine's place
        y = height + swing * 4 * turn * (1 - np.abs(turn))
        return np.concatenate([np.stack([x, y], 1), [[1.05, 1.02], [-0.05, 1.02]]])

    def ground(self, top: Colour, bottom: Colour, lift: float = 0.0) -> None:
        self.rectangle(-0.02, self.horizon + lift, 1.02, 1.02, top, bottom)


def _trees(back: _Backdrop, count: int, low: float, high: float) -> None:
    for index in range(count):
        x = (index + back.draw(0.1, 0.9)) / count
        tall = back.zoom * back.draw(low, high)
        half, foot = back.zoom * 0.018, back.horizon + back.zoom * 0.03
        trunk = back.horizon - tall * 0.5
        back.rectangle(x - half, trunk, x + half, foot, (112, 76, 48), (80, 52, 34), "x")
        leaf = (52 + back.draw(-10, 20), 128 + back.draw(-20, 20), 58.0)
        for dx, dy in ((-0.5, 0.1), (0.5, 0.1), (0.0, -0.35)):
            y = back.horizon - tall * 0.75 + dy * tall * 0.5
            back.disc(x + dx * tall * 0.42, y, tall * 0.36, lighten(leaf, 0.2), darken(leaf, 0.75))


def _clouds(back: _Backdrop, count: int) -> None:
    for _ in range(count):
        x, y = back.random.random(), back.horizon * back.draw(0.15, 0.5)
        for dx, size in ((-0.07, 0.7), (0.07, 0.8), (0.0, 1.0)):
            radii = (back.zoom * 0.085 * size, back.zoom * 0.045 * size)
            back.canvas.ellipse((x + dx * back.zoom, y), radii, (248, 250, 255))


def _park(back: _Backdrop) -> None:
    back.fill((120, 186, 240), (222, 240, 250))
    _clouds(back, 2)
    hill = back.wave(back.horizon - back.zoom * 0.08, back.zoom * 0.03, back.draw(1, 2.4), 0.7)
    back.canvas.polygon(hill, (96, 170, 98), (60, 130, 70))
    _trees(back, 3, 0.22, 0.34)
    back.ground((126, 196, 92), (70, 142, 62))
    bend, wide = back.draw(-0.3, 0.3), back.zoom * 0.3
    left, right = 0.5 + bend - back.zoom * 0.03, 0.5 + bend + back.zoom * 0.03
    foot = 0.5 + bend * 0.3
    path = [[left, back.horizon], [right, back.horizon], [foot + wide, 1.02], [foot - wide, 1.02]]
    back.canvas.polygon(path, (222, 204, 168), (202, 180, 140))


def _palm(back: _Backdrop) -> None:
    x, z, h = (0.12, 0.88)[int(back.random.integers(2))], back.zoom, back.horizon
    stem = [
        [x - z * 0.02, h + z * 0.06],
        [x, h - z * 0.2],
        [x + z * 0.04, h - z * 0.4],
        [x + z * 0.06, h - z * 0.39],
        [x + z * 0.03, h - z * 0.2],
        [x + z * 0.025, h + z * 0.06],
    ]
    back.canvas.polygon(spline(stem), (150, 108, 68), (110, 76, 48), "x")
    top = np.array([x + z * 0.05, h - z * 0.4])
    leaves = ((-0.97, -0.24), (-0.59, -0.81), (0.62, -0.78), (0.98, -0.2), (0.94, 0.34))
    for dx, dy in (*leaves, (-0.92, 0.38)):
        along, side = np.array([dx, dy]) * z, np.array([-dy, dx]) * z
        leaf = [
            top,
            top + along * 0.1 + side * 0.03 - [0, z * 0.01],
            top + along * 0.2 + [0, z * 0.05],
            top + along * 0.1 - side * 0.02,
        ]
        back.canvas.polygon(spline(leaf), (46, 140, 70))


def _beach(back: _Backdrop) -> None:
    z, h = back.zoom, back.horizon
    back.fill((92, 186, 244), (236, 246, 250))
    back.disc(
        back.draw(0.1, 0.9), h * back.draw(0.2, 0.5), z * 0.07, (255, 246, 190), (255, 226, 120)
    )
    back.rectangle(-0.02, h - z * 0.12, 1.02, h + z * 0.06, (34, 132, 190), (90, 200, 206))
    surf = back.wave(h + z * 0.03, z * 0.012, back.draw(2.5, 4.5), back.draw(0, 2))
    back.canvas.polygon(surf, (255, 255, 255))
    back.canvas.polygon(surf + [0, z * 0.02], (244, 222, 170), (222, 190, 130))
    if back.random.random() < 0.5:
        _palm(back)


def _windows(back: _Backdrop, x: float, wide: float, tall: float, night: bool) -> None:
    step, column = back.zoom * 0.05, wide / 3
    for row in range(int(tall / step) - 1):
        for place in range(3):
            lit = back.random.random() < 0.5
            on, off = (
                ((255, 214, 110), (52, 52, 86)) if night else ((196, 222, 240), (106, 126, 150))
            )
            left, top = x + column * (place + 0.25), back.horizon - tall + step * (row + 0.5)
            corner = (left + column * 0.5, top + step * 0.5)
            back.rectangle(left, top, *corner, on if lit else off)


def _houses(back: _Backdrop, night: bool) -> None:
    x = -back.draw(0, 0.1) * back.zoom
    while x < 1:
        wide, tall = back.zoom * back.draw(0.13, 0.22), back.zoom * back.draw(0.25, 0.58)
        tone, brick = back.draw(-16, 16), back.random.random() < 0.4
        wall: Colour = (150 + tone, 146 + tone, 156 + tone)
        if night:
            wall = (34 + tone * 0.5, 32 + tone * 0.5, 62 + tone)
        elif brick:
            wall = (176 + tone, 134 + tone, 116 + tone)
        top = back.horizon - tall
        back.rectangle(x, top, x + wide, back.horizon, wall, darken(wall, 0.8), "x")
        _windows(back, x, wide, tall, night)
        x += wide + back.zoom * back.draw(0, 0.02)


def _city(back: _Backdrop) -> None:
    back.fill((150, 190, 226), (226, 230, 234))
    _houses(back, night=False)
    back.ground((176, 174, 176), (140, 138, 142))
    curb = back.horizon + back.zoom * 0.03
    back.rectangle(-0.02, curb, 1.02, curb + back.zoom * 0.015, (206, 204, 202))


def _night(back: _Backdrop) -> None:
    back.fill((14, 16, 48), (62, 52, 108))
    for _ in range(26):
        x, y = back.random.random(), back.draw(0, back.horizon * 0.8)
        back.disc(x, y, back.draw(0.002, 0.004), (230, 230, 255))
    back.disc(
        back.draw(0.1, 0.9), back.horizon * 0.2, back.zoom * 0.07, (255, 250, 224), (236, 226, 180)
    )
    _houses(back, night=True)
    back.ground((58, 56, 80), (38, 36, 56))
    curb = back.horizon + back.zoom * 0.03
    back.rectangle(-0.02, curb, 1.02, curb + back.zoom * 0.015, (90, 88, 112))


def _studio(back: _Backdrop) -> None:
    colours: tuple[Colour, ...] = (
        (196, 200, 206),
        (222, 206, 186),
        (160, 196, 200),
        (206, 186, 206),
    )
    colour = colours[int(back.random.integers(4))]
    back.fill(lighten(colour, 0.1), colour)
    back.disc(0.5, 0.4, 0.75, lighten(colour, 0.45), colour)
    back.ground(darken(colour, 0.86), lighten(colour, 0.1), back.zoom * 0.03)


def _firs(back: _Backdrop, count: int, leaf: Colour, shade: Colour, snow: bool) -> None:
    for index in range(count):
        x = (index + back.draw(0.1, 0.9)) / count
        tall = back.zoom * back.draw(0.28, 0.42)
        for layer in range(3):
            y = back.horizon - tall * (0.28 * layer + 0.05)
            w, tip = tall * (0.3 - 0.07 * layer), y - tall * 0.5
            back.canvas.polygon([[x - w, y], [x, tip], [x + w, y]], leaf, shade)
            if snow:
                low = y - tall * 0.24
                cap = [[x - w * 0.5, low], [x, tip], [x + w * 0.5, low], [x, y - tall * 0.2]]
                back.canvas.polygon(cap, (240, 246, 252))


def _snow(back: _Backdrop) -> None:
    back.fill((176, 204, 232), (238, 244, 250))
    _firs(back, 4, (52, 104, 88), (36, 76, 68), snow=True)
    back.ground((246, 250, 255), (206, 220, 238), -back.zoom * 0.02)
    for _ in range(30):
        x, y = back.random.random(), back.random.random()
        back.disc(x, y, back.draw(0.004, 0.008), (255, 255, 255))


def _forest(back: _Backdrop) -> None:
    back.fill((142, 186, 150), (206, 226, 190))
    _firs(back, 7, (74, 128, 92), (54, 100, 74), snow=False)
    for index in range(4):
        x, wide = (index + back.draw(0.1, 0.9)) / 4, back.zoom * back.draw(0.02, 0.035)
        foot = back.horizon + back.zoom * 0.04
        back.rectangle(x - wide, -0.02, x + wide, foot, (120, 84, 56), (74, 50, 34), "x")
    back.ground((104, 138, 70), (66, 96, 50))


def _desert(back: _Backdrop) -> None:
    back.fill((246, 186, 120), (254, 232, 186))
    back.disc(back.draw(0.1, 0.9), back.horizon * 0.45, back.zoom * 0.08, (255, 250, 220))
    for lift, colour in ((0.08, (216, 140, 84)), (0.0, (232, 170, 100))):
        dune = back.wave(
            back.horizon - back.zoom * lift, back.zoom * 0.035, back.draw(1, 2), back.draw(0, 2)
        )
        back.canvas.polygon(dune, colour, (206, 142, 82))
    for side in (0.15, 0.85):
        x, h, z = side + back.draw(-0.08, 0.08), back.horizon, back.zoom
        leaf, shade = (70, 140, 80), (44, 104, 62)
        back.canvas.limb([[x, h + z * 0.06], [x, h - z * 0.16]], (z * 0.03, z * 0.025), leaf, shade)
        arm = [[x, h - z * 0.03], [x + z * 0.07, h - z * 0.05], [x + z * 0.07, h - z * 0.12]]
        back.canvas.limb(arm, (z * 0.018, z * 0.016), leaf, shade)


def _room(back: _Backdrop) -> None:
    walls: tuple[Colour, ...] = ((232, 214, 178), (190, 214, 190), (216, 190, 180))
    wall = walls[int(back.random.integers(3))]
    back.fill(lighten(wall, 0.15), wall)
    z, h = back.zoom, back.horizon
    x, top = back.draw(0.05, 0.6), h - z * 0.42
    back.rectangle(x - z * 0.015, top - z * 0.015, x + z * 0.3, top + z * 0.26, (250, 246, 238))
    back.rectangle(x, top, x + z * 0.285, top + z * 0.245, (150, 204, 244), (214, 236, 248))
    middle = x + z * 0.1425
    back.rectangle(middle - z * 0.006, top, middle + z * 0.006, top + z * 0.245, (250, 246, 238))
    shelf = x + z * 0.4
    back.rectangle(shelf, top + z * 0.02, shelf + z * 0.14, top + z * 0.16, (120, 80, 54))
    picture: Colour = (200 + back.draw(-50, 40), 120 + back.draw(-60, 60), 110.0)
    back.rectangle(
        shelf + z * 0.015,
        top + z * 0.035,
        shelf + z * 0.125,
        top + z * 0.145,
        picture,
        lighten(picture, 0.4),
    )
    back.ground((176, 124, 82), (134, 90, 58))
    back.rectangle(-0.02, h - z * 0.025, 1.02, h, (246, 240, 228))


_PLACES: dict[str, Callable[[_Backdrop], None]] = {
    "park": _park,
    "beach": _beach,
    "city": _city,
    "studio": _studio,
    "night": _night,
    "snow": _snow,
    "forest": _forest,
    "desert": _desert,
    "room": _room,
}


def draw_background(canvas: Canvas, scene: Scene) -> None:
    """Fill the canvas with the scene's place, blurred as the scene says."""
    canvas.set_frame(0.0, 0.0, 1.0, 0.0)
    _PLACES[scene.place](_Backdrop(canvas, scene))
    radius = int(scene.blur * canvas.scale)
    if radius > 0:
        # Integer arithmetic, unlike a Gaussian: equal on every machine.
        side = min(2 * radius + 1, 101)
        canvas.pixels = np.asarray(cv2.stackBlur(canvas.pixels, (side, side)), np.uint8)


def tint_night(canvas: Canvas) -> None:
    """Cool the whole picture, people included."""
    tint = np.array([220, 225, 256], np.uint16)
    canvas.pixels = ((canvas.pixels * tint) >> 8).astype(np.uint8)
