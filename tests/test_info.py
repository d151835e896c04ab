"""The metadata of a picture file is enough to ask for the picture again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from closeup.info import picture_parameters
from closeup.request import Mode
from tests.pictures import png
from tests.test_request import resolve

_FIELDS: dict[str, tuple[str, Callable[[str], object]]] = {
    "Steps": ("steps", int),
    "Sampler": ("scheduler", str),
    "CFG scale": ("cfg_scale", float),
    "Seed": ("seed", int),
    "Denoising strength": ("denoising_strength", float),
    "Hires denoising strength": ("hires_denoising_strength", float),
    "Face steps": ("face_steps", int),
    "Face denoising strength": ("face_denoising_strength", float),
    "Face crop factor": ("face_crop_factor", float),
    "Min face ratio": ("min_face_ratio", float),
    "Max faces": ("max_faces", int),
    "Face order": ("face_order", str),
    "Face prompt": ("face_prompt", str),
    "Long prompt weighting": ("use_lpw", "True".__eq__),
    "Super resolution": ("super_resolution", "True".__eq__),
    "Face inpainting": ("inpaint_faces", "True".__eq__),
}
PLAIN: dict[str, Any] = {"prompt": "a man, smiling: in a park", "seed": 7}
EVERYTHING: dict[str, Any] = {
    "prompt": "a <lora:style:0.5> couple",
    "negative_prompt": "blurry, ugly",
    "seed": 7,
    "steps": 12,
    "cfg_scale": 3.5,
    "scheduler": "dpm++2m_karras",
    "w": 64,
    "h": 128,
    "use_lpw": True,
    "super_resolution": True,
    "hires_fix": True,
    "hires_denoising_strength": 0.4,
    "inpaint_faces": True,
    "face_prompt": 'a "tall" woman, smiling [SEP] a man',
    "face_steps": 9,
    "face_denoising_strength": 0.45,
    "face_crop_factor": 2.5,
    "face_order": "score",
    "min_face_ratio": 0.2,
    "max_faces": 3,
}
FACES: dict[str, Any] = {**PLAIN, "inpaint_faces": True}


def _fields_of(text: str) -> dict[str, Any]:
    """Read a picture's parameters as another program would, into request fields."""
    prompt, *negative, line = text.split("\n")
    pairs = re.findall(r'(\w[\w ]*): ("(?:[^"\\]|\\.)*"|[^,]+)(?:, |$)', line)
    found = {key: json.loads(v) if v.startswith('"') else v for key, v in pairs}
    fields: dict[str, Any] = {"prompt": prompt}
    if negative:
        fields["negative_prompt"] = negative[0].removeprefix("Negative prompt: ")
    fields["w"], fields["h"] = (int(side) for side in found.pop("Size").split("x"))
    fields["hires_fix"] = "Hires denoising strength" in found
    for key, value in found.items():
        if key in _FIELDS:
            name, kind = _FIELDS[key]
            fields[name] = kind(value)
    return fields


@pytest.mark.parametrize("given", [PLAIN, FACES, EVERYTHING], ids=["plain", "faces", "everything"])
def test_a_pictures_metadata_makes_the_same_request_when_it_is_sent_again(
    given: dict[str, Any],
) -> None:
    first = resolve(**given)
    text = picture_parameters(first, first.seed)["parameters"]
    again = resolve(**_fields_of(text))
    # Where a tag stood in the prompt leaves a space behind.
    differing = [
        name
        for name in first.__slots__
        if getattr(first, name) != getattr(again, name) and name not in ("warnings", "prompt")
    ]
    assert differing == []
    assert again.prompt.split() == first.prompt.split()
    assert picture_parameters(again, again.seed)["parameters"] == text


def test_what_the_face_pass_chose_by_itself_is_not_in_the_metadata() -> None:
    text = picture_parameters(resolve(**FACES), 7)["parameters"]
    assert "Face steps" in text
    for absent in ("Face prompt", "Face denoising strength", "Face crop factor", "Denoising"):
        assert absent not in text
    assert "Face steps" not in picture_parameters(resolve(**PLAIN), 7)["parameters"]


def test_metadata_says_how_much_was_repainted_when_a_picture_came_with_the_request() -> None:
    request = resolve(prompt="a man", input_image=png(64, 64), denoising_strength=0.4)
    assert request.mode is Mode.IMAGE
    text = picture_parameters(request, 7)["parameters"]
    assert "Mode: image-to-image, Denoising strength: 0.4" in text
