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
from closeup.diffuse import decode_latents, denoise, encode_picture, sample_posterior, step_table
from closeup.enlarge import enlarge
from closeup.face_blend import blend_faces, differential_masks, face_mask, latent_mask
from closeup.face_geometry import FaceCrop, extract
from closeup.faces import FaceAction, FacePlan, face_report, plan_faces
from closeup.images import floats_from_pixels
from closeup.manifest import UpscalerManifest
from closeup.noise import TorchNormal
from closeup.run import Floats, Run, together
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
    guide = conditioning.guide(run, height=work_px, width=work_px, face=True)
    with run.stage("faces", 0):
        repainted = await together(
            run,
            [
                _repaint_picture(run, index, pixels, picture_plans, guide, upscaler)
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

    looks = await together(run, [look(side) for side in detection_long_sides(height, width)])
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
        crop_factor=request.model.face_crop_factor,
        enlarged=enlarged,
    )
    return [_checked(run, plan) for plan in plans]


def _checked(run: Run, plan: FacePlan) -> FacePlan:
    """Skip a face that the request's steps or its mask leave alone."""
    if plan.action is FaceAction.SKIP:
        return plan
    if not _table(run, plan).timesteps.size:
        reason = "Its strength times the request's steps is below one step."
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
    return step_table(run.request, height=side, width=side, strength=plan.strength)


async def _repaint_picture(
    run: Run,
    image: int,
    pixels: Pixels,
    plans: list[FacePlan],
    guide: Guide,
    upscaler: UpscalerManifest,
) -> Pixels:
    wanted = [plan for plan in plans if plan.action is FaceAction.REPAINT]
    if not wanted:
        return pixels
    picture = floats_from_pixels(pixels)
    patches = await together(
        run, [_repaint_face(run, image, picture, plan, guide) for plan in wanted]
    )
    run.count("inference_cycles")
    fitted = await together(
        run,
        [
            _fit_patch(run, patch, plan, upscaler)
            for patch, plan in zip(patches, wanted, strict=True)
        ],
    )
    return blend_faces(pixels, fitted)


async def _fit_patch(
    run: Run, patch: Floats, plan: FacePlan, upscaler: UpscalerManifest
) -> tuple[Floats, FaceCrop, Floats]:
    """Return a patch with pixels enough for its crop, the crop, and the mask of that size.

    A patch that is to cover more pixels than the model paints is enlarged by the upscaler, as the
    picture around it was.
    """
    factor = next((f for f in PATCH_FACTORS if f * plan.work_px >= plan.crop.side), MAX_FACTOR)
    if factor > 1:
        patch = await enlarge(run, patch, upscaler, factor)
        plan = replace(plan, work_px=factor * plan.work_px)
    return patch, plan.crop, face_mask(plan)


async def _repaint_face(
    run: Run, image: int, picture: Floats, plan: FacePlan, guide: Guide
) -> Floats:
    """Return the repainted crop (work, work, 3)."""
    table = _table(run, plan)
    steps = len(table.timesteps)
    run.extend(steps)
    stream = TorchNormal(plan.seed)
    crop = extract(picture, plan.crop, plan.work_px)
    known = sample_posterior(run, await encode_picture(run, crop), stream)
    noise = stream.randn(known.shape)
    soft = latent_mask(face_mask(plan), (known.shape[1], known.shape[2]))
    latents = await denoise(
        run,
        sample=np.asarray(table.init[0] * known + table.init[1] * noise, np.float32),
        guide=guide,
        table=table,
        stream=stream,
        image=image,
        mask=differential_masks(soft, steps),
        known=known,
        known_noise=noise,
    )
    run.count("faces_repainted")
    return await decode_latents(run, latents)
