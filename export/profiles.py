"""Optimization profiles: which shapes a plan takes and which it is quickest at. One place.

A profile is min, opt and max of every input. Sizes come from the deployment (``--sizes``,
``--max-batch``), everything else from the model's manifest. A range that is wide in several
dimensions at once makes slow kernels, so every listed size has a profile of its own, and
TensorRT's own plans have one more a size for a sequence alone, the usual call of an idle server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from closeup.conditioning import ENCODER_ROWS
from closeup.errors import ExportError
from closeup.manifest import EngineLimits, ModelManifest, SizeRange, TextEncoder, UpscalerManifest
from closeup.plans import PlanTensor, Profile, ShapeRange
from export.sizes import Side

# Prompts of one request that an encoder is given at once: negative, prompt, face prompt.
PROMPTS = 3
# Chunks of a weighted prompt: 300 tokens of CLIP.
MAX_CHUNKS = ENCODER_ROWS // PROMPTS
# Elements of a tensor that TensorRT can count.
_MAX_VOLUME = 2**31 - 1
_DTYPES: Mapping[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT64: "int64",
}
# Long sides of the detector's input: closeup.detection, MIN_LONG_SIDE / SECOND_LOOK and
# MAX_LONG_SIDE; sides are multiples of 32.
_DETECTOR_PX = Side(min=32, opt=640, max=1280)
_SMALLEST_TILE_PX = 8

Sides = Mapping[str, Side]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensors:
    """Inputs and outputs of a graph, in order."""

    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]


def tensors_of(graph: Path) -> Tensors:
    """Read the inputs and outputs off an ONNX file.

    Raises:
        ExportError: one is of a type that no engine of ours has.
    """
    model = onnx.load(graph, load_external_data=False).graph
    weights = {weight.name for weight in model.initializer}
    return Tensors(
        inputs=tuple(_tensor(value) for value in model.input if value.name not in weights),
        outputs=tuple(_tensor(value) for value in model.output),
    )


def profile_of(name: str, inputs: Sequence[PlanTensor], sides: Sides) -> Profile:
    """Return a profile of the graph with these inputs.

    Args:
        name: of the profile.
        inputs: of the graph.
        sides: of every axis that varies, by its name.

    Raises:
        ExportError: an axis has no side, or a tensor gets too large.
    """
    shapes = {}
    for tensor in inputs:
        try:
            found = [sides[axis] if isinstance(axis, str) else Side.fixed(axis)
                     for axis in tensor.axes]  # fmt: skip
        except KeyError as error:
            raise ExportError(
                f"input {tensor.name} varies along {error}, which no profile knows; expected "
                f"{', '.join(sides)}."
            ) from error
        volume = 1
        for side in found:
            volume *= side.max
        if volume > _MAX_VOLUME:
            raise ExportError(
                f"input {tensor.name} has up to {volume} elements in profile {name}, TensorRT "
                f"counts to {_MAX_VOLUME}: lower --max-batch, --sizes or --lora-rank."
            )
        shapes[tensor.name] = ShapeRange(
            min=tuple(side.min for side in found),
            opt=tuple(side.opt for side in found),
            max=tuple(side.max for side in found),
        )
    return Profile(name=name, shapes=shapes)


def limits_of(
    manifest: ModelManifest, sizes: tuple[SizeRange, ...], lora_rows: int
) -> EngineLimits:
    """Return what the plans of a pipeline can take.

    Args:
        manifest: of the pipeline.
        sizes: of the pictures.
        lora_rows: adapters wanted; fewer where the bank would have too many elements.
    """
    layouts = [manifest.lora, *(encoder.lora for encoder in manifest.encoders)]
    banks = [layout.rows * layout.max_rank for layout in layouts if layout is not None]
    fitting = min((_MAX_VOLUME // bank - 1 for bank in banks), default=lora_rows)
    return EngineLimits(sizes=sizes, max_chunks=MAX_CHUNKS, lora_rows=min(lora_rows, fitting))


def denoiser_sides(
    manifest: ModelManifest, limits: EngineLimits, *, alone: bool
) -> dict[str, Sides]:
    """Return the sides of the denoiser's axes by profile, the largest size first.

    Args:
        manifest: of the pipeline.
        limits: of its plans.
        alone: add a profile a size for one sequence in a call.
    """
    rows = 2 if manifest.facts.negative_prompt else 1
    many, one = manifest.max_batch, 1
    batches = {"": many} | ({", alone": one} if alone and many > one else {})
    found: dict[str, Sides] = {}
    for size in sorted(limits.sizes, key=_area, reverse=True):
        for suffix, batch in batches.items():
            found[f"{size}{suffix}"] = {
                "batch": Side.up_to(batch),
                "rows": Side.up_to(rows * batch),
                "height": _height(manifest, size).over(manifest.vae_scale_factor),
                "width": _width(manifest, size).over(manifest.vae_scale_factor),
                "tokens": _tokens(manifest, limits),
                **_lora_sides(None if manifest.lora is None else manifest.lora.max_rank, limits),
            }
    return found


def encoder_batch(manifest: ModelManifest) -> int:
    """Return how many rows of token ids a text encoder's call holds, as a plan or as a graph.

    A request's prompts come at once, weighted ones in chunks; two requests share a call where
    there is room.
    """
    chunks = 1 if manifest.facts.flow else MAX_CHUNKS
    return max(2 * manifest.max_batch, PROMPTS * chunks)


def encoder_sides(
    encoder: TextEncoder, manifest: ModelManifest, limits: EngineLimits
) -> dict[str, Sides]:
    """Return the sides of a text encoder's axes: its prompts' length is fixed."""
    batch = encoder_batch(manifest)
    rank = None if encoder.lora is None else encoder.lora.max_rank
    return {"prompts": {"batch": Side.up_to(batch, PROMPTS), **_lora_sides(rank, limits)}}


def vae_sides(manifest: ModelManifest, limits: EngineLimits, max_batch: int) -> dict[str, Sides]:
    """Return the sides of the axes of a VAE's encoder and decoder."""
    found: dict[str, Sides] = {}
    for size in sorted(limits.sizes, key=_area, reverse=True):
        height, width = _height(manifest, size), _width(manifest, size)
        found[str(size)] = {
            "batch": Side.up_to(max_batch, 1),
            "height": height,
            "width": width,
            "latent_height": height.over(manifest.vae_scale_factor),
            "latent_width": width.over(manifest.vae_scale_factor),
        }
    return found


def upscaler_sides(manifest: UpscalerManifest) -> dict[str, Sides]:
    """Return the sides of the upscaler's axes: any tile up to the largest."""
    side = Side(min=_SMALLEST_TILE_PX, opt=manifest.tile_px, max=manifest.tile_px)
    return {"tiles": {"batch": Side.up_to(manifest.max_batch), "height": side, "width": side}}


def detector_sides(max_batch: int) -> dict[str, Sides]:
    """Return the sides of the face detector's axes."""
    batch = Side.up_to(max_batch, 1)
    return {"pictures": {"batch": batch, "height": _DETECTOR_PX, "width": _DETECTOR_PX}}


def _lora_sides(max_rank: int | None, limits: EngineLimits) -> Sides:
    if max_rank is None:
        return {}
    return {"adapters": Side.up_to(limits.lora_rows + 1), "rank": Side.up_to(max_rank)}


def _tokens(manifest: ModelManifest, limits: EngineLimits) -> Side:
    """Length of the context: T5 pads to one length, CLIP's weighted prompts come in chunks."""
    tokens = max(
        encoder.tokenizer.max_tokens
        for encoder in manifest.encoders
        if "context" in encoder.outputs
    )
    if manifest.facts.flow:
        return Side.fixed(tokens)
    return Side(min=tokens, opt=tokens, max=tokens * limits.max_chunks)


def _height(manifest: ModelManifest, size: SizeRange) -> Side:
    return _around(manifest.native_px, size.min_height, size.max_height)


def _width(manifest: ModelManifest, size: SizeRange) -> Side:
    return _around(manifest.native_px, size.min_width, size.max_width)


def _around(native_px: int, low: int, high: int) -> Side:
    return Side(min=low, opt=min(max(native_px, low), high), max=high)


def _area(size: SizeRange) -> int:
    return size.max_width * size.max_height


def _tensor(value: onnx.ValueInfoProto) -> PlanTensor:
    kind = value.type.tensor_type
    dtype = _DTYPES.get(kind.elem_type)
    if dtype is None:
        raise ExportError(
            f"tensor {value.name} is of ONNX type {kind.elem_type}; expected one of "
            f"{', '.join(_DTYPES.values())}."
        )
    axes = tuple(
        dim.dim_param if dim.HasField("dim_param") else dim.dim_value for dim in kind.shape.dim
    )
    return PlanTensor(name=value.name, dtype=dtype, axes=axes)
