"""The components of a diffusers pipeline, loaded one at a time."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils.logging import disable_progress_bar

from closeup.errors import ExportError
from export.graphs import quiet_exporters
from export.layouts import PipelineLayout, read_json

VAE = "vae"
_VAE_CLASS = "AutoencoderKL"
# model.fp16.safetensors, diffusion_pytorch_model.fp16-00001-of-00002.safetensors
_VARIANT = re.compile(r"\.(\w+)(-\d+-of-\d+)?\.safetensors$")


def load_component(
    folder: Path, layout: PipelineLayout, part: str, dtype: torch.dtype
) -> torch.nn.Module:
    """Load one component from safetensors, on the CPU.

    Args:
        folder: of the pipeline.
        layout: its family's.
        part: the component's folder.
        dtype: of the weights; T5 keeps some of its layers in float32.

    Raises:
        ExportError: pickled weights, or something missing or damaged.
    """
    kind = component_class(layout, part)
    files = [path.name for path in sorted((folder / part).glob("*.safetensors"))]
    if not files:
        raise ExportError(
            f"{folder / part} has no .safetensors file: pickled weights are not loaded, since "
            "opening them can run code; save the pipeline with safe_serialization=True."
        )
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    if variant := _only_variant(files):
        options["variant"] = variant
    options["torch_dtype" if hasattr(diffusers, kind.__name__) else "dtype"] = dtype
    disable_progress_bar()
    try:
        with quiet_exporters():
            module: torch.nn.Module = kind.from_pretrained(folder / part, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"{folder / part} cannot be loaded: {reason}") from error
    _refuse_overflow(module, folder / part, dtype)
    return module.eval().requires_grad_(False)


def component_class(layout: PipelineLayout, part: str) -> Any:
    """Return the class of a component, in diffusers or transformers."""
    if part == VAE:
        return getattr(diffusers, _VAE_CLASS)
    if part == layout.denoiser:
        return getattr(diffusers, layout.denoiser_class)
    names = {encoder.name: encoder.class_name for encoder in layout.encoders}
    return getattr(transformers, names[part])


def component_config(folder: Path, layout: PipelineLayout, part: str) -> dict[str, Any]:
    """Return a diffusers component's config, its class's defaults included."""
    parameters = inspect.signature(component_class(layout, part).__init__).parameters
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return {**defaults, **read_json(folder / part / "config.json")}


def refuse_pickles(folder: Path, layout: PipelineLayout) -> None:
    """Refuse a pipeline whose weights are not safetensors, before anything is exported.

    Raises:
        ExportError: a component has none.
    """
    for part in layout.components:
        if not any((folder / part).glob("*.safetensors")):
            raise ExportError(
                f"{folder / part} has no .safetensors file: pickled weights are not loaded, since "
                "opening them can run code; save the pipeline with safe_serialization=True."
            )


def _refuse_overflow(module: torch.nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Refuse bfloat16 or float32 weights that are too large for float16."""
    if dtype is not torch.float16:
        return
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ExportError(
                f"{folder}: {name} has values that float16 cannot hold; export with "
                "--precision fp32."
            )


def _only_variant(files: list[str]) -> str | None:
    """The variant of the files when there are no plain ones."""
    found = [_VARIANT.search(name) for name in files]
    variants = sorted({match[1] for match in found if match})
    return variants[0] if variants and all(found) else None
