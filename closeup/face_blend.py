"""The masks of the face pass, and the way a repainted face goes back into its picture.

A pixel belongs to the nearest face, so masks of different faces never share one: faces can be
repainted together and pasted in any order. Only pixels under a mask are ever written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from closeup.face_geometry import FaceCrop, FaceShape, extract, paste
from closeup.faces import FacePlan
from closeup.images import Floats, Pixels, floats_from_pixels, pixels_from_floats, resize

# Masks are drawn at up to this many pixels a side, colours are fitted at up to that many.
_MASK_PX, _FIT_PX = 256, 128
# Below this a mask changes no byte: half a step of 255.
_MASK_FLOOR = 1.0 / 510.0
# Over this share of the crop's side its mask fades out, where the crop ends inside the picture.
_EDGE_FADE = 0.06
# Colour fit: width of the ring as a share of the crop, the least pixels in it, and its bounds.
_RING_WIDTH = 0.12
_RING_MASK = 0.05
_MIN_RING_PIXELS = 50
_GAIN_RANGE = (0.8, 1.25)
_MAX_BIAS = 0.15


def face_mask(plan: FacePlan) -> Floats:
    """Draw the soft mask of one face, as its crop shows it.

    Args:
        plan: of the face.

    Returns:
        (work, work) float32 in [0, 1]: 1 in the face, 0 around it, 0 where another face is
        nearer, and 0 at every edge of the crop that lies inside the picture.
    """
    # A mask is smooth: what is drawn at this size loses nothing by being enlarged.
    drawn_px = min(plan.work_px, _MASK_PX)
    x, y = _grid(plan.crop, drawn_px)
    own = plan.shape.distance(x, y)
    feather = np.float32(max(plan.feather_px, plan.crop.side / drawn_px))
    mask = _smooth(0.5 - own / feather)
    for other in plan.neighbours:
        if _may_touch(plan.shape, other, float(feather)):
            mask *= _smooth((other.distance(x, y) - own) / feather)
    mask *= _edge_fade(plan, drawn_px)
    mask = resize(mask, (plan.work_px, plan.work_px), how="linear")
    mask[mask < _MASK_FLOOR] = 0.0
    return mask


def _grid(crop: FaceCrop, size_px: int) -> tuple[Floats, Floats]:
    """Return where the pixels of a crop lie in the picture, two (size, size) float32, px."""
    steps = np.arange(size_px) + 0.5
    column, row = np.meshgrid(steps, steps)
    ((a, b, c), (d, e, f)) = crop.affine(size_px)
    x, y = a * column + b * row + c, d * column + e * row + f
    return x.astype(np.float32), y.astype(np.float32)


def _may_touch(shape: FaceShape, other: FaceShape, feather: float) -> bool:
    """Tell, generously, whether another face can be nearer anywhere in this one's mask."""
    apart = math.hypot(shape.center[0] - other.center[0], shape.center[1] - other.center[1])
    reach = shape.half_width + shape.half_height + other.half_width + other.half_height
    return apart < reach + 4 * feather


def _smooth(t: Floats) -> Floats:
    t = np.clip(t, 0.0, 1.0)
    smooth: Floats = t * t * (3 - 2 * t)
    return smooth


def _edge_fade(plan: FacePlan, size_px: int) -> Floats:
    """Return 1 inside the crop, falling to 0 at its edges unless the picture ends there too."""
    crop = plan.crop
    height, width = plan.image_size
    half = crop.side / 2
    open_edges = [True] * 4
    if crop.angle_deg == 0.0:
        open_edges = [
            crop.center[0] - half > 0,
            crop.center[0] + half < width,
            crop.center[1] - half > 0,
            crop.center[1] + half < height,
        ]
    # The outermost pixel is 0, so that no resampling carries the mask over the edge.
    rise = _smooth(np.arange(size_px, dtype=np.float32) / np.float32(_EDGE_FADE * size_px))
    flat = np.ones(size_px, np.float32)
    left, right, top, bottom = (rise if is_open else flat for is_open in open_edges)
    fade: Floats = (top * bottom[::-1])[:, None] * (left * right[::-1])[None, :]
    return fade


def latent_mask(mask: Floats, size: tuple[int, int]) -> Floats:
    """Average a mask down to the latents' resolution.

    Args:
        mask: (work, work) float32 in [0, 1].
        size: (h, w) of the latents.

    Returns:
        (h, w) float32 in [0, 1].
    """
    return resize(mask, size, how="area")


def differential_masks(mask: Floats, num_steps: int) -> Floats:
    """Threshold a soft mask by the noise level of each step: differential diffusion.

    After step k of K a latent is free where ``mask >= 1 - (k + 1) / K``, elsewhere the original is
    put back at that step's noise level. So a value of 1 is repainted by all steps, a small one
    only by the last, and 0 not at all: after the last step the original stands there again.

    Args:
        mask: (h, w) float32 in [0, 1]; higher means more change.
        num_steps: K, how many steps run (after ``strength`` has cut the schedule).

    Returns:
        (K, 1, h, w) float32 of zeros and ones, growing with k: the denoiser's ``mask`` by step.

    Source: Levin and Fried, "Differential Diffusion: Giving Each Pixel Its Strength", 2023,
    algorithm 1 (there the map is inverted, and the original is put back before a step).
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1.")
    passed = np.arange(1, num_steps + 1, dtype=np.float64)[:, None, None, None]
    value = mask.astype(np.float64)[None, None]
    free = (value * num_steps >= num_steps - passed - 1e-6) & (value > 0)
    return free.astype(np.float32)


def fit_colour(patch: Floats, original: Floats, mask: Floats) -> tuple[Floats, Floats]:
    """Measure how a repainted patch must be recoloured to match the picture around it.

    On the ring just outside the mask both show the same thing, so what differs there is the
    autoencoder's and the sampler's colour shift. A gain and a bias a channel are fitted to it by
    least squares on smoothed values, outliers dropped, both bounded. Meant for small patches
    (128 px do): colour is what stays when detail is gone.

    Args:
        patch: (n, n, 3) float32 in [0, 1].
        original: the same crop before, (n, n, 3) float32 in [0, 1].
        mask: (n, n) float32 in [0, 1].

    Returns:
        The gain, (3,) float32 in [0.8, 1.25], and the bias, (3,) float32 in [-0.15, 0.15]:
        recoloured = patch * gain + bias. 1 and 0 where hardly any ring is left.
    """
    ring = _ring_of(mask)
    if ring is None:
        return np.ones(3, np.float32), np.zeros(3, np.float32)
    return _fit_lines(ring.smoothed(patch), ring.smoothed(original))


@dataclass(frozen=True, slots=True)
class _Ring:
    """The pixels just outside a mask.

    Attributes:
        inside: (n, n) bool.
        weight: the same as float32.
        share: the weight averaged over neighbours, at the ring's m pixels, (m, 1) float32.
        sigma: of that average, px.
    """

    inside: npt.NDArray[np.bool_]
    weight: Floats
    share: Floats
    sigma: float

    def smoothed(self, values: Floats) -> npt.NDArray[np.float64]:
        """Average a picture (n, n, 3) over neighbours within the ring, (3, m).

        Without it the patch's own noise would flatten the fitted gain.
        """
        total = cv2.GaussianBlur(values * self.weight[:, :, None], (0, 0), self.sigma)
        return np.ascontiguousarray((total[self.inside] / self.share).T, np.float64)


def _ring_of(mask: Floats) -> _Ring | None:
    """Return the ring around a mask (n, n); None where hardly any is left."""
    inside = (mask > _RING_MASK).astype(np.uint8)
    reach = max(1, round(_RING_WIDTH * mask.shape[0]))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    ring = (cv2.dilate(inside, kernel) > 0) & (inside == 0)
    if int(ring.sum()) < _MIN_RING_PIXELS:
        return None
    weight = ring.astype(np.float32)
    sigma = max(1.0, mask.shape[0] / 64)
    share = cv2.GaussianBlur(weight, (0, 0), sigma)[ring][:, None]
    return _Ring(ring, weight, share, sigma)


def _fit_lines(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> tuple[Floats, Floats]:
    """Fit y = gain x + bias to each row of (3, n), robustly and within bounds."""
    gain, bias = np.ones((3, 1)), np.median(y - x, axis=1, keepdims=True)
    for _ in range(3):
        error = np.abs(y - gain * x - bias)
        spread = np.median(error, axis=1, keepdims=True)
        kept = error <= 2.5 * 1.4826 * spread + 1e-3
        mean_x, mean_y = _mean(x, kept), _mean(y, kept)
        off = x - mean_x
        # The constant draws the gain to 1 where the ring has one colour and so cannot tell it.
        shared, own = _mean(off * (y - mean_y), kept) + 1e-3, _mean(off * off, kept) + 1e-3
        gain = np.clip(shared / own, *_GAIN_RANGE)
        bias = np.clip(mean_y - gain * mean_x, -_MAX_BIAS, _MAX_BIAS)
    return gain[:, 0].astype(np.float32), bias[:, 0].astype(np.float32)


def _mean(values: npt.NDArray[np.float64], kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Mean of the values kept, row by row: (3, n) -> (3, 1)."""
    mean: npt.NDArray[np.float64] = np.einsum("cn,cn->c", values, kept) / kept.sum(axis=1)
    return mean[:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class FacePlace:
    """Where a repainted face goes: all of the blending that can be done before it is painted.

    Attributes:
        region: rows and columns of the picture that the crop touches.
        crop: the square that was cut, in the picture's coordinates.
        mask: (work, work) float32 in [0, 1].
        part: the picture there, (h, w, 3) float32 in [0, 1].
        alpha: the mask on its pixels, (h, w) float32 in [0, 1]; 0 where nothing changes.
        ring: the pixels that colour is fitted on; None where there are too few.
        around: what the picture shows there, (3, m) float64; None without a ring.
    """

    region: tuple[slice, slice]
    crop: FaceCrop
    mask: Floats
    part: Floats
    alpha: Floats
    ring: _Ring | None
    around: npt.NDArray[np.float64] | None

    def mix(self, patch: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Blend a patch (work, work, 3) in [0, 1] into the part.

        Returns:
            The part blended, (h, w, 3) float32, and where its pixels may differ, (h, w).
        """
        placed, _ = paste(patch, self._crop_in_part, _size_of(self.alpha))
        if self.ring is not None and self.around is not None:
            small = resize(patch, _size_of(self.ring.weight))
            gain, bias = _fit_lines(self.ring.smoothed(small), self.around)
            placed = placed * gain + bias
        placed = np.clip(placed, 0.0, 1.0)
        return self.part + self.alpha[:, :, None] * (placed - self.part), self.alpha > 0

    @property
    def _crop_in_part(self) -> FaceCrop:
        return self.crop.shifted(-self.region[1].start, -self.region[0].start)


def find_place(
    pixels: Pixels, crop: FaceCrop, mask: Floats, allowed: Floats | None = None
) -> FacePlace:
    """Prepare the blending of one face.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        crop: the square that was cut.
        mask: (work, work) float32 in [0, 1].
        allowed: (H, W) float32 in [0, 1], by which the mask is multiplied on the picture's own
            pixels: where it is 0 no byte changes. None allows all.
    """
    region = crop.region((pixels.shape[0], pixels.shape[1]))
    part = floats_from_pixels(pixels[region])
    moved = crop.shifted(-region[1].start, -region[0].start)
    alpha, _ = paste(mask, moved, _size_of(part))
    if allowed is not None:
        alpha = alpha * allowed[region]
    fit_px = min(mask.shape[0], _FIT_PX)
    ring = _ring_of(resize(mask, (fit_px, fit_px)))
    return FacePlace(
        region=region,
        crop=crop,
        mask=mask,
        part=part,
        # Traces that change no byte are not worth a write.
        alpha=np.where(alpha < _MASK_FLOOR, np.float32(0.0), alpha),
        ring=ring,
        around=None if ring is None else ring.smoothed(extract(part, moved, fit_px)),
    )


def _size_of(floats: Floats) -> tuple[int, int]:
    return floats.shape[0], floats.shape[1]


def blend_faces(pixels: Pixels, repaints: Sequence[tuple[Floats, FacePlace]]) -> Pixels:
    """Paste repainted faces into a picture of bytes.

    Each face is matched to the picture as it was before any of them, so their order decides
    nothing but the few pixels that two masks share by interpolation, at under 2 %.

    Args:
        pixels: (H, W, 3) uint8 RGB; left as it is.
        repaints: of each face the patch as the model painted it, (work, work, 3) float32 in
            [0, 1], and its place in this picture.

    Returns:
        A new picture, (H, W, 3) uint8; every byte where all masks are 0 is the old one.
    """
    blended = pixels.copy()
    for patch, place in repaints:
        mixed, changed = place.mix(patch)
        blended[place.region][changed] = pixels_from_floats(mixed)[changed]
    return blended
