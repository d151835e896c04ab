"""How a diffusers pipeline of each family lies on disk: one table.

Reads ``model_index.json`` and the components' configs; loads no weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from closeup.errors import ExportError
from closeup.families import FLUX, SD15, SDXL, Family

INDEX_NAME = "model_index.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderLayout:
    """A text encoder of a pipeline.

    Attributes:
        name: its folder.
        class_name: in transformers.
        tokenizer: the folder of its tokenizer.
        outputs: what the denoiser takes from it: ``context``, ``pooled``, or both.
        hidden_layer: the entry of ``hidden_states`` that is the context; None: the last layer's
            output after the final layer norm.
        takes_lora: whether LoRAs for it exist.
    """

    name: str
    class_name: str
    tokenizer: str
    outputs: tuple[str, ...]
    hidden_layer: int | None = None
    takes_lora: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineLayout:
    """The components of a family's pipeline.

    Attributes:
        family: the family's facts.
        pipelines: values of ``_class_name`` that mean this family; the first is the plain one.
        denoiser: folder of the denoiser.
        denoiser_class: in diffusers.
        encoders: in the order in which their contexts are joined.
    """

    family: Family
    pipelines: tuple[str, ...]
    denoiser: str
    denoiser_class: str
    encoders: tuple[EncoderLayout, ...]

    @property
    def components(self) -> tuple[str, ...]:
        """Folders that hold weights."""
        return (self.denoiser, "vae", *(encoder.name for encoder in self.encoders))


def _names(stem: str) -> tuple[str, ...]:
    return (f"{stem}Pipeline", f"{stem}Img2ImgPipeline", f"{stem}InpaintPipeline")


SD15_LAYOUT = PipelineLayout(
    family=SD15,
    pipelines=_names("StableDiffusion"),
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    encoders=(
        EncoderLayout(
            name="text_encoder",
            class_name="CLIPTextModel",
            tokenizer="tokenizer",
            outputs=("context",),
        ),
    ),
)

SDXL_LAYOUT = PipelineLayout(
    family=SDXL,
    pipelines=_names("StableDiffusionXL"),
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    encoders=(
        EncoderLayout(
            name="text_encoder",
            class_name="CLIPTextModel",
            tokenizer="tokenizer",
            outputs=("context",),
            hidden_layer=-2,
        ),
        EncoderLayout(
            name="text_encoder_2",
            class_name="CLIPTextModelWithProjection",
            tokenizer="tokenizer_2",
            outputs=("context", "pooled"),
            hidden_layer=-2,
        ),
    ),
)

FLUX_LAYOUT = PipelineLayout(
    family=FLUX,
    pipelines=_names("Flux"),
    denoiser="transformer",
    denoiser_class="FluxTransformer2DModel",
    encoders=(
        EncoderLayout(
            name="text_encoder",
            class_name="CLIPTextModel",
            tokenizer="tokenizer",
            outputs=("pooled",),
        ),
        EncoderLayout(
            name="text_encoder_2",
            class_name="T5EncoderModel",
            tokenizer="tokenizer_2",
            outputs=("context",),
            takes_lora=False,
        ),
    ),
)

LAYOUTS: tuple[PipelineLayout, ...] = (SD15_LAYOUT, SDXL_LAYOUT, FLUX_LAYOUT)


def layout_of(folder: Path) -> PipelineLayout:
    """Return the layout of the pipeline in ``folder``.

    Raises:
        ExportError: another kind of pipeline, one without all its parts, or no pipeline.
    """
    index = read_json(folder / INDEX_NAME)
    kind = index.get("_class_name")
    for layout in LAYOUTS:
        if kind in layout.pipelines:
            _refuse_other_parts(folder, index, layout)
            return layout
    known = ", ".join(layout.pipelines[0] for layout in LAYOUTS)
    raise ExportError(
        f"{folder} is a {kind}: expected one of {known}, or their image-to-image and inpainting "
        "forms."
    )


def _refuse_other_parts(folder: Path, index: Mapping[str, Any], layout: PipelineLayout) -> None:
    expected = {layout.denoiser: layout.denoiser_class}
    expected |= {encoder.name: encoder.class_name for encoder in layout.encoders}
    for part, class_name in expected.items():
        entry = index.get(part)
        if not isinstance(entry, list) or len(entry) < 2 or entry[1] is None:
            raise ExportError(
                f"{folder} has no {part}: a {layout.pipelines[0]} without it (a refiner?) cannot "
                "be exported."
            )
        if entry[1] != class_name:
            raise ExportError(f"{folder}: {part} is a {entry[1]}; expected {class_name}.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a pipeline's folder.

    Raises:
        ExportError: missing or damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"{path} is missing: expected a diffusers pipeline.") from error
    except ValueError as error:
        raise ExportError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ExportError(f"{path} is not a JSON object.")
    return data
