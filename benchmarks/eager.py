"""The graph of `closeup.graph`, written with diffusers and PyTorch eager: what we compare with.

The same weights, the same request, the same seeds, the same picture. The networks run in PyTorch,
the schedulers are diffusers' own; the geometry of faces, tiles and files is closeup's numpy on
both sides.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from benchmarks.torch_networks import enlarge, find_faces
from closeup.detection import Face, scale_faces
from closeup.face_blend import (
    blend_faces,
    differential_masks,
    face_mask,
    find_place,
    latent_mask,
)
from closeup.face_geometry import FaceCrop, extract
from closeup.face_pass import MAX_FACTOR, PATCH_FACTORS
from closeup.faces import FaceAction, FacePlan, plan_faces
from closeup.images import Floats, Pixels, encode_image, floats_from_pixels, pixels_from_floats
from closeup.info import picture_parameters
from closeup.request import Request
from closeup.upscale import sr_factor
from export.detector import load_face_detector
from export.upscalers import LoadedUpscaler, load_upscaler

# The samplers that the benchmarks use, as diffusers spells them.
SCHEDULERS = {
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EagerAnswer:
    """What a run came to.

    Attributes:
        files: one encoded picture a seed.
        timings_ms: stage -> wall milliseconds, named as the server names its stages.
        faces: faces repainted, over all pictures.
    """

    files: list[bytes]
    timings_ms: dict[str, float] = field(default_factory=dict)
    faces: int = 0


class EagerGraph:
    """Every network of a request, in float32 on the CPU.

    Args:
        pipeline: folder in diffusers layout.
        upscaler: weights, safetensors.
        face_detector: weights, safetensors.
        threads: of PyTorch.
    """

    def __init__(
        self, pipeline: Path, *, upscaler: Path, face_detector: Path, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            pipeline, safety_checker=None, torch_dtype=torch.float32
        )
        self._pipe.set_progress_bar_config(disable=True)
        # As loaded from the folder: a configuration in memory drops its default keys.
        self._own_scheduler = type(self._pipe.scheduler).from_pretrained(
            pipeline, subfolder="scheduler"
        )
        self._upscaler: LoadedUpscaler = load_upscaler(upscaler)
        self._detector = load_face_detector(face_detector)
        self._timings_ms: dict[str, float] = {}

    @torch.inference_mode()
    def run(self, request: Request) -> EagerAnswer:
        """Run a resolved text-to-image request, with its super-resolution and face pass."""
        self._timings_ms = {}
        with self._stage("encode"):
            negative, prompt, face_prompt = self._encode(request)
        with self._stage("generate"):
            pictures = self._paint(request, negative, prompt)
        originals = [pixels_from_floats(picture) for picture in pictures]
        faces = 0
        if request.super_resolution:
            with self._stage("super_resolution"):
                pictures = [self._enlarge(p, sr_factor(*p.shape[:2])) for p in pictures]
        pixels = [pixels_from_floats(picture) for picture in pictures]
        if request.inpaint_faces:
            with self._stage("detect"):
                found = [find_faces(original, detector=self._detector) for original in originals]
            with self._stage("faces"):
                for index, seed in enumerate(request.seeds):
                    factor = pixels[index].shape[0] / originals[index].shape[0]
                    plans = self._plan(request, found[index], pixels[index], seed, factor)
                    faces += len(plans)
                    pixels[index] = self._repaint(
                        request, pixels[index], plans, negative, face_prompt
                    )
        with self._stage("files"):
            files = [
                encode_image(picture, format="png", metadata=picture_parameters(request, seed))
                for picture, seed in zip(pixels, request.seeds, strict=True)
            ]
        return EagerAnswer(files=files, timings_ms=dict(self._timings_ms), faces=faces)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started_s = time.perf_counter()
        yield
        self._timings_ms[name] = 1000 * (time.perf_counter() - started_s)

    def _encode(self, request: Request) -> tuple[Tensor | None, Tensor, Tensor]:
        guided = request.cfg_scale > 1
        prompt, negative = self._pipe.encode_prompt(
            request.prompt, "cpu", 1, guided, negative_prompt=request.negative_prompt
        )
        face_prompt = prompt
        (words,) = request.face_prompts
        if request.inpaint_faces and words != request.prompt:
            face_prompt, _ = self._pipe.encode_prompt(words, "cpu", 1, False)
        return negative, prompt, face_prompt

    def _paint(self, request: Request, negative: Tensor | None, prompt: Tensor) -> list[Floats]:
        self._pipe.scheduler = self._scheduler(request.scheduler)
        batch = request.num_images
        pictures = self._pipe(
            prompt_embeds=prompt.expand(batch, -1, -1),
            negative_prompt_embeds=None if negative is None else negative.expand(batch, -1, -1),
            num_inference_steps=request.steps,
            guidance_scale=request.cfg_scale,
            width=request.width,
            height=request.height,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in request.seeds],
            output_type="np",
        ).images
        return list(pictures)

    def _scheduler(self, name: str) -> Any:
        if name not in SCHEDULERS:
            raise ValueError(f"scheduler is {name!r}; expected one of {', '.join(SCHEDULERS)}.")
        return getattr(diffusers, SCHEDULERS[name]).from_config(self._own_scheduler.config)

    def _enlarge(self, picture: Floats, factor: int) -> Floats:
        return enlarge(picture, factor, upscaler=self._upscaler)

    def _plan(
        self, request: Request, faces: list[Face], pixels: Pixels, seed: int, factor: float
    ) -> list[FacePlan]:
        plans = plan_faces(
            scale_faces(faces, factor),
            image_size=(pixels.shape[0], pixels.shape[1]),
            work_px=request.model.native_px,
            options=request.faces,
            seed=seed,
            defaults=request.model.face_defaults,
            enlarged=factor,
        )
        return [plan for plan in plans if plan.action is FaceAction.REPAINT]

    def _repaint(
        self,
        request: Request,
        pixels: Pixels,
        plans: list[FacePlan],
        negative: Tensor | None,
        prompt: Tensor,
    ) -> Pixels:
        """Repaint the faces of one picture; those with equally many steps share every call."""
        picture = floats_from_pixels(pixels)
        patches: dict[int, Floats] = {}
        groups: dict[int, list[FacePlan]] = {}
        for plan in plans:
            steps = min(int(request.face_steps * plan.strength), request.face_steps)
            groups.setdefault(steps, []).append(plan)
        for steps, members in groups.items():
            if steps:
                painted = self._repaint_group(request, picture, members, steps, negative, prompt)
                patches.update({plan.index: patch for plan, patch in
                                zip(members, painted, strict=True)})  # fmt: skip
        fitted = [self._fit(patches[plan.index], plan) for plan in plans if plan.index in patches]
        repaints = [(patch, find_place(pixels, crop, mask)) for patch, crop, mask in fitted]
        return blend_faces(pixels, repaints) if repaints else pixels

    def _fit(self, patch: Floats, plan: FacePlan) -> tuple[Floats, FaceCrop, Floats]:
        """Enlarge a patch that is to cover more pixels than the model paints."""
        factor = next((f for f in PATCH_FACTORS if f * plan.work_px >= plan.crop.side), MAX_FACTOR)
        if factor > 1:
            patch = self._enlarge(patch, factor)
            plan = replace(plan, work_px=factor * plan.work_px)
        return patch, plan.crop, face_mask(plan)

    def _repaint_group(
        self,
        request: Request,
        picture: Floats,
        plans: Sequence[FacePlan],
        steps: int,
        negative: Tensor | None,
        prompt: Tensor,
    ) -> list[Floats]:
        """Differential image-to-image over the crops, (work, work, 3) each."""
        vae = self._pipe.vae
        crops = np.stack([extract(picture, plan.crop, plan.work_px) for plan in plans])
        images = torch.from_numpy(np.ascontiguousarray(crops.transpose(0, 3, 1, 2))) * 2 - 1
        posterior = vae.encode(images).latent_dist
        generators = [torch.Generator("cpu").manual_seed(plan.seed) for plan in plans]
        known = posterior.mean + posterior.std * _normal(posterior.mean, generators)
        known = known * vae.config.scaling_factor
        noise = _normal(known, generators)
        size = (known.shape[2], known.shape[3])
        masks = torch.from_numpy(
            np.stack([differential_masks(latent_mask(face_mask(plan), size), steps)
                      for plan in plans], axis=1)
        )  # fmt: skip
        latents = self._denoise(request, known, noise, masks, generators, negative, prompt)
        decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        painted = (decoded / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)
        return list(painted)

    def _denoise(
        self,
        request: Request,
        known: Tensor,
        noise: Tensor,
        masks: Tensor,
        generators: list[torch.Generator],
        negative: Tensor | None,
        prompt: Tensor,
    ) -> Tensor:
        """Run the last ``len(masks)`` steps of the schedule; masks are (K, faces, 1, h, w)."""
        scheduler = self._scheduler(request.scheduler)
        scheduler.set_timesteps(request.face_steps)
        begin = (request.face_steps - len(masks)) * scheduler.order
        timesteps = scheduler.timesteps[begin:]
        scheduler.set_begin_index(begin)
        faces = len(known)
        latents = scheduler.add_noise(known, noise, timesteps[:1].repeat(faces))
        context = prompt.expand(faces, -1, -1)
        if negative is not None:
            context = torch.cat([negative.expand(faces, -1, -1), context])
        for index, timestep in enumerate(timesteps):
            rows = latents if negative is None else torch.cat([latents, latents])
            rows = scheduler.scale_model_input(rows, timestep)
            predicted = self._pipe.unet(rows, timestep, encoder_hidden_states=context).sample
            if negative is not None:
                without, with_prompt = predicted.chunk(2)
                predicted = without + request.cfg_scale * (with_prompt - without)
            latents = scheduler.step(
                predicted, timestep, latents, **_drawing(request.scheduler, generators)
            ).prev_sample
            shown = known
            if index + 1 < len(timesteps):
                following = timesteps[index + 1 : index + 2].repeat(faces)
                shown = scheduler.add_noise(known, noise, following)
            latents = masks[index] * latents + (1 - masks[index]) * shown
        denoised: Tensor = latents
        return denoised


def _normal(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(like.shape[1:], generator=one) for one in generators])


def _drawing(scheduler: str, generators: list[torch.Generator]) -> dict[str, Any]:
    return {"generator": generators} if scheduler == "euler_a" else {}
