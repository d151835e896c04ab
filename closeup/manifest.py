"""What an export says about a model, read by the server: ``manifest.json``.

The repository's index (``models.json``) lists the pipelines in the order they were exported; the
first is the default. Each pipeline's manifest lies in its denoiser's folder; the upscaler and the
face detector, which pipelines share, have small ones of their own.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from closeup.errors import ModelError
from closeup.faces import DEFAULT_CROP_FACTOR, FaceDefaults
from closeup.families import Family, family_named

_LOGGER = logging.getLogger(__name__)

INDEX_NAME = "models.json"
MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraLayer:
    """One adapted layer, in the order of the bank.

    Attributes:
        name: module name inside the denoiser, as diffusers spells it.
        in_features: columns of A (input channels of a 1x1 convolution).
        out_features: rows of B (output channels).
    """

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraLayout:
    """How a LoRA is laid out in the denoiser's bank ``lora`` (S, M, r).

    Attributes:
        max_rank: the largest r the engine was made for; wider files are compressed to it.
        layers: in bank order; layer j owns ``in_features + out_features`` consecutive rows:
            A transposed (in, r), then B (out, r) with weight * alpha / rank folded in.
    """

    max_rank: int
    layers: tuple[LoraLayer, ...]

    @property
    def rows(self) -> int:
        """M, the rows of one adapter in the bank."""
        return sum(layer.in_features + layer.out_features for layer in self.layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """A tokenizer file of the `tokenizers` library and how its output is padded.

    Attributes:
        path: relative to the manifest's folder.
        max_tokens: length after padding, begin and end included.
        bos_token_id: put first; None where the family has no begin token (T5).
        eos_token_id: put after the last token that fits.
        pad_token_id: fills the rest.
    """

    path: str
    max_tokens: int
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoder:
    """One of a pipeline's text encoders.

    Attributes:
        name: ``text_encoder`` or ``text_encoder_2``, as in the pipeline's folder.
        tokenizer: its own.
        outputs: what its graph gives: ``context`` (B, L, D), ``pooled`` (B, P), or both. The
            denoiser's context is every encoder's, joined along D; there is one pooled at most.
        lora: layout of its LoRA inputs. An encoder that has them is run by the denoiser's
            process, since LoRA vectors never leave it; the others are models of the repository.
    """

    name: str
    tokenizer: Tokenizer
    outputs: tuple[str, ...] = ("context",)
    lora: LoraLayout | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """One exported graph and the evidence that it agrees with PyTorch.

    Attributes:
        model: name of its folder in the repository.
        sha256: of the ONNX file and its external data.
        bytes: of the ONNX file and its external data.
        precision: of the weights, ``fp32``, ``fp16`` or ``bf16``.
        max_abs_error: largest absolute difference from PyTorch over all checks.
        max_rel_error: largest ``|out - ref| / |ref|`` (2-norms) over all checks.
        checks: the input shapes compared, in words.
    """

    model: str
    sha256: str
    bytes: int
    precision: str
    max_abs_error: float
    max_rel_error: float
    checks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What a request gets that does not say otherwise; None leaves the family's value."""

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    scheduler: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeRange:
    """Picture sizes that an engine takes, px, limits included."""

    min_width: int
    max_width: int
    min_height: int
    max_height: int

    def takes(self, width: int, height: int) -> bool:
        """Whether a picture of this size is among them."""
        return (
            self.min_width <= width <= self.max_width
            and self.min_height <= height <= self.max_height
        )

    def __str__(self) -> str:
        low = f"{self.min_width}x{self.min_height}"
        high = f"{self.max_width}x{self.max_height}"
        return low if low == high else f"{low} to {high}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """What the TensorRT plans of a pipeline were built for; graphs take any shape.

    Attributes:
        sizes: the picture sizes.
        max_chunks: the longest weighted prompt, in chunks of what a text encoder reads.
        lora_rows: LoRA combinations resident at once, the zero row not counted.
    """

    sizes: tuple[SizeRange, ...]
    max_chunks: int
    lora_rows: int

    def takes(self, width: int, height: int) -> bool:
        """Whether a picture of this size can be painted."""
        return any(size.takes(width, height) for size in self.sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelManifest:
    """A served pipeline.

    Attributes:
        name: the request field ``model``; prefix of its Triton models.
        family: key of `closeup.families.FAMILIES`.
        native_px: side the weights were trained at; work size of the face pass.
        vae_scale_factor: picture pixels per latent pixel.
        scaling_factor: latents the denoiser sees = (VAE latents - shift_factor) * scaling_factor.
        shift_factor: see scaling_factor.
        scheduler: the content of the pipeline's scheduler/scheduler_config.json, untouched.
        encoders: the text encoders, in the order in which their contexts are joined.
        precision: of the denoiser.
        max_batch: sequences a denoiser engine call may hold.
        lora: layout of the denoiser's LoRA inputs; None when exported with rank 0.
        zero_empty_negative: without a negative prompt the negative embeddings are zeros, not
            those of an empty prompt (SDXL base).
        guidance_embeds: the network takes the guidance scale as an input (FLUX.1 dev).
        defaults: per-model defaults.
        face_prompt_suffix: added to the prompt in the face pass.
        face_crop_factor: side of the face crop over the face box.
        lost_face_strength: strength for faces that the model painted with a few latents; None
            for that of their size, see `closeup.faces.FaceDefaults`.
        face_steps: steps of the face pass's schedule; None for those of the picture.
        components: the exported graphs.
        limits: of the plans; None when the graphs themselves are served.
    """

    name: str
    family: str
    native_px: int
    vae_scale_factor: int
    scaling_factor: float
    shift_factor: float
    scheduler: Mapping[str, Any]
    encoders: tuple[TextEncoder, ...]
    precision: str
    max_batch: int
    lora: LoraLayout | None
    zero_empty_negative: bool = False
    guidance_embeds: bool = False
    defaults: Defaults = field(default_factory=Defaults)
    face_prompt_suffix: str = ""
    face_crop_factor: float = DEFAULT_CROP_FACTOR
    lost_face_strength: float | None = None
    face_steps: int | None = None
    components: tuple[Component, ...] = ()
    limits: EngineLimits | None = None
    format: int = MANIFEST_FORMAT

    @property
    def facts(self) -> Family:
        """The family's row."""
        return family_named(self.family)

    @property
    def face_defaults(self) -> FaceDefaults:
        """What the model says about the face pass."""
        return FaceDefaults(
            crop_factor=self.face_crop_factor,
            lost_strength=self.lost_face_strength,
            latent_px=self.vae_scale_factor,
        )

    @property
    def denoiser(self) -> str:
        """Triton model that runs denoising steps."""
        return f"{self.name}_denoiser"

    def encoder_model(self, encoder: TextEncoder) -> str:
        """Return the Triton model of a text encoder without LoRA inputs."""
        return f"{self.name}_{encoder.name}"

    @property
    def vae_encoder(self) -> str:
        """Triton model from picture to latent moments."""
        return f"{self.name}_vae_encoder"

    @property
    def vae_decoder(self) -> str:
        """Triton model from latents to picture."""
        return f"{self.name}_vae_decoder"


@dataclass(frozen=True, kw_only=True, slots=True)
class UpscalerManifest:
    """The repository's super-resolution model, folder ``upscaler``.

    Attributes:
        scale: output pixels per input pixel of the network.
        tile_px: side of the square tiles it is fed.
        overlap_px: input pixels that neighbouring tiles share.
        max_batch: tiles a call may hold.
        component: the exported graph.
    """

    scale: int
    tile_px: int
    overlap_px: int
    max_batch: int
    component: Component
    format: int = MANIFEST_FORMAT


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceDetectorManifest:
    """The repository's face detector, folder ``face_detector``.

    Attributes:
        component: the exported graph.
    """

    component: Component
    format: int = MANIFEST_FORMAT


def manifest_json(manifest: ModelManifest | UpscalerManifest | FaceDetectorManifest) -> str:
    """Return the text written to ``manifest.json``."""
    return json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"


def read_manifest(path: Path) -> ModelManifest:
    """Read a pipeline's manifest.

    Raises:
        ModelError: missing, damaged, or of another format.
    """
    data = _read_json(path)
    try:
        lora = data.pop("lora")
        limits = data.pop("limits", None)
        return ModelManifest(
            encoders=tuple(_encoder(entry) for entry in data.pop("encoders")),
            lora=None if lora is None else _lora_layout(lora),
            defaults=Defaults(**data.pop("defaults")),
            components=tuple(_component(entry) for entry in data.pop("components")),
            limits=None if limits is None else _limits(limits),
            **data,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def read_upscaler(repository: Path) -> UpscalerManifest | None:
    """Read the upscaler's manifest; None when the repository has none."""
    path = repository / "upscaler" / MANIFEST_NAME
    if not path.exists():
        return None
    data = _read_json(path)
    try:
        return UpscalerManifest(component=_component(data.pop("component")), **data)
    except (KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def read_face_detector(repository: Path) -> FaceDetectorManifest | None:
    """Read the face detector's manifest; None when the repository has none."""
    path = repository / "face_detector" / MANIFEST_NAME
    if not path.exists():
        return None
    data = _read_json(path)
    try:
        return FaceDetectorManifest(component=_component(data.pop("component")), **data)
    except (KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def read_index(repository: Path) -> list[str]:
    """Return the names of the pipelines, the default first; empty when none was exported.

    Raises:
        ModelError: the index is damaged.
    """
    path = repository / INDEX_NAME
    if not path.exists():
        return []
    names = _read_json(path).get("models")
    if not isinstance(names, list):
        raise _damaged(path, TypeError("no list of models"))
    return [str(name) for name in names]


def read_models(repository: Path) -> dict[str, ModelManifest]:
    """Read every pipeline of a repository, the default first.

    A pipeline whose manifest cannot be read is left out, with one line in the log, so that it takes
    none of the others down; the first of the rest is then the default.

    Raises:
        ModelError: the index is damaged.
    """
    models: dict[str, ModelManifest] = {}
    for name in read_index(repository):
        try:
            manifest = read_manifest(repository / f"{name}_denoiser" / MANIFEST_NAME)
            family_named(manifest.family)
        except ModelError as error:
            _LOGGER.error("%s is not served: %s", name, error)
        else:
            models[name] = manifest
    return models


def _encoder(data: Mapping[str, Any]) -> TextEncoder:
    return TextEncoder(
        name=data["name"],
        tokenizer=Tokenizer(**data["tokenizer"]),
        outputs=tuple(data["outputs"]),
        lora=None if data["lora"] is None else _lora_layout(data["lora"]),
    )


def _lora_layout(data: Mapping[str, Any]) -> LoraLayout:
    return LoraLayout(
        max_rank=data["max_rank"], layers=tuple(LoraLayer(**entry) for entry in data["layers"])
    )


def _limits(data: Mapping[str, Any]) -> EngineLimits:
    fields = dict(data)
    sizes = tuple(SizeRange(**entry) for entry in fields.pop("sizes"))
    return EngineLimits(sizes=sizes, **fields)


def _component(data: Mapping[str, Any]) -> Component:
    fields = dict(data)
    return Component(checks=tuple(fields.pop("checks")), **fields)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing: export the model again.") from error
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(data, dict):
        raise _damaged(path, TypeError("not a JSON object"))
    if data.get("format", MANIFEST_FORMAT) != MANIFEST_FORMAT:
        raise ModelError(
            f"{path} has format {data['format']!r}, this version reads {MANIFEST_FORMAT}: "
            "export the model again."
        )
    return data


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} is damaged ({error}): export the model again.")
