"""From checked options to what the graph runs: nothing is left open.

`closeup.options` checks single fields, `closeup.request_rules` what they say together; both
collect every problem before they raise, and all of it happens before any engine runs.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from closeup.canvas import SIDE_FIELDS, Canvas, open_canvas
from closeup.errors import RequestError
from closeup.faces import FaceOptions, FaceOrder
from closeup.fields import DEFAULT_MAX_FACES, FACE_SEPARATOR, MAX_SEED
from closeup.images import ImageFormat
from closeup.manifest import ModelManifest
from closeup.options import Options, Value, parse_flags, parse_options, shown
from closeup.prompt import LoraTag, parse_prompt
from closeup.request_rules import (
    SIZE_ID_FIELDS,
    Limits,
    Mode,
    Served,
    check_served,
    check_together,
    find_mode,
    wants_super_resolution,
)
from closeup.sampler_names import resolve_sampler_name
from closeup.samplers import default_sampler, recall_step_table

Pixels = npt.NDArray[np.uint8]

DEFAULT_DENOISING_STRENGTH = 0.8
DEFAULT_HIRES_STRENGTH = 0.3
DEFAULT_MIN_FACE_RATIO = 0.1
DEFAULT_FORMAT = "png"
DEFAULT_QUALITY = 92
#: What only a denoiser reads.
PAINTER_FIELDS = ("negative_prompt", "use_lpw", "steps", "cfg_scale", "scheduler")

__all__ = ["Limits", "Mode", "Request", "Served", "parse_options", "resolve_request"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Everything the graph needs; nothing is left open.

    Attributes:
        image: uint8 (height, width, 3), the input picture; None for text-to-image.
        mask: uint8 (height, width), 255 is repainted; only for inpainting.
        strength: of image-to-image and inpainting, 0..1.
        size_ids: SDXL's size fields that were given.
        face_prompts: one for all faces, or one a repainted face; the last serves all that follow.
        warnings: sentences for the client, e.g. about options without effect.
        The rest are the request fields of the same meaning.
    """

    mode: Mode
    model: ModelManifest
    prompt: str
    negative_prompt: str | None
    face_prompts: tuple[str, ...]
    loras: tuple[LoraTag, ...]
    num_images: int
    seed: int
    width: int
    height: int
    steps: int
    face_steps: int
    cfg_scale: float
    scheduler: str
    strength: float
    super_resolution: bool
    hires_fix: bool
    hires_strength: float
    inpaint_faces: bool
    use_lpw: bool
    faces: FaceOptions
    image: Pixels | None
    mask: Pixels | None
    size_ids: Mapping[str, int]
    image_format: ImageFormat
    image_quality: int
    raw: bool
    stages: bool
    previews: bool
    warnings: tuple[str, ...] = ()

    @property
    def seeds(self) -> list[int]:
        """One seed a picture: seed + i, wrapping at 2**32."""
        return [(self.seed + index) % (MAX_SEED + 1) for index in range(self.num_images)]


def resolve_request(options: Options, *, served: Served, streaming: bool) -> Request:
    """Fill in what the options leave open, for the model they name.

    Args:
        options: from `parse_options`.
        served: what the server has.
        streaming: the request came to `generate_stream`.

    Raises:
        RequestError: one sentence for each field that does not fit the others or the model.
    """
    model = _model(options, served.models)
    parsed = parse_prompt(str(options["prompt"]))
    options = {**parse_flags(parsed.flags), **options}
    mode = find_mode(options)
    check_together(options, mode, streaming)
    check_served(options, mode, parsed, model, served)
    canvas = open_canvas(options, mode, model, served.limits)
    facts, defaults = model.facts, model.defaults
    steps = int(_given(options, "steps", defaults.steps, facts.default_steps))
    named = _given(options, "scheduler", defaults.scheduler, default_sampler(model.scheduler))
    scheduler, note = resolve_sampler_name(str(named), flow=facts.flow)
    face_steps = int(options.get("face_steps", min(steps, model.face_steps or steps)))
    for name, count in (("steps", steps), ("face_steps", face_steps)):
        _check_steps(name, count, scheduler, model)
    return Request(
        mode=mode,
        model=model,
        prompt=parsed.text,
        negative_prompt=_optional_text(options, "negative_prompt"),
        face_prompts=_face_prompts(options, parsed.text + model.face_prompt_suffix),
        loras=parsed.loras,
        num_images=int(options.get("num_images", 1)),
        seed=int(options["seed"]) if "seed" in options else secrets.randbelow(MAX_SEED + 1),
        width=canvas.width,
        height=canvas.height,
        steps=steps,
        face_steps=face_steps,
        cfg_scale=_cfg_scale(options, model),
        scheduler=scheduler,
        strength=float(options.get("denoising_strength", DEFAULT_DENOISING_STRENGTH)),
        super_resolution=wants_super_resolution(options, mode),
        hires_fix=bool(options.get("hires_fix", False)),
        hires_strength=float(options.get("hires_denoising_strength", DEFAULT_HIRES_STRENGTH)),
        inpaint_faces=bool(options.get("inpaint_faces", False)),
        use_lpw=bool(options.get("use_lpw", False)),
        faces=_face_options(options),
        image=canvas.image,
        mask=canvas.mask,
        size_ids={name: int(options[name]) for name in SIZE_ID_FIELDS if name in options},
        image_format=cast(ImageFormat, options.get("image_format", DEFAULT_FORMAT)),
        image_quality=int(options.get("image_quality", DEFAULT_QUALITY)),
        raw=options.get("response_encoding") == "raw",
        stages=bool(options.get("stages", False)),
        previews=bool(options.get("previews", False)),
        warnings=_warnings(options, mode, model, canvas, note),
    )


def _check_steps(name: str, count: int, scheduler: str, model: ModelManifest) -> None:
    """Refuse, under the field's own name, what the sampler cannot do."""
    tokens = 1 if model.facts.flow else None  # their number only moves the noise levels
    try:
        recall_step_table(scheduler, model.scheduler, count, image_tokens=tokens)
    except RequestError as error:
        problems = {name if field == "steps" else field: text
                    for field, text in error.problems.items()}  # fmt: skip
        raise RequestError(problems) from error


def _optional_text(options: Options, name: str) -> str | None:
    return str(options[name]) if name in options else None


def _cfg_scale(options: Options, model: ModelManifest) -> float:
    family = model.facts.default_cfg_scale
    return float(_given(options, "cfg_scale", model.defaults.cfg_scale, family))


def _warnings(
    options: Options, mode: Mode, model: ModelManifest, canvas: Canvas, note: str | None
) -> tuple[str, ...]:
    warnings = [note] if note else []
    if options.get("super_resolution") is False and wants_super_resolution(options, mode):
        cause = "only_upscale" if mode is Mode.UPSCALE else "inpaint_faces"
        warnings.append(f"{cause} turned super_resolution on.")
    if canvas.stretched_from:
        across, down = canvas.stretched_from
        warnings.append(
            f"input_image is {across}x{down} and was stretched to {canvas.width}x{canvas.height}; "
            "give one of w and h, or neither, to keep its shape."
        )
    warnings += _idle_warnings(options, mode, model)
    if options.get("image_format", DEFAULT_FORMAT) == "png" and "image_quality" in options:
        warnings.append("image_quality has no effect on PNG.")
    step = model.facts.size_step_px
    uneven = [name for name in SIDE_FIELDS if int(options.get(name, 0)) % step]
    if uneven:
        warnings.append(
            f"rounded to multiples of {step}, as {model.facts.title} needs: {', '.join(uneven)}."
        )
    if _cfg_scale(options, model) <= 1 and options.get("negative_prompt"):
        warnings.append("negative_prompt has no effect at cfg_scale 1 and below.")
    return tuple(warnings)


def _idle_warnings(options: Options, mode: Mode, model: ModelManifest) -> list[str]:
    """Tell of options that change nothing."""
    warnings = []
    idle = [name for name in PAINTER_FIELDS if name in options]
    paints = mode is not Mode.UPSCALE or options.get("inpaint_faces") or options.get("hires_fix")
    if idle and not paints:
        warnings.append(f"only_upscale alone paints nothing; without effect: {', '.join(idle)}.")
    if model.facts.flow and not model.guidance_embeds and "cfg_scale" in options:
        warnings.append(f"cfg_scale has no effect on {model.name}, which is not guided.")
    return warnings


def _given(options: Options, name: str, of_model: Value | None, of_family: Value) -> Value:
    if name in options:
        return options[name]
    return of_family if of_model is None else of_model


def _model(options: Options, models: Mapping[str, ModelManifest]) -> ModelManifest:
    if not models:
        raise RequestError({"model": "this server has no model yet; run python -m export."})
    name = str(options.get("model", next(iter(models))))
    if name not in models:
        raise RequestError({"model": f"got {shown(name)}; served are {', '.join(models)}."})
    return models[name]


def _face_prompts(options: Options, usual: str) -> tuple[str, ...]:
    """The prompts of the faces: an empty part stands for the usual one."""
    if "face_prompt" not in options:
        return (usual,)
    parts = str(options["face_prompt"]).split(FACE_SEPARATOR)
    return tuple(part.strip() or usual for part in parts) if len(parts) > 1 else (parts[0],)


def _face_order(options: Options) -> FaceOrder:
    """The order asked for; where several prompts wait for faces, from left to right."""
    several = FACE_SEPARATOR in str(options.get("face_prompt", ""))
    usual = FaceOrder.LEFT_RIGHT if several else FaceOrder.AREA
    return FaceOrder(options.get("face_order", usual))


def _face_options(options: Options) -> FaceOptions:
    strength = options.get("face_denoising_strength")
    factor = options.get("face_crop_factor")
    return FaceOptions(
        max_faces=int(options.get("max_faces", DEFAULT_MAX_FACES)),
        min_face_ratio=float(options.get("min_face_ratio", DEFAULT_MIN_FACE_RATIO)),
        crop_factor=None if factor is None else float(factor),
        strength=None if strength is None else float(strength),
        order=_face_order(options),
    )
