"""The whole pipeline: one request in, finished pictures out.

``generate`` is the order of things; each stage is a plain function over all pictures of the
request, so that they share engine calls. Nothing here knows Triton: models are reached through
`closeup.run.Models`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from closeup.conditioning import Conditioning, Guide, encode_prompts
from closeup.diffuse import (
    decode_latents,
    denoise,
    encode_picture,
    latent_shape,
    sample_posterior,
    step_table,
)
from closeup.enlarge import super_resolve_all
from closeup.face_pass import FaceReport, inpaint_faces
from closeup.images import floats_from_pixels, pixels_from_floats, resize
from closeup.manifest import UpscalerManifest
from closeup.noise import TorchNormal
from closeup.request import Mode, Request
from closeup.run import Array, Floats, Run, start, together
from closeup.samplers import StepTable
from closeup.tokens import PromptTokenizer

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a request came to.

    Attributes:
        pictures: one a seed, uint8 (H, W, 3).
        faces: for each picture, a report per face found; empty without a face pass.
        stages: stage name -> the pictures as that stage left them, when asked for.
    """

    pictures: list[Pixels]
    faces: list[list[FaceReport]]
    stages: dict[str, list[Pixels]] = field(default_factory=dict)


async def generate(
    run: Run, *, tokenizers: Sequence[PromptTokenizer], upscaler: UpscalerManifest | None
) -> Outcome:
    """Run a request from prompt to finished pictures.

    `Run.ticket_returned` is to be awaited before the client gets them.

    Args:
        run: the request and what runs it.
        tokenizers: of the model's text encoders.
        upscaler: of the repository; needed for super-resolution.

    Raises:
        CloseupError: cancelled, past its deadline, no slot, or a model failed.
    """
    request = run.request
    stages: dict[str, list[Pixels]] = {}
    faces: list[list[FaceReport]] = [[] for _ in request.seeds]
    async with run.returning_ticket():
        encoding = await start(encode(run, tokenizers))
        streams = open_streams(run)
        conditioning = await encoding
        pictures = await paint(run, conditioning, streams)
        originals = [pixels_from_floats(picture) for picture in pictures]
        if request.stages:
            stages["generated"] = originals
        if request.super_resolution:
            assert upscaler is not None
            pictures = await super_resolve_all(run, pictures, upscaler)
            keep_stage(request, stages, "super_resolution", pictures)
        seen, enlarged = originals, pictures[0].shape[0] / originals[0].shape[0]
        if request.hires_fix:
            repainted = await repaint_lightly(run, pictures, conditioning)
            if repainted is not pictures and request.inpaint_faces:
                seen, enlarged = shrunk_to(repainted, originals), 1.0
            pictures = repainted
            keep_stage(request, stages, "hires_fix", pictures)
        pixels = [pixels_from_floats(picture) for picture in pictures]
        if request.inpaint_faces:
            assert upscaler is not None
            pixels, faces = await inpaint_faces(
                run,
                pixels,
                seen=seen,
                enlarged=enlarged,
                upscaler=upscaler,
                conditioning=conditioning,
            )
    return Outcome(pictures=pixels, faces=faces, stages=stages)


async def encode(run: Run, tokenizers: Sequence[PromptTokenizer]) -> Conditioning:
    """Take a ticket and encode the prompts."""
    with run.stage("encode", 1):
        conditioning = await encode_prompts(run, tokenizers)
        run.advance(1)
    return conditioning


def open_streams(run: Run) -> list[TorchNormal]:
    """Return the pictures' streams of noise; what the first steps will draw is drawn already."""
    request = run.request
    streams = [TorchNormal(seed) for seed in request.seeds]
    if request.mode is Mode.TEXT:
        shape = latent_shape(request, request.height, request.width)
        table = step_table(request, height=request.height, width=request.width)
        for stream in streams:
            stream.draw_ahead(1 + int(table.draws_noise.sum()), shape)
    return streams


async def paint(
    run: Run, conditioning: Conditioning, streams: Sequence[TorchNormal]
) -> list[Floats]:
    """Generate the pictures (H, W, 3) in [0, 1], or take the input as it is."""
    request = run.request
    if request.mode is Mode.UPSCALE or (request.image is not None and request.strength == 0):
        assert request.image is not None
        return [floats_from_pixels(request.image)] * request.num_images
    strength = None if request.mode is Mode.TEXT else request.strength
    table = step_table(request, height=request.height, width=request.width, strength=strength)
    if len(table.timesteps) == 0:
        assert request.image is not None
        run.warn("denoising_strength times steps is below one step: nothing was done.")
        return [floats_from_pixels(request.image)] * request.num_images
    if request.mask is not None:
        shape = latent_shape(request, request.height, request.width)
        if not latent_mask(request.mask, shape[1:]).any():
            run.warn(
                "mask_image has no white area of 8x8 px, the size of a latent: nothing was "
                "repainted."
            )
            assert request.image is not None
            return [floats_from_pixels(request.image)] * request.num_images
    guide = conditioning.guide(run, height=request.height, width=request.width)
    with run.stage("generate", len(table.timesteps) * request.num_images):
        moments = None
        if request.image is not None:
            moments = await encode_picture(run, floats_from_pixels(request.image))
        return await together(
            run,
            [
                _paint_one(run, index, stream, table, guide, moments)
                for index, stream in enumerate(streams)
            ],
        )


async def _paint_one(
    run: Run,
    image: int,
    stream: TorchNormal,
    table: StepTable,
    guide: Guide,
    moments: tuple[Floats, Floats] | None,
) -> Floats:
    """One picture; the order of the draws from `stream` is that of the diffusers pipelines."""
    request = run.request
    shape = latent_shape(request, request.height, request.width)
    inpainting: Mapping[str, Any] = {}
    if moments is None:
        sample = table.init[1] * stream.randn(shape)
    else:
        known = sample_posterior(run, moments, stream)
        noise = stream.randn(shape)
        sample = table.init[0] * known + table.init[1] * noise
        if request.mask is not None:
            stream.randn(shape)  # diffusers also draws a posterior of the masked picture
            mask = latent_mask(request.mask, shape[1:])
            inpainting = {"mask": mask, "known": known, "known_noise": noise}
            if request.strength == 1:
                sample = table.init_noise_sigma * noise  # as text-to-image starts
    latents = await denoise(
        run,
        sample=np.asarray(sample, np.float32),
        guide=guide,
        table=table,
        stream=stream,
        image=image,
        **inpainting,
    )
    run.count("inference_cycles")
    return await decode_latents(run, latents)


def latent_mask(mask: Pixels, shape: tuple[int, ...]) -> Floats:
    """Return the mask (1, 1, h, w) in {0, 1}: thresholded at one half, nearest neighbour.

    Source: diffusers, StableDiffusionInpaintPipeline.prepare_mask_latents.
    """
    rows, columns = (
        np.arange(side) * full // side for side, full in zip(shape, mask.shape, strict=True)
    )
    repainted = mask[np.ix_(rows, columns)].astype(np.float32) / 255 >= 0.5
    latent: Floats = repainted.astype(np.float32)[None, None]
    return latent


async def repaint_lightly(
    run: Run, pictures: list[Floats], conditioning: Conditioning
) -> list[Floats]:
    """`hires_fix`: image-to-image over the whole enlarged picture at low strength."""
    request = run.request
    height, width = pictures[0].shape[:2]
    table = step_table(request, height=height, width=width, strength=request.hires_strength)
    if len(table.timesteps) == 0:
        run.warn("hires_denoising_strength times steps is below one step.")
        return pictures
    height, width = pictures[0].shape[:2]
    guide = conditioning.guide(run, height=height, width=width)

    async def repaint_one(image: int, picture: Floats, seed: int) -> Floats:
        stream = TorchNormal(seed)
        height, width = picture.shape[:2]
        whole = pad_to_multiple(picture, request.model.facts.size_step_px)
        known = sample_posterior(run, await encode_picture(run, whole), stream)
        sample = table.init[0] * known + table.init[1] * stream.randn(known.shape)
        latents = await denoise(
            run,
            sample=np.asarray(sample, np.float32),
            guide=guide,
            table=table,
            stream=stream,
            image=image,
        )
        run.count("inference_cycles")
        return (await decode_latents(run, latents))[:height, :width]

    with run.stage("hires_fix", len(table.timesteps) * len(pictures)):
        return await together(
            run,
            [
                repaint_one(index, picture, seed)
                for index, (picture, seed) in enumerate(zip(pictures, request.seeds, strict=True))
            ],
        )


def pad_to_multiple(picture: Floats, multiple: int) -> Floats:
    """Mirror a picture (H, W, 3) at its right and bottom edges until its sides are multiples.

    Only `only_upscale` comes with other sides.
    """
    missing = [-side % multiple for side in picture.shape[:2]]
    if not any(missing):
        return picture
    return np.pad(picture, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")


def shrunk_to(pictures: Sequence[Floats], sizes: Sequence[Pixels]) -> list[Pixels]:
    """Return pictures (H, W, 3) float32 averaged down to the size of others, as bytes."""
    return [
        pixels_from_floats(resize(picture, (size.shape[0], size.shape[1]), how="area"))
        for picture, size in zip(pictures, sizes, strict=True)
    ]


def keep_stage(
    request: Request, stages: dict[str, list[Pixels]], name: str, pictures: list[Floats]
) -> None:
    """Keep the pictures of a stage if the request wants them."""
    if request.stages:
        stages[name] = [pixels_from_floats(picture) for picture in pictures]


__all__ = ["Array", "Conditioning", "Outcome", "generate"]
