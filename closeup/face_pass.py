"""The face pass: find the faces of finished pictures, repaint each one, blend it back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
from closeup.face_geometry import extract_from_pixels
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


async def inpaint_faces(
    run: Run,
    pictures: list[Pixels],
    *,
    originals: list[Pixels],
    upscaler: UpscalerManifest,
    conditioning: Conditioning,
) -> tuple[list[Pixels], list[list[FaceReport]]]:
    """Repaint the faces of every picture; all faces go through the denoiser together.

    Args:
        run: the request.
        pictures: uint8 (H, W, 3).
        originals: the same before super-resolution; faces are found in these, since detectors
            are trained on small faces.
        upscaler: enlarges repainted faces that need more pixels than the model paints.
        conditioning: the encoded prompts.

    Returns:
        The pictures, every byte outside the face masks unchanged, and a report for each face.
    """
    factor = pictures[0].shape[0] / originals[0].shape[0]
    with run.stage("detect", len(pictures)):
        found = await together(run, [find_faces(run, pixels) for pixels in originals])
    plans = [
        _plan(run, scale_faces(faces, factor), pixels, seed, enlarged=factor)
        for faces, pixels, seed in zip(found, pictures, run.request.seeds, strict=True)
    ]
    work_px = run.request.model.native_px
    guides = conditioning.face_guides(run, side=work_px)
    with run.stage("faces", 0):
        repainted = await together(
            run,
            [
                _repaint_picture(run, index, pixels, picture_plans, guides, upscaler)
                for index, (pixels, picture_plans) in enumerate(zip(pictures, plans, strict=True))
            ],
        )
    return repainted, [[face_report(plan) for plan in picture_plans] for picture_plans in plans]


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
    run: Run, faces: list[Face], pixels: Pixels, seed: int, enlarged: float
) -> list[FacePlan]:
    request = run.request
    plans = plan_faces(
        faces,
        image_size=(pixels.shape[0], pixels.shape[1]),
        work_px=request.model.native_px,
        options=request.faces,
        seed=seed,
        defaults=request.model.face_defaults,
        enlarged=enlarged,
    )
    return [_checked(run, plan) for plan in plans]


def _checked(run: Run, plan: FacePlan) -> FacePlan:
    """Skip a face that the request's steps or its mask leave alone."""
    if plan.action is FaceAction.SKIP:
        return plan
    if not _table(run, plan).timesteps.size:
        reason = "Its strength times face_steps is below one step."
        return replace(plan, action=FaceAction.SKIP, reason=reason)
    mask = run.request.mask
    if mask is not None:
        height, width = plan.image_size
        x, y = plan.face.center
        row, column = int(y / height * mask.shape[0]), int(x / width * mask.shape[1])
        if mask[min(row, mask.shape[0] - 1), min(column, mask.shape[1] - 1)] < MASK_THRESHOLD:
            reason = "It lies outside mask_image."
            return replace(plan, action=FaceAction.SKIP, reason=reason)
    return plan


def _table(run: Run, plan: FacePlan) -> StepTable:
    side = plan.work_px
    steps = run.request.face_steps
    return step_table(run.request, height=side, width=side, strength=plan.strength, steps=steps)


async def _repaint_picture(
    run: Run,
    image: int,
    pixels: Pixels,
    plans: list[FacePlan],
    guides: list[Guide],
    upscaler: UpscalerManifest,
) -> Pixels:
    wanted = [plan for plan in plans if plan.action is FaceAction.REPAINT]
    if not wanted:
        return pixels
    last = len(guides) - 1
    repaints = await together(
        run,
        [
            _repaint_face(run, image, pixels, plan, guides[min(number, last)], upscaler)
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
    place = find_place(pixels, plan.crop, face_mask(replace(plan, work_px=factor * plan.work_px)))
    masks = differential_masks(latent_mask(face_mask(plan), size[1:]), steps)
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
