"""Which precision each component's weights are exported in.

TensorRT takes types from the graph alone, so precision is decided here and nowhere else. What a
component's network is given and gives back stays float32 at every precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from closeup.errors import ExportError


class Precision(str, Enum):
    """Of a network's weights and arithmetic."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    def __str__(self) -> str:
        return self.value


class Target(str, Enum):
    """What the export writes: graphs alone, or graphs and the plans of a TensorRT."""

    ONNX = "onnx"
    TENSORRT = "tensorrt"
    RTX = "tensorrt-rtx"

    def __str__(self) -> str:
        return self.value


DENOISER = "denoiser"
TEXT_ENCODER, TEXT_ENCODER_2 = "text_encoder", "text_encoder_2"
VAE_ENCODER, VAE_DECODER = "vae_encoder", "vae_decoder"
UPSCALER, FACE_DETECTOR = "upscaler", "face_detector"
COMPONENTS = (
    DENOISER, TEXT_ENCODER, TEXT_ENCODER_2, VAE_ENCODER, VAE_DECODER, UPSCALER, FACE_DETECTOR,
)  # fmt: skip
# Names that stand for several.
_BOTH = {"vae": (VAE_ENCODER, VAE_DECODER)}


def parse_component_precisions(entries: list[str]) -> dict[str, Precision]:
    """Read ``--component-precision vae=bf16 text_encoder=fp32``.

    Raises:
        ExportError: an unknown component or precision.
    """
    chosen: dict[str, Precision] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        names = _BOTH.get(name, (name,))
        if not set(names) <= set(COMPONENTS):
            raise ExportError(
                f"--component-precision {entry}: there is no component {name!r}; expected one of "
                f"{', '.join((*COMPONENTS, *_BOTH))}."
            )
        if value not in list(Precision):
            raise ExportError(
                f"--component-precision {entry}: expected {name}=fp32, {name}=fp16 or {name}=bf16."
            )
        chosen |= dict.fromkeys(names, Precision(value))
    return chosen


def resolve_precision(
    component: str,
    *,
    target: Target,
    precision: Precision,
    chosen: Mapping[str, Precision],
    is_t5: bool = False,
) -> Precision:
    """Return a component's precision.

    Args:
        component: one of `COMPONENTS`.
        target: of the export.
        precision: of the denoiser, the text encoders and, in plans, the upscaler.
        chosen: by component; wins.
        is_t5: the component is a T5 text encoder.

    Returns:
        What was chosen, else: float32 for the face detector, which is small; bfloat16 for the VAE
        and for T5 in plans of lower precision, since their activations pass float16's range.

    Raises:
        ExportError: a choice that gives broken pictures, or that ONNX Runtime cannot run.
    """
    if component in chosen:
        found = chosen[component]
        _refuse_choice(component, found, is_t5=is_t5 and target is not Target.ONNX)
    elif component == FACE_DETECTOR:
        found = Precision.FP32
    elif component in (VAE_ENCODER, VAE_DECODER):
        plain = target is Target.ONNX or precision is Precision.FP32
        found = Precision.FP32 if plain else Precision.BF16
    elif component == UPSCALER and target is Target.ONNX:
        found = Precision.FP32
    elif is_t5 and precision is Precision.FP16 and target is not Target.ONNX:
        found = Precision.BF16
    else:
        found = precision
    if found is Precision.BF16 and target is Target.ONNX:
        raise ExportError(
            f"the {component} in bf16 is for TensorRT plans only, ONNX Runtime lacks most of its "
            "operations: expected --target tensorrt or tensorrt-rtx, or fp32 or fp16."
        )
    return found


def _refuse_choice(component: str, choice: Precision, *, is_t5: bool) -> None:
    is_vae = component in (VAE_ENCODER, VAE_DECODER)
    if choice is Precision.FP16 and (is_vae or is_t5):
        raise ExportError(
            f"--component-precision {component}=fp16: its activations pass float16's range, which "
            f"gives black pictures; expected {component}=bf16 or {component}=fp32."
        )
    if component == FACE_DETECTOR and choice is not Precision.FP32:
        raise ExportError(
            f"--component-precision face_detector={choice}: the detector's boxes need float32; "
            "expected face_detector=fp32."
        )
