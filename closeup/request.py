"""From checked options to what the graph runs: nothing is left open.

`closeup.options` checks single fields, `closeup.request_rules` what they say together; both
collect every problem before they raise, and all of it happens before any engine runs.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from closeup.errors import RequestError
from closeup.faces import FaceOptions, FaceOrder
from closeup.fields import (
    ASPECT_RATIOS,
    FACE_SEPARATOR,
    FIELD_BY_NAME,
    LEGACY_ASPECTS,
    MAX_SEED,
)
from closeup.images import ImageFormat, decode_image, floats_from_pixels, pixels_from_floats, resize
from closeup.manifest import ModelManifest
from closeup.options import Options, Value, parse_flags, parse_options, shown
from closeup.prompt import LoraTag, parse_prompt
from closeup.request_rules import (
    SIZE_ID_FIELDS,
    Limits,
    Mode,
    Served,
    check_engine_sizes,
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
DEFAULT_MAX_FACES = 32
DEFAULT_MIN_FACE_RATIO = 0.1
DEFAULT_FORMAT = "png"
DEFAULT_QUALITY = 92
SIDE_FIELDS = ("w", "h")

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
    image, mask, (width, height) = _canvas(options, mode, model, served.limits)
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
        width=width,
        height=height,
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
        image=image,
        mask=mask,
        size_ids={name: int(options[name]) for name in SIZE_ID_FIELDS if name in options},
        image_format=cast(ImageFormat, options.get("image_format", DEFAULT_FORMAT)),
        image_quality=int(options.get("image_quality", DEFAULT_QUALITY)),
        raw=options.get("response_encoding") == "raw",
        stages=bool(options.get("stages", False)),
        previews=bool(options.get("previews", False)),
        warnings=_warnings(options, model, note),
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


def _warnings(options: Options, model: ModelManifest, note: str | None) -> tuple[str, ...]:
    warnings = [note] if note else []
    if options.get("inpaint_faces") and options.get("super_resolution") is False:
        warnings.append("inpaint_faces turned super_resolution on.")
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


def _canvas(
    options: Options, mode: Mode, model: ModelManifest, limits: Limits
) -> tuple[Pixels | None, Pixels | None, tuple[int, int]]:
    """Return the input picture and the mask at the size to paint, and (width, height)."""
    image, mask = _pictures(options, limits)
    width, height = _size(options, model, image, mode)
    if width * height > limits.max_pixels:
        raise RequestError(
            {
                "w": f"{width}x{height} are more than this server's limit of "
                f"{limits.max_pixels} pixels; ask for a smaller picture."
            }
        )
    check_engine_sizes(options, mode, model, width=width, height=height)
    if image is not None and image.shape[:2] != (height, width):
        image = _resized(image, (height, width))
        mask = None if mask is None else _resized(mask, (height, width))
    return image, mask, (width, height)


def _pictures(options: Options, limits: Limits) -> tuple[Pixels | None, Pixels | None]:
    if "input_image" not in options:
        return None, None
    image = _decoded(options, "input_image", limits, "rgb")
    if "mask_image" not in options:
        return image, None
    mask = _decoded(options, "mask_image", limits, "mask")
    if mask.shape != image.shape[:2]:
        given, wanted = (f"{a.shape[1]}x{a.shape[0]}" for a in (mask, image))
        raise RequestError(
            {"mask_image": f"is {given}, input_image is {wanted}; send them in the same size."}
        )
    return image, mask


def _resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    return pixels_from_floats(resize(floats_from_pixels(pixels), size))


def _decoded(options: Options, name: str, limits: Limits, mode: Any) -> Pixels:
    data = options[name]
    assert isinstance(data, bytes)
    return decode_image(data, field=name, max_pixels=limits.max_input_pixels, mode=mode)


def _size(
    options: Options, model: ModelManifest, image: Pixels | None, mode: Mode
) -> tuple[int, int]:
    """Width and height before super-resolution: w/h, then the ratio, the picture, the model."""
    step = model.facts.size_step_px
    native = model.native_px
    width = _fit(int(_given(options, "w", model.defaults.width, native)), step)
    height = _fit(int(_given(options, "h", model.defaults.height, native)), step)
    if image is not None:
        given_h, given_w = image.shape[:2]
        if mode is Mode.UPSCALE:
            return given_w, given_h
        if not any(name in options for name in SIDE_FIELDS):
            width, height = (_fit(side, step) for side in (given_w, given_h))
    ratio = options.get("aspect_ratio") or LEGACY_ASPECTS.get(str(options.get("ar")))
    if ratio and not any(name in options for name in SIDE_FIELDS):
        across, down = ASPECT_RATIOS[str(ratio)]
        area = width * height
        width = _fit(math.sqrt(area * across / down), step)
        height = _fit(math.sqrt(area * down / across), step)
    return width, height


def _fit(side: float, step: int) -> int:
    side_field = FIELD_BY_NAME["w"]
    assert side_field.minimum is not None
    assert side_field.maximum is not None
    nearest = int(side / step + 0.5) * step
    return int(min(max(nearest, side_field.minimum), side_field.maximum))


def _face_prompts(options: Options, usual: str) -> tuple[str, ...]:
    """The prompts of the faces: an empty part stands for the usual one."""
    parts = str(options.get("face_prompt", usual)).split(FACE_SEPARATOR)
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
