"""The masks of the face pass, and the way a repainted face goes back into its picture.

A pixel belongs to the nearest face, so masks of different faces never share one: faces can be
repainted together and pasted in any order. Only pixels under a mask are ever written.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from closeup.face_geometry import FaceCrop, extract, paste
from closeup.faces import FacePlan
from closeup.images import Floats, Pixels, floats_from_pixels, pixels_from_floats, resize

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
    x, y = _grid(plan)
    own = plan.shape.distance(x, y)
    feather = np.float32(max(plan.feather_px, plan.crop.side / plan.work_px))
    mask = _smooth(0.5 - own / feather)
    for other in plan.neighbours:
        mask *= _smooth((other.distance(x, y) - own) / feather)
    mask *= _edge_fade(plan)
    mask[mask < _MASK_FLOOR] = 0.0
    return mask


def _grid(plan: FacePlan) -> tuple[Floats, Floats]:
    """Return where the pixels of the crop lie in the picture, two (work, work) float32, px."""
    steps = np.arange(plan.work_px) + 0.5
    column, row = np.meshgrid(steps, steps)
    ((a, b, c), (d, e, f)) = plan.crop.affine(plan.work_px)
    x, y = a * column + b * row + c, d * column + e * row + f
    return x.astype(np.float32), y.astype(np.float32)


def _smooth(t: Floats) -> Floats:
    t = np.clip(t, 0.0, 1.0)
    smooth: Floats = t * t * (3 - 2 * t)
    return smooth


def _edge_fade(plan: FacePlan) -> Floats:
    """Return 1 inside the crop, falling to 0 at its edges unless the picture ends there too."""
    work, crop = plan.work_px, plan.crop
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
    rise = _smooth((np.arange(work, dtype=np.float32)) / np.float32(_EDGE_FADE * work))
    flat = np.ones(work, np.float32)
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


def fit_colour(patch: Floats, original: Floats, mask: Floats) -> Floats:
    """Give a repainted patch the colours of the picture around it.

    On the ring just outside the mask both show the same thing, so what differs there is the
    autoencoder's and the sampler's colour shift. A gain and a bias a channel are fitted to it by
    least squares on smoothed values, outliers dropped, both bounded.

    Args:
        patch: (work, work, 3) float32 in [0, 1].
        original: the same crop before, (work, work, 3) float32 in [0, 1].
        mask: (work, work) float32 in [0, 1].

    Returns:
        The patch corrected, (work, work, 3) float32 in [0, 1]; unchanged where no ring is left.
    """
    ring = _ring(mask)
    if int(ring.sum()) < _MIN_RING_PIXELS:
        return patch
    before, after = _smoothed(patch, ring), _smoothed(original, ring)
    fitted = np.empty_like(patch)
    for channel in range(patch.shape[2]):
        gain, bias = _fit_line(before[:, channel], after[:, channel])
        fitted[:, :, channel] = patch[:, :, channel] * np.float32(gain) + np.float32(bias)
    return np.clip(fitted, 0.0, 1.0, out=fitted)


def _ring(mask: Floats) -> npt.NDArray[np.bool_]:
    inside = (mask > _RING_MASK).astype(np.uint8)
    reach = max(1, round(_RING_WIDTH * mask.shape[0]))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    ring: npt.NDArray[np.bool_] = (cv2.dilate(inside, kernel) > 0) & (inside == 0)
    return ring


def _smoothed(values: Floats, ring: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Average over neighbours within the ring: colour is what stays when detail is gone.

    Without it the patch's own noise would flatten the fitted gain.
    """
    weight = ring.astype(np.float32)
    sigma = max(1.0, values.shape[0] / 64)
    total = cv2.GaussianBlur(values * weight[:, :, None], (0, 0), sigma)
    share = cv2.GaussianBlur(weight, (0, 0), sigma)
    smoothed: npt.NDArray[np.float64] = (total[ring] / share[ring][:, None]).astype(np.float64)
    return smoothed


def _fit_line(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Fit y = gain x + bias robustly and within bounds."""
    kept = np.ones(len(x), bool)
    gain, bias = 1.0, float(np.median(y - x))
    for _ in range(3):
        error = np.abs(y - gain * x - bias)
        kept = error <= 2.5 * 1.4826 * float(np.median(error)) + 1e-3
        mean_x, mean_y = float(x[kept].mean()), float(y[kept].mean())
        spread = float(((x[kept] - mean_x) ** 2).mean())
        shared = float(((x[kept] - mean_x) * (y[kept] - mean_y)).mean())
        # The constant draws the gain to 1 where the ring has one colour and so cannot tell it.
        gain = float(np.clip((shared + 1e-3) / (spread + 1e-3), *_GAIN_RANGE))
        bias = float(np.clip(mean_y - gain * mean_x, -_MAX_BIAS, _MAX_BIAS))
    return gain, bias


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
    """Paste a repainted face into a picture of bytes.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        patch: (work, work, 3) float32 in [0, 1], as the model painted it.
        crop: the square it was cut by.
        mask: (work, work) float32 in [0, 1].

    Returns:
        A new picture, (H, W, 3) uint8; every byte where the mask is 0 is the old one.
    """
    blended = pixels.copy()
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
    fitted = fit_colour(patch, extract(part, crop, patch.shape[0]), mask)
    alpha, _ = paste(mask, crop, size)
    # Traces that change no byte are not worth a write.
    alpha = np.where(alpha < _MASK_FLOOR, np.float32(0.0), alpha)
    placed, _ = paste(fitted, crop, size)
    return part + alpha[:, :, None] * (placed - part), alpha > 0
