"""SDXL and FLUX.1: a seed gives the picture diffusers gives, in every mode.

Tiny pipelines of the true classes with random weights, compared as `tests/test_parity.py` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from closeup.local import LocalModels
from closeup.settings import Settings
from export.__main__ import main as export_main
from tests.diffusers_reference import (
    FLOW_SCHEDULERS,
    MORE_SCHEDULERS,
    SCHEDULERS,
    DiffusersReference,
    Pixels,
    psnr_db,
)
from tests.tiny_pipelines import write_tiny_flux, write_tiny_sdxl
from tests.toy_models import png, waves

BAR_DB = 65.0
SEED, STEPS, STRENGTH = 5, 4, 0.75
WIDTH, HEIGHT = 96, 64
PROMPT = "a photo of a woman in a park"
MODES = ("text-to-image", "image-to-image", "inpainting")
PIPELINES = ("sdxl", "flux_dev", "flux_schnell")


@dataclass(frozen=True)
class Sides:
    """The same weights on both sides."""

    ours: LocalModels
    theirs: DiffusersReference


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Sides]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("families")
    write_tiny_sdxl(folder / "sdxl")
    write_tiny_flux(folder / "flux_dev")
    write_tiny_flux(folder / "flux_schnell", guidance_embeds=False)
    repository = folder / "repository"
    with ExitStack() as stack:
        made = {}
        for name in PIPELINES:
            facts = json.dumps({"native_px": 64})
            (folder / name / "closeup.json").write_text(facts, encoding="utf-8")
            arguments = ["--model", str(folder / name), "--name", name, "--repository",
                         str(repository), "--lora-rank", "4", "--max-batch", "4"]  # fmt: skip
            assert export_main(arguments) == 0
        ours = stack.enter_context(LocalModels(repository, Settings()))
        for name in PIPELINES:
            made[name] = Sides(ours, DiffusersReference(folder / name))
        yield made
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
    return ours, sides.theirs.paint(mode, scheduler, seed=SEED, **arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheduler", [*SCHEDULERS, *MORE_SCHEDULERS])
def test_sdxl_picture_equals_diffusers(
    sides: dict[str, Sides], scheduler: str, mode: str, record_property: Any
) -> None:
    ours, theirs = paint_both(sides["sdxl"], "sdxl", mode, scheduler, 4.0)
    record_property("psnr_db", round(psnr_db(ours, theirs), 1))
    assert ours.std() > 5
    assert psnr_db(ours, theirs) >= BAR_DB


@pytest.mark.parametrize("mode", MODES)
def test_sdxl_picture_equals_diffusers_without_guidance(sides: dict[str, Sides], mode: str) -> None:
    ours, theirs = paint_both(sides["sdxl"], "sdxl", mode, "euler", 1.0)
    assert psnr_db(ours, theirs) >= BAR_DB


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["flux_dev", "flux_schnell"])
def test_flux_picture_equals_diffusers(sides: dict[str, Sides], name: str, mode: str) -> None:
    ours, theirs = paint_both(sides[name], name, mode, "euler", 3.5)
    assert ours.std() > 5
    assert psnr_db(ours, theirs) >= BAR_DB


def test_flux_dpm_picture_equals_diffusers(sides: dict[str, Sides]) -> None:
    assert set(FLOW_SCHEDULERS) == {"euler", "dpm++2m"}
    ours, theirs = paint_both(sides["flux_dev"], "flux_dev", "text-to-image", "dpm++2m", 3.5)
    assert psnr_db(ours, theirs) >= BAR_DB


@pytest.mark.parametrize("name", PIPELINES)
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
