"""The answer's `info` and the parameters written into the picture files."""

from __future__ import annotations

import json
from typing import Any

from closeup import __version__
from closeup.fields import FACE_SEPARATOR
from closeup.graph import Outcome
from closeup.request import Request
from closeup.request_rules import Mode
from closeup.run import Run


def build_info(run: Run, outcome: Outcome, request_id: str) -> dict[str, Any]:
    """Return what the output `info` says, ready for JSON.

    Args:
        run: the finished run.
        outcome: its pictures and face reports.
        request_id: the id in the server's log.
    """
    request = run.request
    height, width = outcome.pictures[0].shape[:2]
    return {
        "id": request_id,
        "model": request.model.name,
        "mode": request.mode.value,
        "seed": request.seed,
        "seeds": request.seeds,
        "generated_size": [request.width, request.height],
        "size": [width, height],
        "steps": request.steps,
        "face_steps": request.face_steps,
        "cfg_scale": request.cfg_scale,
        "scheduler": request.scheduler,
        "loras": [{"id": tag.id, "weight": tag.weight} for tag in request.loras],
        "images": [
            {
                "seed": seed,
                "width": pixels.shape[1],
                "height": pixels.shape[0],
                "faces": faces,
            }
            for seed, pixels, faces in zip(
                request.seeds, outcome.pictures, outcome.faces, strict=True
            )
        ],
        "stage_images": [
            {"image": index, "stage": stage}
            for stage, pictures in outcome.stages.items()
            for index in range(len(pictures))
        ],
        "timings_ms": {name: round(ms, 1) for name, ms in run.timings_ms.items()},
        "usage": dict(run.usage),
        "warnings": list(run.warnings),
    }


def picture_parameters(request: Request, seed: int) -> dict[str, str]:
    """Return the metadata of one picture file: what to ask for to make it again.

    One text in the layout that other programs read: the prompt, the negative prompt, and
    ``Name: value`` pairs; a value that would break the line is a JSON string. A picture or mask
    that came with the request is named by its mode alone.
    """
    loras = "".join(f" <lora:{tag.id}:{tag.weight:g}>" for tag in request.loras)
    settings: dict[str, Any] = {
        "Steps": request.steps,
        "Sampler": request.scheduler,
        "CFG scale": request.cfg_scale,
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        "Model": request.model.name,
    }
    if request.mode is not Mode.TEXT:
        settings["Mode"] = request.mode.value
    if request.mode in (Mode.IMAGE, Mode.INPAINT):
        settings["Denoising strength"] = request.strength
    settings |= dict(request.size_ids)
    if request.use_lpw:
        settings["Long prompt weighting"] = True
    settings["Super resolution"] = request.super_resolution
    if request.hires_fix:
        settings["Hires denoising strength"] = request.hires_strength
    settings["Face inpainting"] = request.inpaint_faces
    if request.inpaint_faces:
        settings |= _face_settings(request)
    settings["Version"] = f"closeup {__version__}"
    lines = [request.prompt + loras]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {_value(value)}" for name, value in settings.items()))
    return {"parameters": "\n".join(lines)}


def _face_settings(request: Request) -> dict[str, Any]:
    """What the face pass ran with; what it chose by itself is left out."""
    faces = request.faces
    settings = {
        "Face steps": request.face_steps,
        "Face denoising strength": faces.strength,
        "Face crop factor": faces.crop_factor,
        "Min face ratio": faces.min_face_ratio,
        "Max faces": faces.max_faces,
        "Face order": faces.order.value,
    }
    if request.face_prompts != (request.prompt + request.model.face_prompt_suffix,):
        settings["Face prompt"] = f" {FACE_SEPARATOR} ".join(request.face_prompts)
    return {name: value for name, value in settings.items() if value is not None}


def _value(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:"\n') else text
