"""The request fields of `generate`: names, types, ranges, meaning. One table.

The Triton configuration, the validation, the client's options and the README's table are all
made from `FIELDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from closeup.faces import FaceOrder
from closeup.samplers import SAMPLERS


class Kind(str, Enum):
    """A field's type; `triton_type` is what its tensor is declared as."""

    STRING = "string"
    IMAGE = "image"
    INT = "int"
    FLOAT = "float"
    BOOL = "bool"

    @property
    def triton_type(self) -> str:
        """Data type in config.pbtxt. Floats are FP64 so that 7.1 stays 7.1."""
        return {
            Kind.STRING: "TYPE_STRING",
            Kind.IMAGE: "TYPE_STRING",
            Kind.INT: "TYPE_INT64",
            Kind.FLOAT: "TYPE_FP64",
            Kind.BOOL: "TYPE_BOOL",
        }[self]


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One request field.

    Attributes:
        name: input tensor and JSON key.
        kind: its type.
        doc: one line for people.
        default: what happens without it, in words.
        minimum: smallest value (for strings: characters), inclusive.
        maximum: largest value (for strings: characters), inclusive.
        multiple_of: values must be multiples of this.
        choices: the only values; empty when free.
        words: says what is allowed where the above cannot.
    """

    name: str
    kind: Kind
    doc: str
    default: str
    minimum: float | None = None
    maximum: float | None = None
    multiple_of: int | None = None
    choices: tuple[str, ...] = ()
    words: str = ""

    @property
    def allowed(self) -> str:
        """The range, in words."""
        if self.words:
            return self.words
        if self.choices:
            return ", ".join(self.choices)
        if self.kind is Kind.BOOL:
            return "true, false"
        if self.kind is Kind.IMAGE:
            return "PNG, JPEG or WebP; bytes or base64"
        if self.minimum is None or self.maximum is None:
            return ""
        low, high = f"{self.minimum:g}", f"{self.maximum:.10g}"
        if self.kind is Kind.STRING:
            return f"{low} to {high} characters"
        steps = f", multiples of {self.multiple_of}" if self.multiple_of else ""
        return f"{low} to {high}{steps}"


ASPECT_RATIOS: Mapping[str, tuple[int, int]] = {
    text: (int(text.split(":")[0]), int(text.split(":")[1]))
    for text in (
        "1:1", "16:9", "9:16", "21:9", "9:21", "3:2", "2:3", "5:4", "4:5", "4:3", "3:4",
    )
}  # fmt: skip
LEGACY_ASPECTS: Mapping[str, str] = {
    "1:1": "1:1",
    "portrait": "2:3",
    "16:9": "16:9",
    "landscape": "3:2",
}

MAX_PROMPT_CHARACTERS = 4000
MAX_SEED = 2**32 - 1
DEFAULT_MAX_FACES = 32
FACE_SEPARATOR = "[SEP]"
"""Stands between the prompts of several faces, as in ADetailer."""
FACE_ORDERS = tuple(order.value for order in FaceOrder)
IMAGE_FORMATS = ("png", "jpeg", "webp")
ENCODINGS = ("base64", "raw")

FIELDS: tuple[Field, ...] = (
    Field(
        name="prompt", kind=Kind.STRING, default="required",
        doc="What to paint; `<lora:ID:WEIGHT>` tags anywhere in it.",
        minimum=1, maximum=MAX_PROMPT_CHARACTERS,
    ),
    Field(
        name="negative_prompt", kind=Kind.STRING, default="empty",
        doc="What to keep out of the picture.", minimum=0, maximum=MAX_PROMPT_CHARACTERS,
    ),
    Field(name="use_lpw", kind=Kind.BOOL, default="false",
          doc="Weighted prompts of any length: `(word:1.2)`, `[word]`; not on FLUX.1."),
    Field(name="model", kind=Kind.STRING, default="the first exported",
          doc="Which served model paints.", minimum=1, maximum=200),
    Field(name="num_images", kind=Kind.INT, default="1", minimum=1, maximum=8,
          doc="Pictures to make; picture i uses seed + i."),
    Field(name="seed", kind=Kind.INT, default="random, reported in `info`", minimum=0,
          maximum=MAX_SEED, doc="Gives the picture diffusers gives with the same seed."),
    Field(name="steps", kind=Kind.INT, default="the model's", minimum=1, maximum=50,
          doc="Denoising steps."),
    Field(name="cfg_scale", kind=Kind.FLOAT, default="the model's", minimum=0, maximum=15,
          doc="Classifier-free guidance; 1 and below switch it off."),
    Field(name="w", kind=Kind.INT, default="by `h` and the ratio, or the model's",
          minimum=64, maximum=2048, multiple_of=8,
          doc="Width in pixels before super-resolution."),
    Field(name="h", kind=Kind.INT, default="by `w` and the ratio, or the model's",
          minimum=64, maximum=2048, multiple_of=8,
          doc="Height in pixels before super-resolution."),
    Field(name="aspect_ratio", kind=Kind.STRING, default="none", choices=tuple(ASPECT_RATIOS),
          doc="Sides in this ratio; without `w` and `h` with the model's own number of pixels, or "
              "`input_image`'s."),
    Field(name="ar", kind=Kind.STRING, default="none", choices=tuple(LEGACY_ASPECTS),
          doc="Older spelling of `aspect_ratio`."),
    *(
        Field(name=f"{what}_{side}", kind=Kind.INT, default=default, minimum=low, maximum=8192,
              doc=f"SDXL: {meaning} that the network is told, px.")
        for what, meaning, low, default, sides in (
            ("original", "size of the original picture", 64, "the picture's", "wh"),
            ("crop", "offset of the crop", 0, "0", "xy"),
            ("target", "target size", 64, "the picture's", "wh"),
        )
        for side in sides
    ),
    Field(name="scheduler", kind=Kind.STRING, default="the model's", minimum=1, maximum=80,
          words=", ".join(SAMPLERS),
          doc="Sampler; with a spacing behind it (`dpm++2m_karras`) and in other tools' spellings "
              "(`DPM++ 2M Karras`, `uni_pc`) as well."),
    Field(name="super_resolution", kind=Kind.BOOL, default="false",
          doc="Double each side (four times for small pictures)."),
    Field(name="hires_fix", kind=Kind.BOOL, default="false",
          doc="Repaint the super-resolved picture lightly as a whole; needs `super_resolution`."),
    Field(name="hires_denoising_strength", kind=Kind.FLOAT, default="0.3", minimum=0, maximum=1,
          doc="How much `hires_fix` repaints; also `--hires_denoising_strength` in the prompt."),
    Field(name="inpaint_faces", kind=Kind.BOOL, default="false",
          doc="Repaint every face at the model's native size; turns `super_resolution` on."),
    Field(name="face_prompt", kind=Kind.STRING, default="`prompt` and the model's suffix",
          minimum=1, maximum=MAX_PROMPT_CHARACTERS,
          doc="Prompt of the face pass; several with `[SEP]` between them go one to each repainted "
          "face in `face_order`, the last one to all that follow, an empty one is the default; at "
          "most `max_faces` of them."),
    Field(name="face_denoising_strength", kind=Kind.FLOAT, default="0.65 to 0.45, by face size",
          minimum=0, maximum=1,
          doc="How much a face is repainted, lost ones more if the model says so; also "
          "`--face_inpaint_denoising` in the prompt."),
    Field(name="face_steps", kind=Kind.INT, default="the model's, at most `steps`", minimum=1,
          maximum=50,
          doc="Steps of the face pass's schedule; a face's strength says how many of them run."),
    Field(name="max_faces", kind=Kind.INT, default=str(DEFAULT_MAX_FACES), minimum=0, maximum=100,
          doc="Faces repainted at most, in `face_order`."),
    Field(name="min_face_ratio", kind=Kind.FLOAT, default="0.1", minimum=0, maximum=1,
          doc="Skip faces smaller than this share of the largest face's side."),
    Field(name="face_crop_factor", kind=Kind.FLOAT, default="the model's", minimum=1.2, maximum=4,
          doc="Side of the repainted square over the face's."),
    Field(name="face_order", kind=Kind.STRING, choices=FACE_ORDERS,
          default="area, with several face prompts left_right",
          doc="Order of the faces, for `max_faces`, their prompts and the report."),
    Field(name="input_image", kind=Kind.IMAGE, default="none",
          doc="Picture to start from (img2img, inpainting, `only_upscale`); keeps its shape unless "
              "`w` and `h`, or a ratio, say otherwise."),
    Field(name="mask_image", kind=Kind.IMAGE, default="none",
          doc="White is repainted; same size as `input_image`."),
    Field(name="denoising_strength", kind=Kind.FLOAT, default="0.8", minimum=0, maximum=1,
          doc="1 takes the prompt, 0 keeps `input_image`."),
    Field(name="only_upscale", kind=Kind.BOOL, default="false",
          doc="Skip generation: super-resolve (and face-inpaint) `input_image` itself; also "
              "`--only_upscale` in the prompt."),
    Field(name="image_format", kind=Kind.STRING, default="png", choices=IMAGE_FORMATS,
          doc="File format of the pictures; the parameters are in the metadata."),
    Field(name="image_quality", kind=Kind.INT, default="92", minimum=1, maximum=100,
          doc="Quality of JPEG and WebP."),
    Field(name="response_encoding", kind=Kind.STRING, default="base64", choices=ENCODINGS,
          doc="`raw` returns the files' bytes (pictures, stages, previews), for gRPC and binary "
              "HTTP."),
    Field(name="stages", kind=Kind.BOOL, default="false",
          doc="Also return the picture after each stage, in `stage_image`."),
    Field(name="previews", kind=Kind.BOOL, default="false",
          doc="`generate_stream` only: a small picture with each progress event."),
)  # fmt: skip

FIELD_BY_NAME: Mapping[str, Field] = {field.name: field for field in FIELDS}
