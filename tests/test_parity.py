"""A seed gives the picture diffusers gives: every sampler, every mode, with and without guidance.

Pictures are compared as the bytes a client gets, before super-resolution. The bar is 65 dB:
rounding alone gives more than that, one denoising step too many or too few far less (tested).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from closeup.local import LocalModels
from closeup.samplers import SAMPLERS
from tests.diffusers_reference import SCHEDULERS, DiffusersReference, Pixels, psnr_db
from tests.paths import DEMO_WEIGHTS

BAR_DB = 65.0
PROMPT = "a full body photo of a woman with long red hair wearing a blue dress in a park"
NEGATIVE = "blurry, deformed"
SEED, STEPS, STRENGTH = 11, 6, 0.7
WIDTH, HEIGHT = 128, 96
MODES = ("text-to-image", "image-to-image", "inpainting")


@dataclass(frozen=True)
class Sides:
    """The same weights on both sides."""

    ours: LocalModels
    theirs: DiffusersReference


@pytest.fixture(scope="module")
def demo(demo_repository: Path) -> Iterator[Sides]:
    with LocalModels(demo_repository) as ours:
        yield Sides(ours, DiffusersReference(DEMO_WEIGHTS / "sd"))


def picture() -> Pixels:
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = [128 + 100 * np.sin(rows / a + columns / b) for a, b in ((9, 17), (23, 7), (13, 31))]
    pixels: Pixels = np.stack(waves, -1).astype(np.uint8)
    return pixels


def mask() -> Pixels:
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    drawn[24:72, 30:101] = 255
    return drawn


def png(pixels: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def paint_ours(sides: Sides, mode: str, scheduler: str, cfg_scale: float, **changes: Any) -> Pixels:
    fields: dict[str, Any] = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "seed": SEED, "steps": STEPS,
        "cfg_scale": cfg_scale, "scheduler": scheduler, "w": WIDTH, "h": HEIGHT,
    }  # fmt: skip
    if mode != "text-to-image":
        fields |= {"input_image": png(picture()), "denoising_strength": STRENGTH}
    if mode == "inpainting":
        fields["mask_image"] = png(mask())
    return sides.ours.generate(**{**fields, **changes}).pictures[0]


def paint_theirs(
    sides: Sides, mode: str, scheduler: str, cfg_scale: float, **changes: Any
) -> Pixels:
    arguments: dict[str, Any] = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS,
        "guidance_scale": cfg_scale,
    }  # fmt: skip
    if mode == "image-to-image":
        arguments |= {"image": Image.fromarray(picture()), "strength": STRENGTH}
    else:
        arguments |= {"width": WIDTH, "height": HEIGHT}
    if mode == "inpainting":
        arguments |= {"image": Image.fromarray(picture()), "strength": STRENGTH}
        arguments["mask_image"] = Image.fromarray(mask())
    seed = changes.pop("seed", SEED)
    return sides.theirs.paint(mode, scheduler, seed=seed, **{**arguments, **changes})


def test_reference_covers_every_sampler() -> None:
    assert set(SCHEDULERS) == set(SAMPLERS)


@pytest.mark.parametrize("cfg_scale", [4.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_demo_picture_equals_diffusers(
    demo: Sides, scheduler: str, mode: str, cfg_scale: float, record_property: Any
) -> None:
    ours = paint_ours(demo, mode, scheduler, cfg_scale)
    theirs = paint_theirs(demo, mode, scheduler, cfg_scale)
    level = psnr_db(ours, theirs)
    record_property("psnr_db", round(level, 1))
    assert ours.std() > 5  # a picture, not a plain colour
    assert level >= BAR_DB


def test_bar_rejects_one_step_more_another_seed_and_a_black_picture(demo: Sides) -> None:
    theirs = paint_theirs(demo, "text-to-image", "euler", 4.0)
    longer = paint_ours(demo, "text-to-image", "euler", 4.0, steps=STEPS + 1)
    other = paint_ours(demo, "text-to-image", "euler", 4.0, seed=SEED + 1)
    for wrong in (longer, other, np.zeros_like(theirs)):
        assert psnr_db(wrong, theirs) < BAR_DB - 10


def test_inpainting_at_full_strength_equals_diffusers(demo: Sides) -> None:
    ours = paint_ours(demo, "inpainting", "euler", 4.0, denoising_strength=1.0)
    theirs = paint_theirs(demo, "inpainting", "euler", 4.0, strength=1.0)
    assert psnr_db(ours, theirs) >= BAR_DB


def test_each_picture_of_a_request_equals_its_own_seed(demo: Sides) -> None:
    fields = {"prompt": PROMPT, "steps": STEPS, "cfg_scale": 4.0, "scheduler": "euler_a",
              "w": WIDTH, "h": HEIGHT}  # fmt: skip
    outcome = demo.ours.generate(**fields, seed=SEED, num_images=3)
    for index, ours in enumerate(outcome.pictures):
        theirs = paint_theirs(
            demo, "text-to-image", "euler_a", 4.0, seed=SEED + index, negative_prompt=""
        )
        assert psnr_db(ours, theirs) >= BAR_DB
