"""The face pass: find the faces of finished pictures, repaint each one, blend it back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from closeup.conditioning import Conditioning, Guide
from closeup.detection import (
    OUTPUT_NAMES,
    Face,
    decode_detections,
    detection_long_sides,
    detector_input,
    merge_detections,
    scale_faces,
)
from closeup.diffuse import (
    decode_latents,
    denoise,
    encode_picture,
    latent_shape,
    sample_posterior,
    step_table,
)
from closeup.enlarge import enlarge
from closeup.face_blend import (
    FacePlace,
    blend_faces,
    differential_masks,
    face_mask,
    find_place,
    latent_mask,
)
from closeup.face_geometry import extract, extract_from_pixels
from closeup.faces import FaceAction, FacePlan, face_report, plan_faces
from closeup.manifest import UpscalerManifest
from closeup.noise import TorchNormal
from closeup.run import Floats, Run, start, together
from closeup.samplers import StepTable

Pixels = npt.NDArray[np.uint8]
FaceReport = dict[str, Any]

# By how much a repainted face may be enlarged to the resolution of its picture.
PATCH_FACTORS = (1, 2, 4)
MAX_FACTOR = PATCH_FACTORS[-1]
MASK_THRESHOLD = 128  # as the masked generation itself reads it
#: Over so many pixels of the request's mask, from its edge inwards, a repainted face fades in.
MASK_EDGE_PX = 4


class OpenArea:
    """What of a picture the request's own mask lets be repainted.

    Args:
        mask: (h, w) uint8 of the request.
        image_shape: of the picture, (H, W, ...), a multiple of the mask's sides.

    Attributes:
        alpha: (H, W) float32 in [0, 1]: 0 where the mask is black, rising to 1 behind its edge.
    """

    def __init__(self, mask: Pixels, image_shape: tuple[int, ...]) -> None:
        self._open = mask >= MASK_THRESHOLD
        factor = image_shape[0] // mask.shape[0]
        whole = self._open.astype(np.float32).repeat(factor, 0).repeat(factor, 1)
        edge_px = MASK_EDGE_PX * factor
        # Half of a blurred edge lies outside: that is cut off, and what is inside starts at 0.
        inside = 2 * cv2.GaussianBlur(whole, (0, 0), edge_px / 2) - 1
        self.alpha: Floats = np.where(whole > 0, np.clip(inside, 0, 1), 0).astype(np.float32)
        self._factor = factor

    def share_of(self, face: Face) -> float:
        """How much of a face's box is open, 0 to 1."""
        x0, y0, x1, y1 = (value / self._factor for value in face.box)
        part = self._open[int(y0) : math.ceil(y1), int(x0) : math.ceil(x1)]
        return float(part.mean()) if part.size else 0.0


async def inpaint_faces(
    run: Run,
    pictures: list[Pixels],
    *,
    seen: list[Pixels],
    enlarged: float,
    upscaler: UpscalerManifest,
    conditioning: Conditioning,
) -> tuple[list[Pixels], list[list[FaceReport]]]:
    """Repaint the faces of every picture; all faces go through the denoiser together.

    Args:
        run: the request.
        pictures: uint8 (H, W, 3).
        seen: the same at the size before super-resolution; faces are found in these, since
            detectors are trained on small faces.
        enlarged: how much super-resolution has enlarged each side since the model painted them:
            1 after `hires_fix`, which painted every pixel anew.
        upscaler: enlarges repainted faces that need more pixels than the model paints.
        conditioning: the encoded prompts.

    Returns:
        The pictures, every byte outside the face masks and outside the request's own mask
        unchanged, and a report for each face.
    """
    with run.stage("detect", len(pictures)):
        found = await together(run, [find_faces(run, pixels) for pixels in seen])
    factor = pictures[0].shape[0] / seen[0].shape[0]
    open_area = None if run.request.mask is None else OpenArea(run.request.mask, pictures[0].shape)
    plans = [
        _plan(run, scale_faces(faces, factor), pixels, seed, enlarged, open_area)
        for faces, pixels, seed in zip(found, pictures, run.request.seeds, strict=True)
    ]
    wanted = [[p for p in one if p.action is FaceAction.REPAINT] for one in plans]
    most = max(len(one) for one in wanted)
    _tell_of_unused_prompts(run, most)
    guides = conditioning.face_guides(run, side=run.request.model.native_px, faces=most)
    with run.stage("faces", 0):
        repainted = await together(
            run,
            [
                _repaint_picture(run, index, pixels, faces, guides, upscaler, open_area)
                for index, (pixels, faces) in enumerate(zip(pictures, wanted, strict=True))
            ],
        )
    return repainted, [
        [face_report(plan, _prompt_of(plan, faces, guides)) for plan in picture_plans]
        for picture_plans, faces in zip(plans, wanted, strict=True)
    ]


def _prompt_of(plan: FacePlan, wanted: list[FacePlan], guides: list[Guide]) -> int | None:
    """Which prompt a face gets: each its own, the last one all that follow."""
    if plan.action is FaceAction.SKIP:
        return None
    return min([face.index for face in wanted].index(plan.index), len(guides) - 1)


def _tell_of_unused_prompts(run: Run, most: int) -> None:
    given = len(run.request.face_prompts)
    if given > max(most, 1):
        run.warn(
            f"face_prompt holds {given} prompts, of which {most} were used: no picture has more "
            "faces that were repainted."
        )


async def find_faces(run: Run, pixels: Pixels) -> list[Face]:
    """Return the faces of a picture, in its own pixels."""
    height, width = pixels.shape[:2]

    async def look(long_side: int) -> list[Face]:
        tensor, scale = detector_input(pixels, long_side=long_side)
        outputs = await run.infer("face_detector", {"input": tensor}, OUTPUT_NAMES)
        return decode_detections(outputs, scale=scale, size=(height, width))

    # The quicker look first: the other's input is made while it runs.
    sides = sorted(detection_long_sides(height, width))
    looks = await together(run, [look(side) for side in sides])
    run.advance(1)
    return merge_detections(*looks)


def _plan(
    run: Run,
    faces: list[Face],
    pixels: Pixels,
    seed: int,
    enlarged: float,
    open_area: OpenArea | None,
) -> list[FacePlan]:
    request = run.request
    return plan_faces(
        faces,
        image_size=(pixels.shape[0], pixels.shape[1]),
        work_px=request.model.native_px,
        options=request.faces,
        seed=seed,
        defaults=request.model.face_defaults,
        enlarged=enlarged,
        open_share=None if open_area is None else open_area.share_of,
        count_steps=lambda plan: len(_table(run, plan).timesteps),
    )


def _table(run: Run, plan: FacePlan) -> StepTable:
    side = plan.work_px
    steps = run.request.face_steps
    return step_table(run.request, height=side, width=side, strength=plan.strength, steps=steps)


async def _repaint_picture(
    run: Run,
    image: int,
    pixels: Pixels,
    wanted: list[FacePlan],
    guides: list[Guide],
    upscaler: UpscalerManifest,
    open_area: OpenArea | None,
) -> Pixels:
    if not wanted:
        return pixels
    last = len(guides) - 1
    repaints = await together(
        run,
        [
            _repaint_face(run, image, pixels, plan, guides[min(number, last)], upscaler, open_area)
            for number, plan in enumerate(wanted)
        ],
    )
    run.count("inference_cycles")
    return blend_faces(pixels, repaints)


async def _repaint_face(
    run: Run,
    image: int,
    pixels: Pixels,
    plan: FacePlan,
    guide: Guide,
    upscaler: UpscalerManifest,
    open_area: OpenArea | None,
) -> tuple[Floats, FacePlace]:
    """Return the repainted crop with pixels enough for its place, and the place."""
    table = _table(run, plan)
    steps = len(table.timesteps)
    run.extend(steps)
    crop = extract_from_pixels(pixels, plan.crop, plan.work_px)
    encoding = await start(encode_picture(run, crop))
    stream = TorchNormal(plan.seed)
    size = latent_shape(run.request, plan.work_px, plan.work_px)
    stream.draw_ahead(2 + int(table.draws_noise.sum()), size)
    factor = _patch_factor(plan)
    fine = face_mask(replace(plan, work_px=factor * plan.work_px))
    allowed = None if open_area is None else open_area.alpha
    place = find_place(pixels, plan.crop, fine, allowed)
    mask = face_mask(plan)
    if open_area is not None:
        mask = mask * extract(open_area.alpha, plan.crop, plan.work_px)
    masks = differential_masks(latent_mask(mask, size[1:]), steps)
    known = sample_posterior(run, await encoding, stream)
    noise = stream.randn(known.shape)
    latents = await denoise(
        run,
        sample=np.asarray(table.init[0] * known + table.init[1] * noise, np.float32),
        guide=guide,
        table=table,
        stream=stream,
        image=image,
        mask=masks,
        known=known,
        known_noise=noise,
    )
    run.count("faces_repainted")
    patch = await decode_latents(run, latents)
    if factor > 1:
        patch = await enlarge(run, patch, upscaler, factor)
    return patch, place


def _patch_factor(plan: FacePlan) -> int:
    """By how much the upscaler enlarges a repainted face, as it did the picture around it.

    1 where the model paints as many pixels as the crop covers.
    """
    return next((f for f in PATCH_FACTORS if f * plan.work_px >= plan.crop.side), MAX_FACTOR)
