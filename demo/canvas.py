"""Anti-aliased drawing with shading, the same to the byte on every machine.

Coordinates pass through elementwise float64 arithmetic only (no BLAS, no fused operations) and are
rounded to a sixteenth of a pixel before OpenCV fills them in integer arithmetic; sines and cosines
are rounded to 2**-20 first, so that two mathematics libraries cannot disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Colour = tuple[float, float, float]
_SUBPIXEL = 16
_SHIFT = 4


def _quantised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.round(values * 2**20) / 2**20)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """``first`` moved towards ``second`` by ``share`` (0 to 1)."""
    a, b, c = (x + (y - x) * share for x, y in zip(first, second, strict=True))
    return a, b, c


def darken(colour: Colour, factor: float) -> Colour:
    """Every channel times ``factor``."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def lighten(colour: Colour, share: float) -> Colour:
    """``colour`` moved towards white."""
    return mix(colour, (255, 255, 255), share)


def _levels(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (int(max(0.0, min(255.0, value))) for value in colour)
    return red, green, blue


_T = (np.arange(7) / 7)[:, None]
_BASIS = [
    -0.5 * _T + _T * _T - 0.5 * _T * _T * _T,
    1 - 2.5 * _T * _T + 1.5 * _T * _T * _T,
    0.5 * _T + 2 * _T * _T - 1.5 * _T * _T * _T,
    -0.5 * _T * _T + 0.5 * _T * _T * _T,
]
_ANGLES = np.arange(40) * (2 * math.pi / 40)
CIRCLE: Points = _quantised(np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1))


def spline(points: object) -> Points:
    """A closed Catmull-Rom curve through (n, 2) points, seven points a piece."""
    knots = np.asarray(points, np.float64)
    shifted = [np.roll(knots, shift, 0) for shift in (1, 0, -1, -2)]
    curve = sum(basis[None] * knot[:, None] for basis, knot in zip(_BASIS, shifted, strict=True))
    return np.asarray(curve).reshape(-1, 2)


def curve(points: object) -> Points:
    """An open Catmull-Rom curve through (n, 2) points."""
    knots = np.asarray(points, np.float64)
    ends = np.concatenate([knots[:1] * 2 - knots[1:2], knots, knots[-1:] * 2 - knots[-2:-1]])
    return np.concatenate([spline(ends)[7 : 7 * (len(ends) - 2)], knots[-1:]])


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The square of the scene that a picture shows, in scene units (the whole scene is 0 to 1).

    Attributes:
        x: left edge.
        y: upper edge.
        side: width and height, above 0.
    """

    x: float = 0.0
    y: float = 0.0
    side: float = 1.0


class Canvas:
    """A square picture of one view, drawn at ``supersample`` times its final size.

    Points are given in the current frame: an origin, a unit and a rotation set by `set_frame`.

    Attributes:
        pixels: (S, S, 3) uint8 RGB at the supersampled size.
        unit: supersampled pixels of the frame's unit.
    """

    def __init__(self, size: int, view: View, supersample: int) -> None:
        self.supersample = supersample
        self.side = size * supersample
        self.scale = self.side / view.side
        self._view = view
        self.pixels = np.zeros((self.side, self.side, 3), np.uint8)
        self._clip: NDArray[np.uint8] | None = None
        self.set_frame(0.0, 0.0, 1.0, 0.0)

    def set_frame(self, x: float, y: float, unit: float, rotation: float) -> None:
        """Place the frame: origin and unit in scene units, rotation in radians."""
        self._origin = ((x - self._view.x) * self.scale, (y - self._view.y) * self.scale)
        self.unit = unit * self.scale
        self._cos = round(math.cos(rotation) * 2**20) / 2**20
        self._sin = round(math.sin(rotation) * 2**20) / 2**20

    def to_pixels(self, points: object) -> Points:
        """Frame points (n, 2) to supersampled pixels (n, 2)."""
        at = np.asarray(points, np.float64)
        x, y = at[:, 0] * self.unit, at[:, 1] * self.unit
        left = x * self._cos - y * self._sin + self._origin[0]
        down = x * self._sin + y * self._cos + self._origin[1]
        return np.stack([left, down], 1)

    def polygon(
        self, points: object, colour: Colour, shade: Colour | None = None, along: str = "y"
    ) -> None:
        """Fill a polygon, flat or with a gradient.

        Args:
            points: (n, 2) in the frame.
            colour: at the top, the left or the centre.
            shade: at the other end; None for a flat fill.
            along: ``"y"`` downwards, ``"x"`` to the right, ``"round"`` from upper left outwards.
        """
        at = self.to_pixels(points)
        if shade is None and self._clip is None:
            corners = np.round(at * _SUBPIXEL).astype(np.int32)
            cv2.fillPoly(self.pixels, [corners], _levels(colour), cv2.LINE_AA, _SHIFT)
            return
        low, high = np.floor(at.min(0)).astype(int) - 1, np.ceil(at.max(0)).astype(int) + 2
        window = self._window(low, high)
        if window is None:
            return
        mask = self._mask(at, window)
        ramp = _ramp(window, low, high, along)
        first = np.array(_levels(colour), np.float32)
        second = np.array(_levels(shade if shade is not None else colour), np.float32)
        self._blend(window, first + (second - first) * ramp, mask)

    def ellipse(
        self,
        centre: tuple[float, float],
        radii: tuple[float, float],
        colour: Colour,
        shade: Colour | None = None,
        along: str = "y",
    ) -> None:
        """Fill an ellipse; as `polygon`."""
        self.polygon(CIRCLE * np.array(radii) + np.array(centre), colour, shade, along)

    def glow(
        self,
        centre: tuple[float, float],
        radii: tuple[float, float],
        colour: Colour,
        strength: float,
    ) -> None:
        """Blend a soft spot of ``colour`` that fades to nothing at the ellipse's edge.

        Args:
            centre: in the frame.
            radii: along the picture's axes (the frame's rotation does not turn them).
            colour: of the spot.
            strength: opacity at the centre, 0 to 1.
        """
        x, y = self.to_pixels([centre])[0]
        wide, tall = radii[0] * self.unit, radii[1] * self.unit
        low = np.floor(np.array([x - wide, y - tall])).astype(int)
        high = np.ceil(np.array([x + wide, y + tall])).astype(int) + 1
        window = self._window(low, high)
        if window is None:
            return
        x0, y0, x1, y1 = window
        across = ((np.arange(x0, x1) - x) / wide).astype(np.float32)
        down = ((np.arange(y0, y1) - y) / tall).astype(np.float32)
        fade = np.maximum(0, 1 - (across * across)[None, :] - (down * down)[:, None])
        opacity = (fade * fade * np.float32(255 * strength)).astype(np.uint8)
        if self._clip is not None:
            opacity = np.minimum(opacity, self._clip[y0:y1, x0:x1])
        self._blend(window, np.array(_levels(colour), np.float32), opacity)

    def line(self, points: object, width: float, colour: Colour) -> None:
        """Draw an open line, ``width`` in frame units."""
        corners = np.round(self.to_pixels(points) * _SUBPIXEL).astype(np.int32)
        thickness = max(1, int(width * self.unit + 0.5))
        cv2.polylines(
            self.pixels,
            [corners.reshape(-1, 1, 2)],
            False,
            _levels(colour),
            thickness,
            cv2.LINE_AA,
            _SHIFT,
        )

    def limb(
        self, points: object, widths: tuple[float, float], colour: Colour, shade: Colour
    ) -> None:
        """A tapered tube through ``points`` with round ends."""
        spine = np.asarray(points, np.float64)
        along = np.gradient(spine, axis=0)
        length = np.sqrt(along[:, 0] * along[:, 0] + along[:, 1] * along[:, 1])[:, None] + 1e-9
        normal = np.stack([-along[:, 1], along[:, 0]], 1) / length
        radius = np.linspace(widths[0], widths[1], len(spine))[:, None]
        outline = np.concatenate([spine + normal * radius, (spine - normal * radius)[::-1]])
        self.polygon(outline, colour, shade, "x")
        for end, width, share in ((spine[-1], widths[1], 0.5), (spine[0], widths[0], 0.4)):
            at = (float(end[0]), float(end[1]))
            self.ellipse(at, (width, width), mix(colour, shade, share))

    def clip_to(self, points: object | None) -> None:
        """Keep later gradient fills and glows inside a polygon; None ends it."""
        if points is None:
            self._clip = None
            return
        self._clip = self._mask(self.to_pixels(points), (0, 0, self.side, self.side))

    def finish(self) -> NDArray[np.uint8]:
        """The picture at its final size: (size, size, 3) uint8, each pixel the rounded mean."""
        factor, size = self.supersample, self.side // self.supersample
        total = np.zeros((size, size, 3), np.uint16)
        for row in range(factor):
            for column in range(factor):
                total += self.pixels[row::factor, column::factor]
        count = factor * factor
        return ((total + count // 2) // count).astype(np.uint8)

    def _window(
        self, low: NDArray[np.int64], high: NDArray[np.int64]
    ) -> tuple[int, int, int, int] | None:
        x0, y0 = max(int(low[0]), 0), max(int(low[1]), 0)
        x1, y1 = min(int(high[0]), self.side), min(int(high[1]), self.side)
        return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None

    def _mask(self, at: Points, window: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        x0, y0, x1, y1 = window
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        corners = np.round((at - np.array([x0, y0])) * _SUBPIXEL).astype(np.int32)
        cv2.fillPoly(mask, [corners], (255,), cv2.LINE_AA, _SHIFT)
        if self._clip is not None:
            mask = np.minimum(mask, self._clip[y0:y1, x0:x1])
        return mask

    def _blend(
        self,
        window: tuple[int, int, int, int],
        colour: NDArray[np.float32],
        opacity: NDArray[np.uint8],
    ) -> None:
        x0, y0, x1, y1 = window
        under = self.pixels[y0:y1, x0:x1]
        share = opacity.astype(np.float32)[..., None] * np.float32(1 / 255)
        under[:] = (under + (colour - under) * share + np.float32(0.5)).astype(np.uint8)


def _ramp(
    window: tuple[int, int, int, int],
    low: NDArray[np.int64],
    high: NDArray[np.int64],
    along: str,
) -> NDArray[np.float32]:
    """Gradient positions 0 to 1 of a window of a shape that spans ``low`` to ``high``."""
    x0, y0, x1, y1 = window
    wide, tall = max(1, int(high[0] - low[0])), max(1, int(high[1] - low[1]))
    across = (np.arange(x0, x1) - low[0]).astype(np.float32)
    down = (np.arange(y0, y1) - low[1]).astype(np.float32)
    if along == "y":
        return np.asarray((down / np.float32(tall))[:, None, None])
    if along == "x":
        return np.asarray((across / np.float32(wide))[None, :, None])
    reach = np.float32(max(wide, tall) * 0.62)
    across = (across - np.float32(wide * 0.4)) / reach
    down = (down - np.float32(tall * 0.4)) / reach
    reached = (across * across)[None, :] + (down * down)[:, None]
    return np.asarray(np.minimum(1, reached)[..., None], np.float32)
