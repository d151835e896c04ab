"""Which fields fit together, the model and the server: everything that needs no pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from closeup.errors import RequestError
from closeup.families import Family
from closeup.fields import DEFAULT_MAX_FACES, FACE_SEPARATOR
from closeup.manifest import ModelManifest
from closeup.options import Options, Problems, shown
from closeup.prompt import ParsedPrompt, parse_prompt
from closeup.upscale import sr_factor
from closeup.weighted_prompt import parse_weights

IMAGE_FIELDS = ("only_upscale", "mask_image", "denoising_strength")
PAINT_FIELDS = ("mask_image", "denoising_strength", "w", "h", "ar", "aspect_ratio")
SIZE_ID_FIELDS = ("original_w", "original_h", "crop_x", "crop_y", "target_w", "target_h")
MAX_SIDES = {"jpeg": 65500, "webp": 16383}
"""The longest side, px, that a file format holds."""
FACE_FIELDS = (
    "face_prompt",
    "face_denoising_strength",
    "face_steps",
    "max_faces",
    "min_face_ratio",
    "face_crop_factor",
    "face_order",
)


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
        max_pixels: width times height before super-resolution, and of what `hires_fix` repaints.
        max_input_pixels: width times height of `input_image`.
    """

    max_pixels: int = 2048 * 2048
    max_input_pixels: int = 4096 * 4096


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


def find_mode(options: Options) -> Mode:
    """Return where the picture comes from."""
    if options.get("only_upscale"):
        return Mode.UPSCALE
    if "mask_image" in options:
        return Mode.INPAINT
    return Mode.IMAGE if "input_image" in options else Mode.TEXT


def wants_super_resolution(options: Options, mode: Mode) -> bool:
    """Whether the picture is to be enlarged; the face pass and only_upscale need it."""
    named = options.get("super_resolution") or options.get("inpaint_faces")
    return bool(named) or mode is Mode.UPSCALE


def check_together(options: Options, mode: Mode, streaming: bool) -> None:
    """Refuse fields that have no effect beside the others: accepted options are used."""
    has_image = "input_image" in options
    upscaling = mode is Mode.UPSCALE
    enlarging = wants_super_resolution(options, mode)
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
    problems = Problems()
    for names, allowed, sentence in rules:
        for name in names:
            if not allowed and name in options and options[name] is not False:
                problems.add(name, sentence)
    if upscaling and int(options.get("num_images", 1)) != 1:
        problems.add("num_images", "must be 1 with only_upscale.")
    problems.raise_if_any()


def check_served(
    options: Options, mode: Mode, parsed: ParsedPrompt, model: ModelManifest, served: Served
) -> None:
    """Refuse what this server, or this model, does not have."""
    problems = Problems()
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
                f"there is no LoRA {shown(tag.id)} in the server's folder; check the id or add "
                "the file.",
            )
    _check_family(options, model.facts, problems)
    for name in ("negative_prompt", "face_prompt"):
        if _has_tags(str(options.get(name, "")), name):
            problems.add(name, "takes no tags or flags; put them into prompt.")
    if not parsed.text.strip():
        problems.add("prompt", "has no words beside its tags; add some.")
    if wants_super_resolution(options, mode) and not served.has_upscaler:
        problems.add("super_resolution", "this server has no upscaler; export one or leave it out.")
    if options.get("inpaint_faces") and not served.has_face_detector:
        problems.add("inpaint_faces", "this server has no face detector; export one.")
    _check_face_prompts(options, problems)
    problems.raise_if_any()
    if options.get("use_lpw"):
        _check_weights(options)


def _check_face_prompts(options: Options, problems: Problems) -> None:
    """Refuse more prompts than faces: each is encoded before any face is found."""
    most = max(1, int(options.get("max_faces", DEFAULT_MAX_FACES)))
    named = str(options.get("face_prompt", "")).count(FACE_SEPARATOR) + 1
    if named > most:
        problems.add(
            "face_prompt",
            f"holds {named} prompts; max_faces lets {most} be repainted: give no more prompts.",
        )


def _check_weights(options: Options) -> None:
    """Refuse weighted prompts that do not parse; those of several faces are several."""
    texts = [(name, str(options.get(name, ""))) for name in ("prompt", "negative_prompt")]
    faces = str(options.get("face_prompt", "")).split(FACE_SEPARATOR)
    for name, text in [*texts, *(("face_prompt", part) for part in faces)]:
        parse_weights(text, field_name=name)


def check_pixels(options: Options, mode: Mode, limits: Limits, *, width: int, height: int) -> None:
    """Refuse more pixels than the server paints, those of `hires_fix` included.

    Args:
        options: of the request.
        mode: of the request.
        limits: of the server.
        width: of the picture before super-resolution, px.
        height: see width.

    Raises:
        RequestError: names the field that decides the size.
    """
    problems = Problems()
    if width * height > limits.max_pixels:
        problems.add(
            "input_image" if mode is Mode.UPSCALE else "w",
            f"{width}x{height} are more than this server's limit of {limits.max_pixels} pixels; "
            f"{'send' if mode is Mode.UPSCALE else 'ask for'} a smaller picture.",
        )
    elif options.get("hires_fix"):
        factor = sr_factor(height, width)
        if width * height * factor**2 > limits.max_pixels:
            problems.add(
                "hires_fix",
                f"would repaint {width * factor}x{height * factor}, more than this server's limit "
                f"of {limits.max_pixels} pixels; leave it out or ask for a smaller picture.",
            )
    problems.raise_if_any()


def check_final_size(options: Options, *, width: int, height: int, enlarged: bool) -> None:
    """Refuse pictures that the asked file format cannot hold.

    Args:
        options: of the request.
        width: of the picture before super-resolution, px.
        height: see width.
        enlarged: whether it is super-resolved.

    Raises:
        RequestError: a side is longer than the format allows.
    """
    file_format = str(options.get("image_format", "png"))
    most = MAX_SIDES.get(file_format)
    factor = sr_factor(height, width) if enlarged else 1
    if most is not None and factor * max(width, height) > most:
        raise RequestError(
            {
                "image_format": f"the picture would be {factor * width}x{factor * height}; "
                f"{file_format} holds sides up to {most}: ask for png."
            }
        )


def check_engine_sizes(
    options: Options, mode: Mode, model: ModelManifest, *, width: int, height: int
) -> None:
    """Refuse picture sizes that the model's TensorRT plans were not built for.

    Args:
        options: of the request.
        mode: of the request; only_upscale paints nothing of this size.
        model: whose limits count; a model served as graphs has none.
        width: of the picture to paint, px.
        height: see width.

    Raises:
        RequestError: the picture, or with `hires_fix` the enlarged one, is of another size.
    """
    limits = model.limits
    if limits is None:
        return
    problems = Problems()
    known = ", ".join(str(size) for size in limits.sizes)
    if mode is not Mode.UPSCALE and not limits.takes(width, height):
        problems.add(
            "w",
            f"the picture would be {width}x{height}; the engines of {model.name} were built for "
            f"{known}: ask for one of these sizes (w, h).",
        )
    if options.get("hires_fix"):
        step, factor = model.facts.size_step_px, sr_factor(height, width)
        across, down = (-(-side * factor // step) * step for side in (width, height))
        if not limits.takes(across, down):
            problems.add(
                "hires_fix",
                f"would repaint {across}x{down}; the engines of {model.name} were built for "
                f"{known}: leave it out or ask for a smaller picture.",
            )
    problems.raise_if_any()


def _check_family(options: Options, facts: Family, problems: Problems) -> None:
    if options.get("negative_prompt") and not facts.negative_prompt:
        problems.add("negative_prompt", f"{facts.title} takes none; leave it out.")
    if options.get("use_lpw") and facts.flow:
        problems.add("use_lpw", f"{facts.title} takes no weighted prompts; leave it out.")
    for name in SIZE_ID_FIELDS:
        if name in options and "time_ids" not in facts.row_extras:
            problems.add(name, f"{facts.title} is told no sizes; leave it out.")
    below = facts.cfg_scale_below
    if below is not None and float(options.get("cfg_scale", 0)) >= below:
        problems.add(
            "cfg_scale",
            f"got {float(options['cfg_scale']):g}; {facts.title} allows 0 to less than {below:g}.",
        )


def _has_tags(text: str, name: str) -> bool:
    parsed = parse_prompt(text, field_name=name)
    return bool(parsed.loras or parsed.flags)
