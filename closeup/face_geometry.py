"""The geometry of the face pass: a face's shape, the square cut around it, and the way back.

Coordinates are continuous: the picture's left edge is x = 0, the middle of its first pixel 0.5.
Lengths that describe a face are fractions of the face, never pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt

from closeup.detection import Face, Point
from closeup.images import Floats, Pixels, floats_from_pixels, resize

#: Faces tilted by less than this, degrees, are cut without a rotation (and so without its blur).
UPRIGHT_WITHIN_DEG = 8.0
#: Crops are never smaller than this a side, px.
MIN_CROP_PX = 8
# Cubic interpolation reaches two pixels outside a crop.
_AROUND_PX = 4
# Height over width of a face, where the box of a tilted face cannot tell the two apart.
_ASPECT = 1.25
# The outline lies between an ellipse (2) and a rectangle: faces have a jaw.
_OUTLINE_POWER = 2.4

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceShape:
    """The outline of a face: an ellipse with a slightly square jaw, anywhere in the picture.

    Attributes:
        center: px.
        half_width: half the distance between the cheeks, px.
        half_height: half the distance from forehead to chin, px.
        angle_deg: clockwise tilt of the face as seen, degrees in (-180, 180].
    """

    center: Point
    half_width: float
    half_height: float
    angle_deg: float

    def distance(self, x: Floats, y: Floats) -> Floats:
        """Return how far points lie outside the outline (negative inside), px, roughly.

        Args:
            x: any shape float32, px.
            y: the same shape.

        Returns:
            The same shape, float32.
        """
        angle = math.radians(self.angle_deg)
        cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
        dx, dy = x - np.float32(self.center[0]), y - np.float32(self.center[1])
        u = np.abs(cos * dx + sin * dy) / np.float32(self.half_width)
        v = np.abs(cos * dy - sin * dx) / np.float32(self.half_height)
        power = np.float32(_OUTLINE_POWER)
        radius = (u**power + v**power) ** (1 / power)
        distance: Floats = (radius - 1) * np.float32(math.sqrt(self.half_width * self.half_height))
        return distance


def face_angle_deg(face: Face) -> float:
    """Return the clockwise tilt of a face, degrees in (-180, 180]; 0 is upright.

    By the line through the eyes; by the line from eyes to mouth where a profile hides that.
    """
    right_eye, left_eye, _, right_mouth, left_mouth = (np.array(p) for p in face.landmarks)
    across = left_eye - right_eye
    if np.hypot(*across) < 0.2 * face.side:
        down = (right_mouth + left_mouth - right_eye - left_eye) / 2
        across = np.array([down[1], -down[0]])
    if np.hypot(*across) < 0.05 * face.side:
        return 0.0
    return math.degrees(math.atan2(across[1], across[0]))


def face_shape(face: Face, image_size: tuple[int, int], *, margin: float) -> FaceShape:
    """Return the outline of a face.

    Args:
        face: as detected.
        image_size: (height, width) of the picture, px.
        margin: how much further than its box the face reaches (hair, ears, chin), as a fraction
            of the face's half sides.
    """
    x0, y0, x1, y1 = _past_borders(face, image_size)
    half_x, half_y = (x1 - x0) / 2, (y1 - y0) / 2
    angle = face_angle_deg(face)
    if abs(math.sin(math.radians(angle))) < 0.34:  # within 20 degrees of upright or upside down
        half_width, half_height = half_x, half_y
    elif abs(math.cos(math.radians(angle))) < 0.34:  # lying
        half_width, half_height = half_y, half_x
    else:
        # A turned ellipse keeps the sum of its squared half axes in its bounding box.
        half_width = math.sqrt((half_x**2 + half_y**2) / (1 + _ASPECT**2))
        half_height = _ASPECT * half_width
    return FaceShape(
        center=((x0 + x1) / 2, (y0 + y1) / 2),
        half_width=half_width * (1 + margin),
        half_height=half_height * (1 + margin),
        angle_deg=angle,
    )


def _past_borders(face: Face, image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Push the sides of a box that the picture's border cuts outward, so no edge is left bare."""
    near, beyond = 0.05 * face.side, 0.25 * face.side
    x0, y0, x1, y1 = face.box
    return (
        x0 - beyond if x0 < near else x0,
        y0 - beyond if y0 < near else y0,
        x1 + beyond if x1 > image_size[1] - near else x1,
        y1 + beyond if y1 > image_size[0] - near else y1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceCrop:
    """A square of the picture, possibly turned.

    Attributes:
        center: px.
        side: px; a whole number, as are its corners, where the angle is 0.
        angle_deg: clockwise tilt of the square, degrees; the crop shows it upright.
    """

    center: Point
    side: float
    angle_deg: float

    def affine(self, work_px: int) -> Matrix:
        """Return the (2, 3) map from the crop, ``work_px`` a side, to the picture (both px)."""
        angle = math.radians(self.angle_deg)
        scale = self.side / work_px
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        half = work_px / 2
        return np.array(
            [
                [cos, -sin, self.center[0] - (cos - sin) * half],
                [sin, cos, self.center[1] - (sin + cos) * half],
            ]
        )

    def region(self, image_size: tuple[int, int]) -> tuple[slice, slice]:
        """Return the rows and columns of the picture that the crop touches."""
        reach = self.side / 2 * _extent(self.angle_deg)
        bounds = []
        for middle, limit in ((self.center[1], image_size[0]), (self.center[0], image_size[1])):
            first = min(max(0, math.floor(middle - reach + 1e-6)), limit)
            last = min(max(first, math.ceil(middle + reach - 1e-6)), limit)
            bounds.append(slice(first, last))
        return bounds[0], bounds[1]

    def shifted(self, dx: float, dy: float) -> FaceCrop:
        """Return the same square, moved by (dx, dy) px."""
        return replace(self, center=(self.center[0] + dx, self.center[1] + dy))


def _extent(angle_deg: float) -> float:
    """Return the side of the bounding box of a unit square at this angle."""
    angle = math.radians(angle_deg)
    return abs(math.cos(angle)) + abs(math.sin(angle))


def face_crop(
    face: Face, image_size: tuple[int, int], *, crop_factor: float, upright: bool = True
) -> FaceCrop:
    """Choose the square to cut around a face.

    It is moved inward at borders. In a picture smaller than the square, the square shrinks to the
    picture's short side; a turned one shrinks until its corners are inside, but not below 1.25
    times the face. Where a turned square would have to leave the face to stay inside, in the
    picture's corners, it stays straight.

    Args:
        face: as detected.
        image_size: (height, width) of the picture, px.
        crop_factor: side of the square as a multiple of the face's.
        upright: turn the square with the face.
    """
    short = min(image_size)
    side = min(max(crop_factor * face.side, MIN_CROP_PX), short)
    angle = face_angle_deg(face) if upright else 0.0
    if abs(angle) > UPRIGHT_WITHIN_DEG:
        turned = _turned_crop(face, side, angle, image_size)
        if _shows(turned, face):
            return turned
    return _straight_crop(face.center, round(side), image_size)


def _turned_crop(face: Face, side: float, angle: float, image_size: tuple[int, int]) -> FaceCrop:
    short, extent = min(image_size), _extent(angle)
    side = min(side, max(short / extent, min(1.25 * face.side, short)))
    reach = side * extent / 2
    x, y = (
        limit / 2 if 2 * reach >= limit else min(max(middle, reach), limit - reach)
        for middle, limit in zip(face.center, image_size[::-1], strict=True)
    )
    return FaceCrop(center=(x, y), side=side, angle_deg=angle)


def _shows(crop: FaceCrop, face: Face) -> bool:
    """Tell whether a turned square still holds the better part of a face."""
    angle = math.radians(crop.angle_deg)
    dx, dy = face.center[0] - crop.center[0], face.center[1] - crop.center[1]
    u = abs(math.cos(angle) * dx + math.sin(angle) * dy)
    v = abs(math.cos(angle) * dy - math.sin(angle) * dx)
    return max(u, v) + 0.35 * face.side <= crop.side / 2


def _straight_crop(center: Point, side: int, image_size: tuple[int, int]) -> FaceCrop:
    left = min(max(round(center[0] - side / 2), 0), image_size[1] - side)
    top = min(max(round(center[1] - side / 2), 0), image_size[0] - side)
    return FaceCrop(center=(left + side / 2, top + side / 2), side=float(side), angle_deg=0.0)


def extract(image: Floats, crop: FaceCrop, work_px: int) -> Floats:
    """Cut a face out, upright, at the model's working size.

    Args:
        image: (H, W, 3) float32 in [0, 1].
        crop: the square; what of it lies outside the picture is mirrored.
        work_px: side of the result, px.

    Returns:
        (work_px, work_px, 3) float32 in [0, 1]: areas averaged where the crop is larger than
        that, Lanczos (cubic for a turned one) where it is smaller.
    """
    if crop.angle_deg == 0.0:
        return resize(image[crop.region((image.shape[0], image.shape[1]))], (work_px, work_px))
    # A turned crop is sampled finely enough to miss no pixel, then averaged.
    fine = work_px * max(1, math.ceil(crop.side / work_px))
    turned = cv2.warpAffine(
        image,
        _of_pixel_indices(crop.affine(fine)),
        (fine, fine),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT,
    )
    return resize(np.clip(turned, 0.0, 1.0), (work_px, work_px))


def extract_from_pixels(pixels: Pixels, crop: FaceCrop, work_px: int) -> Floats:
    """Cut a face out of a picture of bytes: :func:`extract` of what becomes floats only there.

    Args:
        pixels: (H, W, 3) uint8.
        crop: see there.
        work_px: see there.
    """
    # A turned crop is interpolated from pixels just outside it too.
    rows, columns = crop.region((pixels.shape[0], pixels.shape[1]))
    top, left = max(0, rows.start - _AROUND_PX), max(0, columns.start - _AROUND_PX)
    part = pixels[top : rows.stop + _AROUND_PX, left : columns.stop + _AROUND_PX]
    return extract(floats_from_pixels(part), crop.shifted(-left, -top), work_px)


def paste(
    patch: Floats, crop: FaceCrop, image_size: tuple[int, int]
) -> tuple[Floats, tuple[slice, slice]]:
    """Bring a patch (or its mask) back onto the pixels of the picture: the inverse of extract.

    Args:
        patch: (work, work, 3) or (work, work) float32 in [0, 1].
        crop: the square it was cut by.
        image_size: (height, width) of the picture, px.

    Returns:
        The values on the picture's own pixels, (h, w, 3) or (h, w) float32 in [0, 1], 0 outside
        the square; and the rows and columns where they belong.
    """
    region = crop.region(image_size)
    size = (region[0].stop - region[0].start, region[1].stop - region[1].start)
    if crop.angle_deg == 0.0:
        # A kernel that overshoots would carry a mask over its own edge.
        grows = size[0] > patch.shape[0]
        return resize(patch, size, how="linear" if patch.ndim == 2 and grows else "auto"), region
    side = min(patch.shape[0], max(1, round(crop.side)))
    small = resize(patch, (side, side), how="area")
    inverse = cv2.invertAffineTransform(
        crop.shifted(-region[1].start, -region[0].start).affine(side)
    )
    placed = cv2.warpAffine(
        small,
        _of_pixel_indices(inverse),
        (size[1], size[0]),
        flags=(cv2.INTER_LINEAR if patch.ndim == 2 else cv2.INTER_CUBIC) | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
    )
    return np.clip(placed, 0.0, 1.0), region


def _of_pixel_indices(affine: Matrix) -> Matrix:
    """Convert a map between continuous coordinates to one between pixel indices."""
    indices = affine.copy()
    indices[:, 2] += affine[:, :2] @ np.array([0.5, 0.5]) - 0.5
    return indices
