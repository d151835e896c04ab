"""SDXL and FLUX.1: a seed gives the picture diffusers gives, in every mode.

Tiny pipelines of the true classes with random weights, compared as `tests/test_parity.py` does.
The worst case of each pipeline is printed by the last test (``pytest -s``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from closeup.local import LocalModels
from closeup.sampler_names import resolve_sampler_name
from closeup.samplers import FLOW_SAMPLERS
from closeup.settings import Settings
from tests.diffusers_reference import (
    FLOW_SCHEDULERS,
    MORE_SCHEDULERS,
    SCHEDULERS,
    DiffusersReference,
    Pixels,
    psnr_db,
)
from tests.family_export import FAMILY_PIPELINES, export_families
from tests.toy_models import png, waves

BAR_DB = 65.0
SEED, STEPS, STRENGTH = 5, 4, 0.75
WIDTH, HEIGHT = 96, 64
PROMPT = "a photo of a woman in a park"
MODES = ("text-to-image", "image-to-image", "inpainting")


# What FLUX.1 accepts; `resolve_sampler_name` says what runs: `FLOW_SCHEDULERS` has it.
FLUX_NAMES = (
    "euler", "euler_a", "dpm++2m", "dpm++2m_karras", "dpm++sde", "dpm++sde_karras", "lcm", "tcd",
    "ddim", "heun", "unipc", "euler_karras", "euler_exponential", "euler_beta",
)  # fmt: skip


@dataclass(frozen=True)
class Sides:
    """The same weights on both sides, and how far apart they were: case -> dB."""

    ours: LocalModels
    theirs: DiffusersReference
    levels: dict[str, float] = field(default_factory=dict)
    painted: dict[tuple[str, str, float], Pixels] = field(default_factory=dict)

    def paint_theirs(self, mode: str, scheduler: str, arguments: Mapping[str, Any]) -> Pixels:
        """Paint with diffusers; several names have the same reference."""
        case = (mode, scheduler, float(arguments["guidance_scale"]))
        if case not in self.painted:
            self.painted[case] = self.theirs.paint(mode, scheduler, seed=SEED, **arguments)
        return self.painted[case]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Sides]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    exported = export_families(tmp_path_factory)
    with LocalModels(exported.repository, Settings()) as ours:
        yield {
            name: Sides(ours, DiffusersReference(exported.pipelines / name))
            for name in FAMILY_PIPELINES
        }
    torch.set_num_threads(threads)


def picture() -> Pixels:
    pixels: Pixels = np.asarray(waves(HEIGHT, WIDTH), np.uint8)
    return pixels


def mask() -> Pixels:
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    drawn[16:48, 24:72] = 255
    return drawn


def paint_both(
    sides: Sides,
    name: str,
    mode: str,
    scheduler: str,
    cfg_scale: float,
    ours_only: Mapping[str, Any] | None = None,
) -> tuple[Pixels, Pixels]:
    fields: dict[str, Any] = {
        "model": name, "prompt": PROMPT, "seed": SEED, "steps": STEPS, "cfg_scale": cfg_scale,
        "scheduler": scheduler, "w": WIDTH, "h": HEIGHT,
    }  # fmt: skip
    arguments: dict[str, Any] = {
        "prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": cfg_scale,
    }  # fmt: skip
    if mode != "text-to-image":
        fields |= {"input_image": png(picture()), "denoising_strength": STRENGTH}
        arguments |= {"image": Image.fromarray(picture()), "strength": STRENGTH}
    if mode != "image-to-image" or name.startswith("flux"):
        arguments |= {"width": WIDTH, "height": HEIGHT}
    if mode == "inpainting":
        fields["mask_image"] = png(mask())
        arguments["mask_image"] = Image.fromarray(mask())
    ours = sides.ours.generate(**{**fields, **(ours_only or {})}).pictures[0]
    runs, _ = resolve_sampler_name(scheduler, flow=name.startswith("flux"))
    return ours, sides.paint_theirs(mode, runs, arguments)


def check_parity(sides: Sides, name: str, mode: str, scheduler: str, cfg_scale: float) -> None:
    ours, theirs = paint_both(sides, name, mode, scheduler, cfg_scale)
    level = psnr_db(ours, theirs)
    sides.levels[f"{scheduler}, {mode}, cfg {cfg_scale:g}"] = level
    assert ours.std() > 5  # a picture, not a plain colour
    assert level >= BAR_DB


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheduler", [*SCHEDULERS, *MORE_SCHEDULERS])
def test_sdxl_picture_equals_diffusers(sides: dict[str, Sides], scheduler: str, mode: str) -> None:
    check_parity(sides["sdxl"], "sdxl", mode, scheduler, 4.0)


@pytest.mark.parametrize("mode", MODES)
def test_sdxl_picture_equals_diffusers_without_guidance(sides: dict[str, Sides], mode: str) -> None:
    check_parity(sides["sdxl"], "sdxl", mode, "euler", 1.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheduler", FLUX_NAMES)
def test_flux_dev_picture_equals_diffusers(
    sides: dict[str, Sides], scheduler: str, mode: str
) -> None:
    check_parity(sides["flux_dev"], "flux_dev", mode, scheduler, 3.5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheduler", ["euler", "dpm++2m", "heun"])
def test_flux_schnell_picture_equals_diffusers(
    sides: dict[str, Sides], scheduler: str, mode: str
) -> None:
    check_parity(sides["flux_schnell"], "flux_schnell", mode, scheduler, 3.5)


def test_reference_covers_every_sampler_that_flux_runs() -> None:
    assert {resolve_sampler_name(name, flow=True)[0] for name in FLUX_NAMES} == set(FLOW_SCHEDULERS)
    assert set(FLOW_SAMPLERS) <= set(FLOW_SCHEDULERS)


def test_bar_tells_the_flow_samplers_apart(sides: dict[str, Sides]) -> None:
    # Else a name mapped to the wrong one would pass.
    arguments = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": 3.5,
                 "width": WIDTH, "height": HEIGHT}  # fmt: skip
    painted = [
        sides["flux_dev"].paint_theirs("text-to-image", name, arguments) for name in FLOW_SCHEDULERS
    ]
    for first, second in combinations(painted, 2):
        assert psnr_db(first, second) < BAR_DB - 10


@pytest.mark.parametrize("name", FAMILY_PIPELINES)
def test_bar_rejects_one_step_more_and_another_seed(sides: dict[str, Sides], name: str) -> None:
    for wrong in ({"steps": STEPS + 1}, {"seed": SEED + 1}):
        ours, theirs = paint_both(sides[name], name, "text-to-image", "euler", 3.5, wrong)
        assert psnr_db(ours, theirs) < BAR_DB - 10


def test_guidance_embedding_and_size_ids_reach_the_network(sides: dict[str, Sides]) -> None:
    ours, theirs = paint_both(
        sides["flux_dev"], "flux_dev", "text-to-image", "euler", 3.5, {"cfg_scale": 1.5}
    )
    assert psnr_db(ours, theirs) < BAR_DB
    ours, theirs = paint_both(
        sides["sdxl"], "sdxl", "text-to-image", "euler", 4.0, {"negative_prompt": ""}
    )
    assert psnr_db(ours, theirs) < BAR_DB  # an empty negative prompt is not none: zeros


def test_sdxl_size_fields_equal_diffusers(sides: dict[str, Sides]) -> None:
    given = {"original_w": 300, "original_h": 200, "crop_x": 16, "crop_y": 8,
             "target_w": 128, "target_h": 112}  # fmt: skip
    ours, without = paint_both(sides["sdxl"], "sdxl", "text-to-image", "euler", 4.0, given)
    theirs = sides["sdxl"].theirs.paint(
        "text-to-image", "euler", seed=SEED, prompt=PROMPT, num_inference_steps=STEPS,
        guidance_scale=4.0, width=WIDTH, height=HEIGHT, original_size=(200, 300),
        crops_coords_top_left=(8, 16), target_size=(112, 128),
    )  # fmt: skip
    assert psnr_db(ours, theirs) >= BAR_DB
    assert psnr_db(without, theirs) < BAR_DB


def test_weighted_prompts_equal_diffusers_where_every_weight_is_one(
    sides: dict[str, Sides],
) -> None:
    plain = {"use_lpw": True}
    ours, theirs = paint_both(sides["sdxl"], "sdxl", "text-to-image", "euler", 4.0, plain)
    assert psnr_db(ours, theirs) >= BAR_DB
    weighted = {"use_lpw": True, "prompt": PROMPT.replace("woman", "(woman:1.6)")}
    ours, theirs = paint_both(sides["sdxl"], "sdxl", "text-to-image", "euler", 4.0, weighted)
    assert psnr_db(ours, theirs) < BAR_DB
    long = sides["sdxl"].ours.generate(
        prompt=", ".join([PROMPT] * 20), use_lpw=True, seed=SEED, steps=STEPS, w=WIDTH, h=HEIGHT,
        model="sdxl",
    ).pictures[0]  # fmt: skip
    assert long.std() > 5


def test_worst_cases_are_above_the_bar(sides: dict[str, Sides]) -> None:
    for name, of_pipeline in sides.items():
        levels = of_pipeline.levels
        if levels:
            case, level = min(levels.items(), key=lambda item: item[1])
            sys.stdout.write(f"\n{name}: {len(levels)} cases, worst {level:.1f} dB ({case})")
            assert level >= BAR_DB
