"""A face is repainted as diffusers' img2img would, with differential diffusion in its callback."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from closeup import face_blend, face_pass
from closeup.face_blend import FacePlace
from closeup.face_geometry import extract
from closeup.images import Floats, floats_from_pixels, pixels_from_floats
from closeup.local import LocalModels
from closeup.manifest import FaceDetectorManifest, UpscalerManifest
from closeup.run import Array
from tests.diffusers_reference import MORE_SCHEDULERS, SCHEDULERS, DiffusersReference, psnr_db
from tests.drawn_faces import make_face
from tests.tiny_export import NATIVE_PX, TinyExport, export_tiny
from tests.toy_models import COMPONENT, SR_SCALE, upscale, yunet_outputs

BAR_DB = 65.0  # as in test_parity; another seed, strength or mask gives far less (tested)
STEPS, STRENGTH, CFG = 8, 0.6, 3.0
PROMPT, FACE_PROMPT, NEGATIVE = "a red coat", "a photo of the woman", "forest"
FIELDS: Mapping[str, Any] = {
    "prompt": PROMPT, "face_prompt": FACE_PROMPT, "negative_prompt": NEGATIVE, "seed": 3,
    "steps": STEPS, "cfg_scale": CFG, "w": 128, "h": 128, "inpaint_faces": True, "stages": True,
    "face_denoising_strength": STRENGTH,
}  # fmt: skip
# Crops of at most the native size: patches are pasted as the model painted them.
FACES = [make_face(40, 50, 7.5), make_face(90, 30, 6.5)]


class FacedModels(LocalModels):
    """A pipeline's own engines, with a toy upscaler and a detector that finds `FACES`."""

    def __init__(self, repository: Path) -> None:
        super().__init__(repository)
        self.repository.__dict__["upscaler"] = UpscalerManifest(
            scale=SR_SCALE, tile_px=128, overlap_px=16, max_batch=4, component=COMPONENT
        )
        self.repository.__dict__["face_detector"] = FaceDetectorManifest(component=COMPONENT)

    async def infer(
        self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> dict[str, Array]:
        """Run a model."""
        if name == "upscaler":
            return upscale(inputs)
        if name == "face_detector":
            height, width = inputs["input"].shape[2:]
            return yunet_outputs(FACES if width >= 512 else [], height, width)
        return await super().infer(name, inputs, outputs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    return export_tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def ours(tiny: TinyExport) -> Iterator[FacedModels]:
    models = FacedModels(tiny.repository)
    yield models
    models.close()


@pytest.fixture(scope="module")
def theirs(tiny: TinyExport) -> Iterator[DiffusersReference]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield DiffusersReference(tiny.pipeline)
    torch.set_num_threads(threads)


def repaint_theirs(
    reference: DiffusersReference, scheduler: str, crop: Floats, mask: Floats, seed: int
) -> Floats:
    """Repaint a crop (work, work, 3) with img2img and differential diffusion."""
    pipeline = reference.pipeline("image-to-image")
    image = torch.from_numpy(crop.transpose(2, 0, 1)[None].copy())
    generator = torch.Generator("cpu").manual_seed(seed)  # draws what the pipeline will draw
    with torch.no_grad():
        posterior = pipeline.vae.encode(image * 2 - 1).latent_dist
    known = posterior.sample(generator) * pipeline.vae.config.scaling_factor
    noise = torch.randn(known.shape, generator=generator)
    small = torch.nn.functional.adaptive_avg_pool2d(
        torch.from_numpy(mask)[None, None], known.shape[-2:]
    )
    done = 0

    def put_back(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done += 1
        total = pipe.num_timesteps
        later = pipe.scheduler.timesteps[-total:][done : done + 1]
        there = pipe.scheduler.add_noise(known, noise, later) if len(later) else known
        free = (small * total >= total - done - 1e-6) & (small > 0)
        return {"latents": torch.where(free, tensors["latents"], there)}

    return floats_from_pixels(
        reference.paint(
            "image-to-image", scheduler, seed=seed, image=image, strength=STRENGTH,
            prompt=FACE_PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS,
            guidance_scale=CFG, callback_on_step_end=put_back,
        )
    )  # fmt: skip


Patch = tuple[Floats, FacePlace]


def repaint_ours(
    models: FacedModels, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Patch], list[dict[str, Any]], Floats]:
    """Return what was handed to the blending, the reports, and the picture before."""
    handed: list[Patch] = []

    def keep(pixels: Any, repaints: Sequence[Patch]) -> Any:
        handed.extend(repaints)
        return face_blend.blend_faces(pixels, repaints)

    monkeypatch.setattr(face_pass, "blend_faces", keep)
    run = models.start(models.resolve(**FIELDS, scheduler=scheduler))
    outcome = asyncio.run(models.run(run))
    before = outcome.stages["super_resolution"][0]
    return handed, outcome.faces[0], floats_from_pixels(before)


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, *MORE_SCHEDULERS])
def test_repainted_faces_equal_diffusers(
    ours: FacedModels,
    theirs: DiffusersReference,
    scheduler: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handed, reports, before = repaint_ours(ours, scheduler, monkeypatch)
    assert len(handed) == len(FACES)
    for (patch, place), report in zip(handed, reports, strict=True):
        assert patch.shape == (NATIVE_PX, NATIVE_PX, 3)
        original = extract(before, place.crop, NATIVE_PX)
        expected = repaint_theirs(theirs, scheduler, original, place.mask, report["seed"])
        assert psnr_db(pixels_from_floats(patch), pixels_from_floats(expected)) >= BAR_DB


def test_bar_rejects_another_seed_no_mask_and_the_untouched_crop(
    ours: FacedModels, theirs: DiffusersReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed, reports, before = repaint_ours(ours, "euler_a", monkeypatch)
    patch, place = handed[0]
    mask, original = place.mask, extract(before, place.crop, NATIVE_PX)
    seed = reports[0]["seed"]
    wrong = [
        repaint_theirs(theirs, "euler_a", original, mask, seed + 1),
        repaint_theirs(theirs, "euler_a", original, np.ones_like(mask), seed),
        repaint_theirs(theirs, "dpm++2m", original, mask, seed),
        original,
    ]
    for other in wrong:
        assert psnr_db(pixels_from_floats(patch), pixels_from_floats(other)) < BAR_DB - 15
