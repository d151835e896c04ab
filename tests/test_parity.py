"""A seed gives the picture diffusers gives: every sampler, every mode, with and without guidance.

Pictures are compared as the bytes a client gets, before super-resolution. The bar is 65 dB:
rounding alone gives more than that, one denoising step too many or too few far less (tested).
The worst case of each pipeline is printed by the last test (``pytest -s``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from closeup.local import LocalModels
from closeup.samplers import SAMPLERS
from tests.diffusers_reference import (
    MORE_SCHEDULERS,
    SCHEDULERS,
    DiffusersReference,
    Pixels,
    psnr_db,
)
from tests.paths import DEMO_WEIGHTS
from tests.tiny_export import export_tiny, with_scheduler
from tests.toy_models import png, waves

BAR_DB = 65.0
PROMPT = "a full body photo of a woman with long red hair wearing a blue dress in a park"
NEGATIVE = "blurry, deformed"
SEED, STEPS, STRENGTH = 11, 4, 0.75
WIDTH, HEIGHT = 88, 64
MODES = ("text-to-image", "image-to-image", "inpainting")
# The same random weights under three scheduler configurations; DDIMScheduler's arguments.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "epsilon_leading": {},
    "v_trailing": {
        "prediction_type": "v_prediction", "timestep_spacing": "trailing", "steps_offset": 0,
    },
    "epsilon_linspace_linear": {
        "timestep_spacing": "linspace", "beta_schedule": "linear", "steps_offset": 3,
        "set_alpha_to_one": True,
    },
}  # fmt: skip
PIPELINES = ("demo", *CONFIGS)


@dataclass(frozen=True)
class Sides:
    """The same weights on both sides, and how far apart they were: case -> dB."""

    ours: LocalModels
    theirs: DiffusersReference
    levels: dict[str, float] = field(default_factory=dict)


@pytest.fixture(scope="module")
def pipelines(
    demo_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Sides]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # both sides run in turn; idle threads would spin against the other
    tiny = export_tiny(tmp_path_factory)
    folders = {"demo": (demo_repository, DEMO_WEIGHTS / "sd")}
    for name, changes in CONFIGS.items():
        copied = with_scheduler(tiny, tmp_path_factory.mktemp(name), **changes)
        folders[name] = (copied.repository, copied.pipeline)
    with ExitStack() as stack:
        yield {
            name: Sides(stack.enter_context(LocalModels(ours)), DiffusersReference(theirs))
            for name, (ours, theirs) in folders.items()
        }
    torch.set_num_threads(threads)


def mask() -> Pixels:
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    drawn[16:48, 21:69] = 255
    return drawn


def paint_ours(sides: Sides, mode: str, scheduler: str, cfg_scale: float, **changes: Any) -> Pixels:
    fields: dict[str, Any] = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "seed": SEED, "steps": STEPS,
        "cfg_scale": cfg_scale, "scheduler": scheduler, "w": WIDTH, "h": HEIGHT,
    }  # fmt: skip
    if mode != "text-to-image":
        fields |= {"input_image": png(waves(HEIGHT, WIDTH)), "denoising_strength": STRENGTH}
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
    if mode != "text-to-image":
        arguments |= {"image": Image.fromarray(waves(HEIGHT, WIDTH)), "strength": STRENGTH}
    if mode != "image-to-image":
        arguments |= {"width": WIDTH, "height": HEIGHT}
    if mode == "inpainting":
        arguments["mask_image"] = Image.fromarray(mask())
    seed = changes.pop("seed", SEED)
    return sides.theirs.paint(mode, scheduler, seed=seed, **{**arguments, **changes})


def test_reference_covers_every_sampler() -> None:
    assert {*SCHEDULERS, *MORE_SCHEDULERS} == set(SAMPLERS)


def test_reference_keeps_the_folders_scheduler_config(pipelines: dict[str, Sides]) -> None:
    # The pipelines' constructors rewrite it: steps_offset to 1, clip_sample to False.
    assert [pipelines[name].theirs.source["steps_offset"] for name in CONFIGS] == [1, 0, 3]


@pytest.mark.parametrize("cfg_scale", [4.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_picture_equals_diffusers(
    pipelines: dict[str, Sides], pipeline: str, scheduler: str, mode: str, cfg_scale: float
) -> None:
    sides = pipelines[pipeline]
    ours = paint_ours(sides, mode, scheduler, cfg_scale)
    theirs = paint_theirs(sides, mode, scheduler, cfg_scale)
    level = psnr_db(ours, theirs)
    sides.levels[f"{scheduler}, {mode}, cfg {cfg_scale:g}"] = level
    assert ours.std() > 5  # a picture, not a plain colour
    assert level >= BAR_DB


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheduler", MORE_SCHEDULERS)
def test_picture_of_further_samplers_equals_diffusers(
    pipelines: dict[str, Sides], scheduler: str, mode: str
) -> None:
    test_picture_equals_diffusers(pipelines, "epsilon_leading", scheduler, mode, 4.0)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_bar_rejects_one_step_more_another_seed_and_a_black_picture(
    pipelines: dict[str, Sides], pipeline: str
) -> None:
    sides = pipelines[pipeline]
    theirs = paint_theirs(sides, "text-to-image", "euler", 4.0)
    longer = paint_ours(sides, "text-to-image", "euler", 4.0, steps=STEPS + 1)
    other = paint_ours(sides, "text-to-image", "euler", 4.0, seed=SEED + 1)
    for wrong in (longer, other, np.zeros_like(theirs)):
        assert psnr_db(wrong, theirs) < BAR_DB - 10


@pytest.mark.parametrize("pipeline", ["demo", "v_trailing"])
def test_inpainting_at_full_strength_equals_diffusers(
    pipelines: dict[str, Sides], pipeline: str
) -> None:
    sides = pipelines[pipeline]
    ours = paint_ours(sides, "inpainting", "euler", 4.0, denoising_strength=1.0)
    theirs = paint_theirs(sides, "inpainting", "euler", 4.0, strength=1.0)
    assert psnr_db(ours, theirs) >= BAR_DB


@pytest.mark.parametrize("scheduler", ["euler_a", "dpm++sde_karras", "dpm++2m"])
def test_many_steps_equal_diffusers(pipelines: dict[str, Sides], scheduler: str) -> None:
    sides = pipelines["v_trailing"]
    ours = paint_ours(sides, "text-to-image", scheduler, 4.0, steps=25)
    theirs = paint_theirs(sides, "text-to-image", scheduler, 4.0, num_inference_steps=25)
    assert psnr_db(ours, theirs) >= BAR_DB


def test_each_picture_of_a_request_equals_its_own_seed(pipelines: dict[str, Sides]) -> None:
    sides = pipelines["demo"]
    fields = {"prompt": PROMPT, "steps": STEPS, "cfg_scale": 4.0, "scheduler": "euler_a",
              "w": WIDTH, "h": HEIGHT}  # fmt: skip
    outcome = sides.ours.generate(**fields, seed=SEED, num_images=3)
    for index, ours in enumerate(outcome.pictures):
        theirs = paint_theirs(
            sides, "text-to-image", "euler_a", 4.0, seed=SEED + index, negative_prompt=""
        )
        assert psnr_db(ours, theirs) >= BAR_DB


def test_worst_cases_are_above_the_bar(pipelines: dict[str, Sides]) -> None:
    for name, sides in pipelines.items():
        if sides.levels:
            case, level = min(sides.levels.items(), key=lambda item: item[1])
            sys.stdout.write(f"\n{name}: {len(sides.levels)} cases, worst {level:.1f} dB ({case})")
            assert level >= BAR_DB
