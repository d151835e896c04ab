"""The answer's `info` and the parameters written into the picture files."""

from __future__ import annotations

from typing import Any

from closeup import __version__
from closeup.graph import Outcome
from closeup.request import Request
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
    """Return the metadata of one picture file: how to make it again."""
    loras = "".join(f" <lora:{tag.id}:{tag.weight:g}>" for tag in request.loras)
    settings = {
        "Steps": request.steps,
        "Sampler": request.scheduler,
        "CFG scale": request.cfg_scale,
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        "Model": request.model.name,
        "Super resolution": request.super_resolution,
        "Face inpainting": request.inpaint_faces,
        "Version": f"closeup {__version__}",
    }
    lines = [request.prompt + loras]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return {"parameters": "\n".join(lines)}
