"""The face passes that are compared, on the same engines.

`closeup_pass` is the product's. The other two are written from facts about them, with their own
defaults: ADetailer's from its sources and those of stable-diffusion-webui, whose inpainting it
calls; the first recipe of Astria's face pass from what was observed of it. All of them look for
faces with the same detector, use the request's sampler, steps, guidance and LoRAs, and paint at
the model's native size.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.likeness.studio import Base, Job, Method, Repainted
from closeup.detection import Face, scale_faces
from closeup.diffuse import decode_latents, denoise, encode_picture, sample_posterior, step_table
from closeup.face_blend import face_mask
from closeup.face_geometry import paste
from closeup.face_pass import find_faces, inpaint_faces
from closeup.faces import FaceAction, plan_faces
from closeup.images import floats_from_pixels, pixels_from_floats, resize
from closeup.noise import TorchNormal

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Area = tuple[int, int, int, int]
"""Left, top, right, bottom, px; right and bottom are one past the last."""

ADETAILER_STRENGTH, ADETAILER_PADDING_PX, ADETAILER_BLUR, ADETAILER_DILATE = 0.4, 32, 4, 4
ASTRIA_STRENGTH, ASTRIA_FACTOR, ASTRIA_SEED, ASTRIA_STEPS = 0.7, 1.8, 42, 28
ASTRIA_SHARES = (0.003, 0.10)


async def no_pass(job: Job, base: Base) -> Repainted:
    """Leave the picture as it is."""
    alpha = np.zeros(base.picture.shape[:2], np.float32)
    return Repainted(pixels=base.picture, alpha=alpha, faces=0)


# ------------------------------------------------------------------------------------- closeup


async def closeup_pass(job: Job, base: Base) -> Repainted:
    """Run the product's own face pass."""
    pictures, reports = await inpaint_faces(
        job.run,
        [base.picture],
        seen=[base.original],
        enlarged=base.enlarged,
        upscaler=job.upscaler,
        conditioning=job.conditioning,
    )
    repainted = sum(face["action"] == FaceAction.REPAINT.value for face in reports[0])
    return Repainted(pixels=pictures[0], alpha=closeup_alpha(job, base), faces=repainted)


def closeup_alpha(job: Job, base: Base) -> Floats:
    """Return the masks of all faces, (H, W) float32, as `closeup.face_blend` lays them."""
    request = job.run.request
    size = (base.picture.shape[0], base.picture.shape[1])
    plans = plan_faces(
        base.faces,
        image_size=size,
        work_px=request.model.native_px,
        options=request.faces,
        seed=request.seed,
        defaults=request.model.face_defaults,
        enlarged=base.enlarged,
    )
    alpha = np.zeros(size, np.float32)
    for plan in plans:
        if plan.action is FaceAction.REPAINT:
            mask, region = paste(face_mask(plan), plan.crop, size)
            alpha[region] = np.maximum(alpha[region], mask)
    return alpha


# ----------------------------------------------------------------------------------- ADetailer


def grown_box_mask(face: Face, size: tuple[int, int], kernel: int = ADETAILER_DILATE) -> Pixels:
    """Return a box as a mask, dilated by a square kernel of ``kernel`` px.

    Returns:
        (H, W) uint8, 0 or 255.

    Source: ADetailer, adetailer/common.py, create_mask_from_bbox; adetailer/mask.py, dilate_erode.
    """
    mask = np.zeros(size, np.uint8)
    x0, y0, x1, y1 = (int(value) for value in face.box)
    mask[y0 : y1 + 1, x0 : x1 + 1] = 255  # PIL draws rectangles with their last row and column
    return np.asarray(cv2.dilate(mask, np.ones((kernel, kernel), np.uint8)), np.uint8)


def webui_strength(strength: float, steps: int) -> float:
    """Return the strength with which diffusers' rule gives the steps of stable-diffusion-webui.

    It runs ``int(strength * steps) + 1`` steps, diffusers ``int(strength * steps)``.

    Source: modules/sd_samplers_common.py, setup_img2img_steps; modules/sd_samplers_kdiffusion.py,
    sample_img2img.
    """
    return min(1.0, (int(min(strength, 0.999) * steps) + 1 + 1e-6) / steps)


def blurred(mask: Pixels, blur: int = ADETAILER_BLUR) -> Pixels:
    """Blur a mask (H, W) uint8 as stable-diffusion-webui does, sigma ``blur`` px.

    Source: modules/processing.py, StableDiffusionProcessingImg2Img.init.
    """
    kernel = 2 * int(2.5 * blur + 0.5) + 1
    across = cv2.GaussianBlur(mask, (kernel, 1), blur)
    return np.asarray(cv2.GaussianBlur(across, (1, kernel), blur), np.uint8)


def padded_square(mask: Pixels, padding_px: int = ADETAILER_PADDING_PX, ratio: float = 1.0) -> Area:
    """Return the area that is cut out: bounds of the mask, padded, brought to a ratio.

    The short side grows on both sides, the area is moved inward at borders and cut where the
    picture is too small.

    Args:
        mask: (H, W) uint8; what is above 0 counts.
        padding_px: on each side, px.
        ratio: width over height.

    Source: stable-diffusion-webui, modules/masking.py, get_crop_region and expand_crop_region.
    """
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x0, x1 = max(0, columns[0] - padding_px), min(width, columns[-1] + 1 + padding_px)
    y0, y1 = max(0, rows[0] - padding_px), min(height, rows[-1] + 1 + padding_px)
    if (x1 - x0) / (y1 - y0) > ratio:
        y0, y1 = _widened(int(y0), int(y1), int((x1 - x0) / ratio), height)
    else:
        x0, x1 = _widened(int(x0), int(x1), int((y1 - y0) * ratio), width)
    return int(x0), int(y0), int(x1), int(y1)


def _widened(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    more = length - (high - low)
    low -= more // 2
    high += more - more // 2
    if high > limit:
        low, high = low - (high - limit), limit
    if low < 0:
        low, high = 0, high - low
    return low, min(high, limit)


def hard_latent_mask(mask: Pixels, area: Area, latent_px: int) -> Floats:
    """Return the part of a mask in an area at the latents' size, rounded to 0 and 1.

    Returns:
        (1, 1, n, n) float32.

    Source: stable-diffusion-webui, modules/processing.py, the latmask of
    StableDiffusionProcessingImg2Img.init; soft inpainting is off by default.
    """
    x0, y0, x1, y1 = area
    part = Image.fromarray(mask[y0:y1, x0:x1])
    small = part.resize((latent_px, latent_px), Image.Resampling.BICUBIC)
    rounded: Floats = np.round(np.asarray(small, np.float32) / 255)
    return rounded[None, None]


async def adetailer_pass(job: Job, base: Base, *, suffix: bool) -> Repainted:
    """Repaint every face as ADetailer does by default, one after the other."""
    faces = scale_faces(await find_faces(job.run, base.original), base.enlarged)
    picture = base.picture
    alpha = np.zeros(picture.shape[:2], np.float32)
    for number, face in enumerate(faces):
        mask = blurred(grown_box_mask(face, (picture.shape[0], picture.shape[1])))
        area = padded_square(mask)
        latent_px = job.run.request.model.native_px // job.run.request.model.vae_scale_factor
        patch = await _paint_area(
            job,
            picture,
            area,
            strength=webui_strength(ADETAILER_STRENGTH, job.run.request.steps),
            seed=job.run.request.seed + number,
            mask=hard_latent_mask(mask, area, latent_px),
            suffix=suffix,
        )
        share = floats_from_pixels(mask)
        picture = laid_over(picture, patch, area, share)
        alpha = np.maximum(alpha, share)
    return Repainted(pixels=picture, alpha=alpha, faces=len(faces))


def laid_over(picture: Pixels, patch: Floats, area: Area, share: Floats) -> Pixels:
    """Return the picture with a patch resized to an area, by the share (H, W) in [0, 1]."""
    x0, y0, x1, y1 = area
    fitted = pixels_from_floats(resize(patch, (y1 - y0, x1 - x0)))
    inside = share[y0:y1, x0:x1, None]
    old = floats_from_pixels(picture[y0:y1, x0:x1])
    result = picture.copy()
    result[y0:y1, x0:x1] = pixels_from_floats(old + inside * (floats_from_pixels(fitted) - old))
    return result


# -------------------------------------------------------------------------------------- Astria


def grown_square(face: Face, size: tuple[int, int], factor: float = ASTRIA_FACTOR) -> Area:
    """Return a face's box, each side times ``factor`` and the longer one for both, inside."""
    height, width = size
    side = min(round(face.side * factor), height, width)
    left = min(max(round(face.center[0] - side / 2), 0), width - side)
    top = min(max(round(face.center[1] - side / 2), 0), height - side)
    return left, top, left + side, top + side


async def astria_pass(job: Job, base: Base, *, suffix: bool) -> Repainted:
    """Repaint the first face and paste the whole rectangle, if its box is of a fitting size."""
    faces = scale_faces(await find_faces(job.run, base.original), base.enlarged)
    picture = base.picture
    height, width = picture.shape[:2]
    alpha = np.zeros((height, width), np.float32)
    if not faces:
        return Repainted(pixels=picture, alpha=alpha, faces=0)
    share = faces[0].width * faces[0].height / (height * width)
    if not ASTRIA_SHARES[0] <= share <= ASTRIA_SHARES[1]:
        return Repainted(pixels=picture, alpha=alpha, faces=0)
    x0, y0, x1, y1 = area = grown_square(faces[0], (height, width))
    alpha[y0:y1, x0:x1] = 1
    patch = await _paint_area(
        job, picture, area, strength=ASTRIA_STRENGTH, seed=ASTRIA_SEED, steps=ASTRIA_STEPS,
        suffix=suffix,
    )  # fmt: skip
    return Repainted(pixels=laid_over(picture, patch, area, alpha), alpha=alpha, faces=1)


# -------------------------------------------------------------------------------------- shared


async def _paint_area(
    job: Job,
    picture: Pixels,
    area: Area,
    *,
    strength: float,
    seed: int,
    suffix: bool,
    steps: int | None = None,
    mask: Floats | None = None,
) -> Floats:
    """Repaint an area by image-to-image at the model's native size.

    Args:
        job: the open request.
        picture: (H, W, 3) uint8.
        area: what is repainted.
        strength: share of the steps that run.
        seed: of the noise.
        suffix: add the model's `face_prompt_suffix` to the prompt.
        steps: None takes the request's.
        mask: (1, 1, h, w) of latents to repaint; None repaints all.

    Returns:
        (native, native, 3) float32 in [0, 1].
    """
    run, x0, y0, x1, y1 = job.run, *area
    side = run.request.model.native_px
    request = run.request if steps is None else replace(run.request, steps=steps)
    table = step_table(request, height=side, width=side, strength=strength)
    stream = TorchNormal(seed % 2**32)
    crop = resize(floats_from_pixels(picture[y0:y1, x0:x1]), (side, side))
    known = sample_posterior(run, await encode_picture(run, crop), stream)
    noise = stream.randn(known.shape)
    if suffix:
        guide = job.conditioning.face_guides(run, side=side, faces=1)[0]
    else:
        guide = job.conditioning.guide(run, height=side, width=side)
    latents = await denoise(
        run,
        sample=np.asarray(table.init[0] * known + table.init[1] * noise, np.float32),
        guide=guide,
        table=table,
        stream=stream,
        image=0,
        mask=mask,
        known=known,
        known_noise=noise,
    )
    return await decode_latents(run, latents)


METHODS: dict[str, Method] = {
    "no pass": no_pass,
    "closeup": closeup_pass,
    "ADetailer's defaults": partial(adetailer_pass, suffix=False),
    "ADetailer's defaults + suffix": partial(adetailer_pass, suffix=True),
    "Astria's first recipe": partial(astria_pass, suffix=False),
    "Astria's first recipe + suffix": partial(astria_pass, suffix=True),
}
"""Name -> method. The suffix is the model's own (``face_prompt_suffix``), which only closeup adds
by itself; the rows with it show what is left of the difference when the others get it too."""
