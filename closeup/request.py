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
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from closeup.errors import RequestError
from closeup.faces import FaceOptions, FaceOrder
from closeup.families import Family
from closeup.fields import (
    ASPECT_RATIOS,
    FIELD_BY_NAME,
    FIELDS,
    LEGACY_ASPECTS,
    MAX_SEED,
    Field,
    Kind,
)
from closeup.images import ImageFormat, decode_image, floats_from_pixels, pixels_from_floats, resize
from closeup.manifest import ModelManifest
from closeup.prompt import LoraTag, ParsedPrompt, parse_prompt
from closeup.samplers import build_step_table, default_sampler
from closeup.weighted_prompt import parse_weights

Value = str | bytes | int | float | bool
Options = Mapping[str, Value]
Pixels = npt.NDArray[np.uint8]

# Triton keeps these for itself; they are no fields of ours.
RESERVED_PARAMETERS = (
    "binary_data_output",
    "headers",
    "priority",
    "sequence_",
    "timeout",
    "triton_",
)
REQUEST_ID = "id"  # the request's own id arrives as a parameter too
DEFAULT_DENOISING_STRENGTH = 0.8
DEFAULT_HIRES_STRENGTH = 0.3
DEFAULT_MAX_FACES = 32
DEFAULT_FORMAT = "png"
DEFAULT_QUALITY = 92
DEFAULT_MIN_FACE_RATIO = 0.1
_FILE_STARTS = (b"\x89PNG", b"\xff\xd8", b"RIFF")
SIDE_FIELDS = ("w", "h")
IMAGE_FIELDS = ("only_upscale", "mask_image", "denoising_strength")
PAINT_FIELDS = ("mask_image", "denoising_strength", "w", "h", "ar", "aspect_ratio")
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
    negative_prompt: str | None
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
    use_lpw: bool
    faces: FaceOptions
    image: Pixels | None
    mask: Pixels | None
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What a server has, as far as requests must know.

    Attributes:
        models: the pipelines, the default first.
        known_lora: whether a LoRA of this id is in the server's folder.
        has_upscaler: the repository has an `upscaler`.
        has_face_detector: the repository has a `face_detector`.
        limits: server options.
    """

    models: Mapping[str, ModelManifest]
    known_lora: Callable[[str], bool]
    has_upscaler: bool
    has_face_detector: bool
    limits: Limits = field(default_factory=Limits)


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
    options = {**_typed_flags(parsed.flags), **options}
    mode = _mode(options)
    _check_together(options, mode, streaming)
    _check_served(options, mode, parsed, model, served)
    image, mask, (width, height) = _canvas(options, mode, model, served.limits)
    facts, defaults = model.facts, model.defaults
    steps = int(_given(options, "steps", defaults.steps, facts.default_steps))
    scheduler = str(
        _given(options, "scheduler", defaults.scheduler, default_sampler(model.scheduler))
    )
    build_step_table(scheduler, model.scheduler, steps)  # refuses what the sampler cannot do
    return Request(
        mode=mode,
        model=model,
        prompt=parsed.text,
        negative_prompt=_optional_text(options, "negative_prompt"),
        face_prompt=str(options.get("face_prompt", parsed.text + model.face_prompt_suffix)),
        loras=parsed.loras,
        num_images=int(options.get("num_images", 1)),
        seed=int(options["seed"]) if "seed" in options else secrets.randbelow(MAX_SEED + 1),
        width=width,
        height=height,
        steps=steps,
        cfg_scale=_cfg_scale(options, model),
        scheduler=scheduler,
        strength=float(options.get("denoising_strength", DEFAULT_DENOISING_STRENGTH)),
        super_resolution=_wants_super_resolution(options, mode),
        hires_fix=bool(options.get("hires_fix", False)),
        hires_strength=float(options.get("hires_denoising_strength", DEFAULT_HIRES_STRENGTH)),
        inpaint_faces=bool(options.get("inpaint_faces", False)),
        use_lpw=bool(options.get("use_lpw", False)),
        faces=_face_options(options),
        image=image,
        mask=mask,
        image_format=cast(ImageFormat, options.get("image_format", DEFAULT_FORMAT)),
        image_quality=int(options.get("image_quality", DEFAULT_QUALITY)),
        raw=options.get("response_encoding") == "raw",
        stages=bool(options.get("stages", False)),
        previews=bool(options.get("previews", False)),
        warnings=_warnings(options, model),
    )


def _optional_text(options: Options, name: str) -> str | None:
    return str(options[name]) if name in options else None


def _cfg_scale(options: Options, model: ModelManifest) -> float:
    family = model.facts.default_cfg_scale
    return float(_given(options, "cfg_scale", model.defaults.cfg_scale, family))


def _wants_super_resolution(options: Options, mode: Mode) -> bool:
    named = options.get("super_resolution") or options.get("inpaint_faces")
    return bool(named) or mode is Mode.UPSCALE


def _warnings(options: Options, model: ModelManifest) -> tuple[str, ...]:
    warnings = []
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


def _mode(options: Options) -> Mode:
    if options.get("only_upscale"):
        return Mode.UPSCALE
    if "mask_image" in options:
        return Mode.INPAINT
    return Mode.IMAGE if "input_image" in options else Mode.TEXT


def _check_together(options: Options, mode: Mode, streaming: bool) -> None:
    """Refuse fields that have no effect beside the others: accepted options are used."""
    has_image = "input_image" in options
    upscaling = mode is Mode.UPSCALE
    enlarging = _wants_super_resolution(options, mode)
    useless = "has no effect with only_upscale; leave it out."
    rules = (  # fields, whether they may be given, what to say otherwise
        (IMAGE_FIELDS, has_image, "needs input_image; send one or leave it out."),
        (PAINT_FIELDS, not upscaling, useless),
        (("hires_fix",), enlarging, "needs super_resolution; set super_resolution to true."),
        (
            ("hires_denoising_strength",),
            bool(options.get("hires_fix")),
            "needs hires_fix; set hires_fix to true.",
        ),
        (
            FACE_FIELDS,
            bool(options.get("inpaint_faces")),
            "needs inpaint_faces; set inpaint_faces to true.",
        ),
        (("previews",), streaming, "needs generate_stream; leave it out of generate."),
        (
            ("ar",),
            "aspect_ratio" not in options,
            "is the older spelling of aspect_ratio; send one of the two.",
        ),
    )
    problems = _Problems()
    for names, allowed, sentence in rules:
        for name in names:
            if not allowed and name in options and options[name] is not False:
                problems.add(name, sentence)
    if upscaling and int(options.get("num_images", 1)) != 1:
        problems.add("num_images", "must be 1 with only_upscale.")
    problems.raise_if_any()


def _check_served(
    options: Options, mode: Mode, parsed: ParsedPrompt, model: ModelManifest, served: Served
) -> None:
    """Refuse what this server, or this model, does not have."""
    problems = _Problems()
    if parsed.loras and model.lora is None:
        problems.add(
            "prompt",
            f"the model {model.name} was exported without LoRA inputs (--lora-rank 0); take the "
            "<lora:...> tags out.",
        )
    for tag in parsed.loras:
        if not served.known_lora(tag.id):
            problems.add(
                "prompt",
                f"there is no LoRA {_shown(tag.id)} in the server's folder; check the id or add "
                "the file.",
            )
    _check_family(options, model.facts, problems)
    for name in ("negative_prompt", "face_prompt"):
        if _has_tags(str(options.get(name, "")), name):
            problems.add(name, "takes no tags or flags; put them into prompt.")
    if not parsed.text.strip():
        problems.add("prompt", "has no words beside its tags; add some.")
    if _wants_super_resolution(options, mode) and not served.has_upscaler:
        problems.add("super_resolution", "this server has no upscaler; export one or leave it out.")
    if options.get("inpaint_faces") and not served.has_face_detector:
        problems.add("inpaint_faces", "this server has no face detector; export one.")
    problems.raise_if_any()
    for name in ("prompt", "negative_prompt", "face_prompt") * bool(options.get("use_lpw")):
        parse_weights(str(options.get(name, "")), field_name=name)


def _check_family(options: Options, facts: Family, problems: _Problems) -> None:
    if options.get("negative_prompt") and not facts.negative_prompt:
        problems.add("negative_prompt", f"{facts.title} takes none; leave it out.")
    if options.get("use_lpw") and facts.flow:
        problems.add("use_lpw", f"{facts.title} takes no weighted prompts; leave it out.")
    below = facts.cfg_scale_below
    if below is not None and float(options.get("cfg_scale", 0)) >= below:
        problems.add(
            "cfg_scale",
            f"got {float(options['cfg_scale']):g}; {facts.title} allows 0 to less than {below:g}.",
        )


def _has_tags(text: str, name: str) -> bool:
    parsed = parse_prompt(text, field_name=name)
    return bool(parsed.loras or parsed.flags)


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
