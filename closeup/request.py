"""From what a client sent to what the graph runs: checks first, then resolution.

`parse_options` knows no model: it checks names, types and ranges. `resolve_request` knows the
served models and fills in what the request left open. Both collect every problem they find
before they raise, and both run before any engine does.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from closeup.errors import RequestError
from closeup.faces import FaceOptions, FaceOrder
from closeup.fields import (
    ASPECT_RATIOS,
    FIELD_BY_NAME,
    FIELDS,
    LEGACY_ASPECTS,
    MAX_SEED,
    Field,
    Kind,
)
from closeup.images import decode_image, floats_from_pixels, pixels_from_floats, resize
from closeup.manifest import ModelManifest
from closeup.prompt import LoraTag, parse_prompt
from closeup.samplers import default_sampler

Value = str | bytes | int | float | bool
Options = Mapping[str, Value]

# Triton keeps these for itself; they are no fields of ours.
RESERVED_PARAMETERS = ("binary_data_output", "headers", "priority", "sequence_", "timeout", "triton_")
REQUEST_ID = "id"  # the request's own id arrives as a parameter too
DEFAULT_DENOISING_STRENGTH = 0.8
DEFAULT_HIRES_STRENGTH = 0.3
DEFAULT_MAX_FACES = 32
DEFAULT_MIN_FACE_RATIO = 0.1
_FILE_STARTS = (b"\x89PNG", b"\xff\xd8", b"RIFF")
SIDE_FIELDS = ("w", "h")
FACE_FIELDS = (
    "face_prompt",
    "face_denoising_strength",
    "max_faces",
    "min_face_ratio",
    "face_crop_factor",
    "face_order",
)
_NO_URL = "is not fetched by this server: send the picture itself in {}."
_HINTS = {
    "input_image_url": _NO_URL.format("input_image"),
    "input_image_base64": "is called input_image here, which takes base64 as well.",
    "mask_image_url": _NO_URL.format("mask_image"),
    "text": "is called prompt here.",
}


class Mode(str, Enum):
    """Where the picture comes from."""

    TEXT = "text-to-image"
    IMAGE = "image-to-image"
    INPAINT = "inpainting"
    UPSCALE = "only_upscale"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Server options that bound a request.

    Attributes:
        max_pixels: width times height before super-resolution.
        max_input_pixels: width times height of `input_image`.
    """

    max_pixels: int = 2048 * 2048
    max_input_pixels: int = 4096 * 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Everything the graph needs; nothing is left open.

    Attributes:
        image: uint8 (height, width, 3), the input picture; None for text-to-image.
        mask: uint8 (height, width), 255 is repainted; only for inpainting.
        strength: of image-to-image and inpainting, 0..1.
        warnings: sentences for the client, e.g. about options without effect.
        The rest are the request fields of the same meaning.
    """

    mode: Mode
    model: ModelManifest
    prompt: str
    negative_prompt: str
    face_prompt: str
    loras: tuple[LoraTag, ...]
    num_images: int
    seed: int
    width: int
    height: int
    steps: int
    cfg_scale: float
    scheduler: str
    strength: float
    super_resolution: bool
    hires_fix: bool
    hires_strength: float
    inpaint_faces: bool
    faces: FaceOptions
    image: npt.NDArray[np.uint8] | None
    mask: npt.NDArray[np.uint8] | None
    image_format: str
    image_quality: int
    raw: bool
    stages: bool
    previews: bool
    warnings: tuple[str, ...] = ()

    @property
    def seeds(self) -> list[int]:
        """One seed a picture: seed + i, wrapping at 2**32."""
        return [(self.seed + index) % (MAX_SEED + 1) for index in range(self.num_images)]


@dataclass(slots=True)
class _Problems:
    found: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, sentence: str) -> None:
        self.found.setdefault(name, sentence)

    def raise_if_any(self) -> None:
        if self.found:
            raise RequestError(self.found)


def parse_options(values: Mapping[str, Any], parameters: Mapping[str, Any]) -> Options:
    """Check names, types and ranges of what arrived.

    Args:
        values: field name -> the tensor's one element (bytes for strings, numpy scalars).
        parameters: request parameters; anything Triton does not reserve is an unknown field.

    Returns:
        Field name -> str, bytes (pictures), int, float or bool; only the fields given.

    Raises:
        RequestError: one sentence for each field that is wrong.
    """
    problems = _Problems()
    for name in parameters:
        if name != REQUEST_ID and not name.startswith(RESERVED_PARAMETERS):
            problems.add(name, _unknown_field(name))
    options: dict[str, Value] = {}
    for name, raw in values.items():
        spec = FIELD_BY_NAME[name]
        try:
            options[name] = _checked(spec, _converted(spec, raw))
        except ValueError as error:
            problems.add(name, str(error))
    if "prompt" not in values:
        problems.add("prompt", "is missing; every request needs one.")
    problems.raise_if_any()
    return options


def _unknown_field(name: str) -> str:
    if name in _HINTS:
        return _HINTS[name]
    near = difflib.get_close_matches(name, [spec.name for spec in FIELDS], n=1)
    hint = f"did you mean {near[0]}?" if near else "leave it out."
    return f"is not a field of this server; {hint}"


def _converted(spec: Field, raw: Any) -> Value:
    if spec.kind is Kind.IMAGE:
        return _file_bytes(bytes(raw))
    if spec.kind is Kind.STRING:
        try:
            return raw.decode("utf-8") if isinstance(raw, bytes) else str(raw)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"is not valid UTF-8 (byte {error.start}); send text encoded as UTF-8."
            ) from error
    if spec.kind is Kind.BOOL:
        return bool(raw)
    return int(raw) if spec.kind is Kind.INT else float(raw)


def _file_bytes(data: bytes) -> bytes:
    """Return a picture file's bytes, given as they are, as base64 or as a data URI."""
    if data.startswith(_FILE_STARTS) or not data:
        return data
    text = data.partition(b",")[2] if data.startswith(b"data:") else data
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError("is neither a PNG, JPEG or WebP file nor base64 of one.") from error


def _checked(spec: Field, value: Value) -> Value:
    if spec.choices:
        if value not in spec.choices:
            near = difflib.get_close_matches(str(value), spec.choices, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"got {_shown(value)}{hint}; allowed are {spec.allowed}.")
        return value
    if isinstance(value, bytes):
        if not value:
            raise ValueError(f"is empty; expected {spec.allowed}.")
        return value
    if spec.minimum is None or spec.maximum is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _checked_text(spec, value)
    if not (math.isfinite(value) and spec.minimum <= value <= spec.maximum):
        raise ValueError(f"got {value:g}; allowed are {spec.allowed}.")
    if spec.multiple_of and value % spec.multiple_of:
        nearest = round(value / spec.multiple_of) * spec.multiple_of
        raise ValueError(f"got {value}; allowed are {spec.allowed}; the nearest is {nearest}.")
    return value


def _checked_text(spec: Field, value: str) -> str:
    assert spec.minimum is not None
    assert spec.maximum is not None
    if spec.minimum and not value.strip():
        raise ValueError(f"is empty; expected {spec.allowed}.")
    if len(value) > spec.maximum:
        raise ValueError(f"has {len(value)} characters; allowed are {spec.allowed}.")
    if "\0" in value:
        raise ValueError("contains a NUL character; leave it out.")
    return value


def _shown(value: Value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def resolve_request(
    options: Options,
    *,
    models: Mapping[str, ModelManifest],
    known_lora: Callable[[str], bool],
    has_upscaler: bool,
    has_face_detector: bool,
    limits: Limits,
    streaming: bool,
) -> Request:
    """Fill in what the options leave open, for the model they name.

    Args:
        options: from `parse_options`.
        models: the served pipelines, the default first.
        known_lora: whether a LoRA of this id is in the server's folder.
        has_upscaler: the repository has an `upscaler`.
        has_face_detector: the repository has a `face_detector`.
        limits: server options.
        streaming: the request came to `generate_stream`.

    Raises:
        RequestError: one sentence for each field that does not fit the others or the model.
    """
    problems = _Problems()
    model = _model(options, models)
    parsed = parse_prompt(str(options["prompt"]))
    options = {**_typed_flags(parsed.flags), **options}
    warnings: list[str] = []
    mode = _mode(options, problems)
    _check_loras(parsed.loras, model, known_lora, problems)
    _check_toggles(options, problems, streaming)
    inpaint_faces = bool(options.get("inpaint_faces", False))
    super_resolution = bool(options.get("super_resolution", False)) or inpaint_faces
    if inpaint_faces and options.get("super_resolution") is False:
        warnings.append("inpaint_faces turned super_resolution on.")
    if mode is Mode.UPSCALE and not super_resolution:
        super_resolution = True
    if super_resolution and not has_upscaler:
        problems.add("super_resolution", "this server has no upscaler; export one or leave it out.")
    if inpaint_faces and not has_face_detector:
        problems.add("inpaint_faces", "this server has no face detector; export one.")
    if not parsed.text.strip():
        problems.add("prompt", "has no words beside its tags; add some.")
    problems.raise_if_any()
    image, mask = _pictures(options, limits)
    width, height = _size(options, model, image, mode)
    if width * height > limits.max_pixels:
        problems.add("w", f"{width}x{height} are more than this server's limit of "
                          f"{limits.max_pixels} pixels; ask for a smaller picture.")  # fmt: skip
    problems.raise_if_any()
    if image is not None and image.shape[:2] != (height, width):
        image = _resized(image, (height, width))
        mask = None if mask is None else _resized(mask, (height, width))
    if options.get("image_format", "png") == "png" and "image_quality" in options:
        warnings.append("image_quality has no effect on PNG.")
    cfg_scale = float(_given(options, "cfg_scale", model.defaults.cfg_scale,
                             model.facts.default_cfg_scale))  # fmt: skip
    if cfg_scale <= 1 and options.get("negative_prompt"):
        warnings.append("negative_prompt has no effect at cfg_scale 1 and below.")
    return Request(
        mode=mode,
        model=model,
        prompt=parsed.text,
        negative_prompt=str(options.get("negative_prompt", "")),
        face_prompt=str(options.get("face_prompt", parsed.text + model.face_prompt_suffix)),
        loras=parsed.loras,
        num_images=int(options.get("num_images", 1)),
        seed=int(options["seed"]) if "seed" in options else secrets.randbelow(MAX_SEED + 1),
        width=width,
        height=height,
        steps=int(_given(options, "steps", model.defaults.steps, model.facts.default_steps)),
        cfg_scale=cfg_scale,
        scheduler=str(_given(options, "scheduler", model.defaults.scheduler,
                             default_sampler(model.scheduler))),
        strength=float(options.get("denoising_strength", DEFAULT_DENOISING_STRENGTH)),
        super_resolution=super_resolution,
        hires_fix=bool(options.get("hires_fix", False)),
        hires_strength=float(options.get("hires_denoising_strength", DEFAULT_HIRES_STRENGTH)),
        inpaint_faces=inpaint_faces,
        faces=_face_options(options),
        image=image,
        mask=mask,
        image_format=str(options.get("image_format", "png")),
        image_quality=int(options.get("image_quality", 92)),
        raw=options.get("response_encoding") == "raw",
        stages=bool(options.get("stages", False)),
        previews=bool(options.get("previews", False)),
        warnings=tuple(warnings),
    )  # fmt: skip


def _given(options: Options, name: str, of_model: Value | None, of_family: Value) -> Value:
    if name in options:
        return options[name]
    return of_family if of_model is None else of_model


def _model(options: Options, models: Mapping[str, ModelManifest]) -> ModelManifest:
    if not models:
        raise RequestError({"model": "this server has no model yet; run python -m export."})
    name = str(options.get("model", next(iter(models))))
    if name not in models:
        raise RequestError({"model": f"got {_shown(name)}; served are {', '.join(models)}."})
    return models[name]


def _typed_flags(flags: Mapping[str, str]) -> dict[str, Value]:
    """Flags inside the prompt, checked like fields; a field of the same name wins over them."""
    problems = _Problems()
    typed: dict[str, Value] = {}
    for name, text in flags.items():
        spec = FIELD_BY_NAME[name]
        try:
            raw: Value = text.lower() not in ("false", "0") if spec.kind is Kind.BOOL else text
            typed[name] = _checked(spec, _converted(spec, raw))
        except ValueError as error:
            problems.add(name, f"(in the prompt) {error}")
    problems.raise_if_any()
    return typed


def _mode(options: Options, problems: _Problems) -> Mode:
    has_image = "input_image" in options
    if options.get("only_upscale"):
        mode = Mode.UPSCALE
    elif "mask_image" in options:
        mode = Mode.INPAINT
    else:
        mode = Mode.IMAGE if has_image else Mode.TEXT
    needs_image = "needs input_image; send one or leave {} out."
    for name in ("only_upscale", "mask_image", "denoising_strength"):
        if options.get(name) not in (None, False) and not has_image:
            problems.add(name, needs_image.format(name))
    if mode is Mode.UPSCALE:
        for name in ("mask_image", "denoising_strength", "w", "h", "ar", "aspect_ratio"):
            if name in options:
                problems.add(name, "has no effect with only_upscale; leave it out.")
        if int(options.get("num_images", 1)) != 1:
            problems.add("num_images", "must be 1 with only_upscale.")
    return mode


def _check_toggles(options: Options, problems: _Problems, streaming: bool) -> None:
    if options.get("hires_fix") and not (
        options.get("super_resolution") or options.get("inpaint_faces")
    ):
        problems.add("hires_fix", "needs super_resolution; set super_resolution to true.")
    if "hires_denoising_strength" in options and not options.get("hires_fix"):
        problems.add("hires_denoising_strength", "needs hires_fix; set hires_fix to true.")
    for name in FACE_FIELDS:
        if name in options and not options.get("inpaint_faces"):
            problems.add(name, "needs inpaint_faces; set inpaint_faces to true.")
    if options.get("previews") and not streaming:
        problems.add("previews", "needs generate_stream; leave it out of generate.")
    if "aspect_ratio" in options and "ar" in options:
        problems.add("ar", "is the older spelling of aspect_ratio; send one of the two.")


def _check_loras(
    loras: tuple[LoraTag, ...],
    model: ModelManifest,
    known_lora: Callable[[str], bool],
    problems: _Problems,
) -> None:
    if loras and model.lora is None:
        problems.add("prompt", f"the model {model.name} was exported without LoRA inputs "
                               "(--lora-rank 0); take the <lora:...> tags out.")  # fmt: skip
        return
    for tag in loras:
        if not known_lora(tag.id):
            problems.add("prompt", f"there is no LoRA {_shown(tag.id)} in the server's folder; "
                                   "check the id or add the file.")  # fmt: skip


def _pictures(
    options: Options, limits: Limits
) -> tuple[npt.NDArray[np.uint8] | None, npt.NDArray[np.uint8] | None]:
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


def _resized(pixels: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    return pixels_from_floats(resize(floats_from_pixels(pixels), size))


def _decoded(options: Options, name: str, limits: Limits, mode: Any) -> npt.NDArray[np.uint8]:
    data = options[name]
    assert isinstance(data, bytes)
    return decode_image(data, field=name, max_pixels=limits.max_input_pixels, mode=mode)


def _size(
    options: Options, model: ModelManifest, image: npt.NDArray[np.uint8] | None, mode: Mode
) -> tuple[int, int]:
    """Width and height before super-resolution: w/h, then the ratio, the picture, the model."""
    step = model.facts.size_step_px
    width = int(_given(options, "w", model.defaults.width, model.native_px))
    height = int(_given(options, "h", model.defaults.height, model.native_px))
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


def _face_options(options: Options) -> FaceOptions:
    strength = options.get("face_denoising_strength")
    factor = options.get("face_crop_factor")
    return FaceOptions(
        max_faces=int(options.get("max_faces", DEFAULT_MAX_FACES)),
        min_face_ratio=float(options.get("min_face_ratio", DEFAULT_MIN_FACE_RATIO)),
        crop_factor=None if factor is None else float(factor),
        strength=None if strength is None else float(strength),
        order=FaceOrder(options.get("face_order", FaceOrder.AREA)),
    )
