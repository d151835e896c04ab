"""The request fields. Written by client/generate_fields.py: do not edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Kind(str, Enum):
    """A field's type."""

    STRING = "string"
    IMAGE = "image"
    INT = "int"
    FLOAT = "float"
    BOOL = "bool"


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One request field.

    Attributes:
        name: input tensor, JSON key and keyword.
        kind: its type.
        datatype: of its tensor, as the KServe protocol spells it.
        doc: one line for people.
        default: what happens without it, in words.
        allowed: the range, in words; empty when free.
        minimum: smallest value (for strings: characters), inclusive.
        maximum: largest value (for strings: characters), inclusive.
        multiple_of: values must be multiples of this.
        choices: the only values; empty when free.
    """

    name: str
    kind: Kind
    datatype: str
    doc: str
    default: str
    allowed: str = ""
    minimum: float | None = None
    maximum: float | None = None
    multiple_of: int | None = None
    choices: tuple[str, ...] = ()


# fmt: off
FIELDS: tuple[Field, ...] = (
    Field(
        name="prompt",
        kind=Kind.STRING,
        datatype="BYTES",
        doc="What to paint; `<lora:ID:WEIGHT>` tags anywhere in it.",
        default="required",
        allowed="1 to 4000 characters",
        minimum=1,
        maximum=4000,
    ),
    Field(
        name="negative_prompt",
        kind=Kind.STRING,
        datatype="BYTES",
        doc="What to keep out of the picture.",
        default="empty",
        allowed="0 to 4000 characters",
        minimum=0,
        maximum=4000,
    ),
    Field(
        name="use_lpw",
        kind=Kind.BOOL,
        datatype="BOOL",
        doc="Weighted prompts of any length: `(word:1.2)`, `[word]`; not on FLUX.1.",
        default="false",
        allowed="true, false",
    ),
    Field(
        name="model",
        kind=Kind.STRING,
        datatype="BYTES",
        doc="Which served model paints.",
        default="the first exported",
        allowed="1 to 200 characters",
        minimum=1,
        maximum=200,
    ),
    Field(
        name="num_images",
        kind=Kind.INT,
        datatype="INT64",
        doc="Pictures to make; picture i uses seed + i.",
        default="1",
        allowed="1 to 8",
        minimum=1,
        maximum=8,
    ),
    Field(
        name="seed",
        kind=Kind.INT,
        datatype="INT64",
        doc="Gives the picture diffusers gives with the same seed.",
        default="random, reported in `info`",
        allowed="0 to 4294967295",
        minimum=0,
        maximum=4294967295,
    ),
    Field(
        name="steps",
        kind=Kind.INT,
        datatype="INT64",
        doc="Denoising steps.",
        default="the model's",
        allowed="1 to 50",
        minimum=1,
        maximum=50,
    ),
    Field(
        name="cfg_scale",
        kind=Kind.FLOAT,
        datatype="FP64",
        doc="Classifier-free guidance; 1 and below switch it off.",
        default="the model's",
        allowed="0 to 15",
        minimum=0,
        maximum=15,
    ),
    Field(
        name="w",
        kind=Kind.INT,
        datatype="INT64",
        doc="Width in pixels before super-resolution.",
        default="by `h` and the ratio, or the model's",
        allowed="64 to 2048, multiples of 8",
        minimum=64,
        maximum=2048,
        multiple_of=8,
    ),
    Field(
        name="h",
        kind=Kind.INT,
        datatype="INT64",
        doc="Height in pixels before super-resolution.",
        default="by `w` and the ratio, or the model's",
        allowed="64 to 2048, multiples of 8",
        minimum=64,
        maximum=2048,
        multiple_of=8,
    ),
    Field(
        name="aspect_ratio",
        kind=Kind.STRING,
        datatype="BYTES",
        doc="Sides in this ratio; without `w` and `h` with the model's own number of pixels, or `input_image`'s.",  # noqa: E501
        default="none",
        allowed="1:1, 16:9, 9:16, 21:9, 9:21, 3:2, 2:3, 5:4, 4:5, 4:3, 3:4",
        choices=("1:1", "16:9", "9:16", "21:9", "9:21", "3:2", "2:3", "5:4", "4:5", "4:3", "3:4"),
    ),
    Field(
        name="ar",
        kind=Kind.STRING,
        datatype="BYTES",
        doc="Older spelling of `aspect_ratio`.",
        default="none",
        allowed="1:1, portrait, 16:9, landscape",
        choices=("1:1", "portrait", "16:9", "landscape"),
    ),
    Field(
        name="original_w",
        kind=Kind.INT,
        datatype="INT64",
        doc="SDXL: size of the original picture that the network is told, px.",
        default="the picture's",
        allowed="64 to 8192",
        minimum=64,
        maximum=8192,
    ),
    Field(
        name="original_h",
        kind=Kind.INT,
        datatype="INT64",
        doc="SDXL: size of the original picture that the network is told, px.",
        default="the picture's",
        allowed="64 to 8192",
        minimum=64,
        maximum=8192,
    ),
    Field(
        name="crop_x",
        kind=Kind.INT,
        datatype="INT64",
        doc="SDXL: offset of the crop that the network is told, px.",
        default="0",
        allowed="0 to 8192",
        minimum=0,
        maximum=8192,
    ),
    Field(
        name="crop_y",
        kind=Kind.INT,
        datatype="INT64",
        doc="SDXL: offset of the crop that the network is told, px.",
        default="0",
        allowed="0 to 8192",
        minimum=0,
        maximum=8192,
    ),
    Field(
        name="target_w",
        kind=Kind.INT,
        datatype="INT64",
        doc="SDXL: target size that the network is told, px.",
        default="the picture's",
        allowed="64 to 8192",
        minimum=64,
        maximum=8192,
    ),
    Field(
        name="target_h",
        kind=Kind.INT,
        datatype="INT64",
        doc="SDXL: target size that the network is told, px.",
        default="the picture's",
        allowed="64 to 8192",
        minimum=64,
        maximum=8192,
    ),
    Field(
        name="scheduler",
        kind=Kind.STRING,
        datatype="BYTES",
        doc="Sampler; with a spacing behind it (`dpm++2m_karras`) and in other tools' spellings (`DPM++ 2M Karras`, `uni_pc`) as well.",  # noqa: E501
        default="the model's",
        allowed="euler, euler_a, dpm++2m, dpm++2m_karras, dpm++sde, dpm++sde_karras, lcm, tcd, ddim, dpm++2m_sde, dpm++3m, dpm++3m_sde, dpm++2s, unipc, deis, deis3, heun, dpm2, dpm2_a",  # noqa: E501
        minimum=1,
        maximum=80,
    ),
    Field(
        name="super_resolution",
        kind=Kind.BOOL,
        datatype="BOOL",
        doc="Double each side (four times for small pictures).",
        default="false",
        allowed="true, false",
    ),
    Field(
        name="hires_fix",
        kind=Kind.BOOL,
        datatype="BOOL",
        doc="Repaint the super-resolved picture lightly as a whole; needs `super_resolution`.",
        default="false",
        allowed="true, false",
    ),
    Field(
        name="hires_denoising_strength",
        kind=Kind.FLOAT,
        datatype="FP64",
        doc="How much `hires_fix` repaints; also `--hires_denoising_strength` in the prompt.",
        default="0.3",
        allowed="0 to 1",
        minimum=0,
        maximum=1,
    ),
    Field(
        name="inpaint_faces",
        kind=Kind.BOOL,
        datatype="BOOL",
        doc="Repaint every face at the model's native size; turns `super_resolution` on.",
        default="false",
        allowed="true, false",
    ),
    Field(
        name="face_prompt",
        kind=Kind.STRING,
        datatype="BYTES",
        doc="Prompt of the face pass; several with `[SEP]` between them go one to each repainted face in `face_order`, the last one to all that follow, an empty one is the default; at most `max_faces` of them.",  # noqa: E501
        default="`prompt` and the model's suffix",
        allowed="1 to 4000 characters",
        minimum=1,
        maximum=4000,
    ),
    Field(
        name="face_denoising_strength",
        kind=Kind.FLOAT,
        datatype="FP64",
        doc="How much a face is repainted, lost ones more if the model says so; also `--face_inpaint_denoising` in the prompt.",  # noqa: E501
        default="0.65 to 0.45, by face size",
        allowed="0 to 1",
        minimum=0,
        maximum=1,
    ),
    Field(
        name="face_steps",
        kind=Kind.INT,
        datatype="INT64",
        doc="Steps of the face pass's schedule; a face's strength says how many of them run.",
        default="the model's, at most `steps`",
        allowed="1 to 50",
        minimum=1,
        maximum=50,
    ),
    Field(
        name="max_faces",
        kind=Kind.INT,
        datatype="INT64",
        doc="Faces repainted at most, in `face_order`.",
        default="32",
        allowed="0 to 100",
        minimum=0,
        maximum=100,
    ),
    Field(
        name="min_face_ratio",
        kind=Kind.FLOAT,
        datatype="FP64",
        doc="Skip faces smaller than this share of the largest face's side.",
        default="0.1",
        allowed="0 to 1",
        minimum=0,
        maximum=1,
    ),
    Field(
        name="face_crop_factor",
        kind=Kind.FLOAT,
        datatype="FP64",
        doc="Side of the repainted square over the face's.",
        default="the model's",
        allowed="1.2 to 4",
        minimum=1.2,
        maximum=4,
    ),
    Field(
        name="face_order",
        kind=Kind.STRING,
        datatype="BYTES",
        doc="Order of the faces, for `max_faces`, their prompts and the report.",
        default="area, with several face prompts left_right",
        allowed="area, left_right, center, score",
        choices=("area", "left_right", "center", "score"),
    ),
    Field(
        name="input_image",
        kind=Kind.IMAGE,
        datatype="BYTES",
        doc="Picture to start from (img2img, inpainting, `only_upscale`); keeps its shape unless `w` and `h`, or a ratio, say otherwise.",  # noqa: E501
        default="none",
        allowed="PNG, JPEG or WebP; bytes or base64",
    ),
    Field(
        name="mask_image",
        kind=Kind.IMAGE,
        datatype="BYTES",
        doc="White is repainted; same size as `input_image`.",
        default="none",
        allowed="PNG, JPEG or WebP; bytes or base64",
    ),
    Field(
        name="denoising_strength",
        kind=Kind.FLOAT,
        datatype="FP64",
        doc="1 takes the prompt, 0 keeps `input_image`.",
        default="0.8",
        allowed="0 to 1",
        minimum=0,
        maximum=1,
    ),
    Field(
        name="only_upscale",
        kind=Kind.BOOL,
        datatype="BOOL",
        doc="Skip generation: super-resolve (and face-inpaint) `input_image` itself; also `--only_upscale` in the prompt.",  # noqa: E501
        default="false",
        allowed="true, false",
    ),
    Field(
        name="image_format",
        kind=Kind.STRING,
        datatype="BYTES",
        doc="File format of the pictures; the parameters are in the metadata.",
        default="png",
        allowed="png, jpeg, webp",
        choices=("png", "jpeg", "webp"),
    ),
    Field(
        name="image_quality",
        kind=Kind.INT,
        datatype="INT64",
        doc="Quality of JPEG and WebP.",
        default="92",
        allowed="1 to 100",
        minimum=1,
        maximum=100,
    ),
    Field(
        name="response_encoding",
        kind=Kind.STRING,
        datatype="BYTES",
        doc="`raw` returns the files' bytes (pictures, stages, previews), for gRPC and binary HTTP.",  # noqa: E501
        default="base64",
        allowed="base64, raw",
        choices=("base64", "raw"),
    ),
    Field(
        name="stages",
        kind=Kind.BOOL,
        datatype="BOOL",
        doc="Also return the picture after each stage, in `stage_image`.",
        default="false",
        allowed="true, false",
    ),
    Field(
        name="previews",
        kind=Kind.BOOL,
        datatype="BOOL",
        doc="`generate_stream` only: a small picture with each progress event.",
        default="false",
        allowed="true, false",
    ),
)
# fmt: on

FIELD_BY_NAME: Mapping[str, Field] = {field.name: field for field in FIELDS}
