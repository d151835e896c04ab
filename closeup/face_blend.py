"""The masks of the face pass, and the way a repainted face goes back into its picture.

A pixel belongs to the nearest face, so masks of different faces never share one: faces can be
repainted together and pasted in any order. Only pixels under a mask are ever written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    ring = _ring(mask)
    if int(ring.sum()) < _MIN_RING_PIXELS:
        return np.ones(3, np.float32), np.zeros(3, np.float32)
    return _fit_lines(_smoothed(patch, ring), _smoothed(original, ring))


def _ring(mask: Floats) -> npt.NDArray[np.bool_]:
    inside = (mask > _RING_MASK).astype(np.uint8)
    reach = max(1, round(_RING_WIDTH * mask.shape[0]))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    ring: npt.NDArray[np.bool_] = (cv2.dilate(inside, kernel) > 0) & (inside == 0)
    return ring


def _smoothed(values: Floats, ring: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Average over neighbours within the ring, (3, n): colour is what stays when detail is gone.

    Without it the patch's own noise would flatten the fitted gain.
    """
    weight = ring.astype(np.float32)
    sigma = max(1.0, values.shape[0] / 64)
    total = cv2.GaussianBlur(values * weight[:, :, None], (0, 0), sigma)
    share = cv2.GaussianBlur(weight, (0, 0), sigma)
    return np.ascontiguousarray((total[ring] / share[ring][:, None]).T, np.float64)


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


def blend(image: Floats, patch: Floats, crop: FaceCrop, mask: Floats) -> Floats:
    """Paste a repainted face into a picture of floats.

    Args:
        image: (H, W, 3) float32 in [0, 1].
        patch: (work, work, 3) float32 in [0, 1], as the model painted it.
        crop: the square it was cut by.
        mask: (work, work) float32 in [0, 1].

    Returns:
        A new picture, (H, W, 3) float32 in [0, 1]; values where the mask is 0 are the old ones.
    """
    blended = image.copy()
    region = crop.region((image.shape[0], image.shape[1]))
    mixed, changed = _mix(image[region], patch, _relative(crop, region), mask)
    blended[region][changed] = mixed[changed]
    return blended


def blend_pixels(pixels: Pixels, patch: Floats, crop: FaceCrop, mask: Floats) -> Pixels:
    """Paste one repainted face into a picture of bytes: :func:`blend_faces` with one face."""
    return blend_faces(pixels, [(patch, crop, mask)])


def blend_faces(pixels: Pixels, repaints: Sequence[tuple[Floats, FaceCrop, Floats]]) -> Pixels:
    """Paste repainted faces into a picture of bytes.

    Each face is matched to the picture as it was before any of them, so their order decides
    nothing but the few pixels that two masks share by interpolation, at under 2 %.

    Args:
        pixels: (H, W, 3) uint8 RGB; left as it is.
        repaints: of each face the patch as the model painted it, (work, work, 3) float32 in
            [0, 1], the square it was cut by, and its mask, (work, work) float32 in [0, 1].

    Returns:
        A new picture, (H, W, 3) uint8; every byte where all masks are 0 is the old one.
    """
    blended = pixels.copy()
    for patch, crop, mask in repaints:
        region = crop.region((pixels.shape[0], pixels.shape[1]))
        part = floats_from_pixels(pixels[region])
        mixed, changed = _mix(part, patch, _relative(crop, region), mask)
        blended[region][changed] = pixels_from_floats(mixed)[changed]
    return blended


def _relative(crop: FaceCrop, region: tuple[slice, slice]) -> FaceCrop:
    return crop.shifted(-region[1].start, -region[0].start)


def _mix(
    part: Floats, patch: Floats, crop: FaceCrop, mask: Floats
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Blend within the part of the picture that the crop touches.

    Returns:
        The part blended, and where its pixels may differ.
    """
    size = (part.shape[0], part.shape[1])
    fit_px = min(patch.shape[0], _FIT_PX)
    small = (fit_px, fit_px)
    gain, bias = fit_colour(resize(patch, small), extract(part, crop, fit_px), resize(mask, small))
    alpha, _ = paste(mask, crop, size)
    # Traces that change no byte are not worth a write.
    alpha = np.where(alpha < _MASK_FLOOR, np.float32(0.0), alpha)
    placed = np.clip(paste(patch, crop, size)[0] * gain + bias, 0.0, 1.0)
    return part + alpha[:, :, None] * (placed - part), alpha > 0
