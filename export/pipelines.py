"""A diffusers pipeline of the SD 1.5 family, loaded for export."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from transformers import CLIPTokenizer, CLIPTokenizerFast

from closeup.errors import ExportError
from closeup.manifest import Tokenizer
from export.graphs import quiet_exporters

TOKENIZER_NAME = "tokenizer.json"
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
# Both tokenizers must give the same ids for these: case, punctuation, digits, accents, repeated
# spaces, a long word, an empty prompt.
_SAMPLE_TEXTS = (
    "a photo of an ohwx woman, full body, standing in a forest",
    "Hello, WORLD!  It's 3.14159 -- don't    stop (really)",
    "café naïve señor über",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "blurry, low quality\nworst",
    "",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedPipeline:
    """The parts of a pipeline, in float32, on the CPU.

    Attributes:
        text_encoder: CLIPTextModel.
        unet: UNet2DConditionModel.
        vae: AutoencoderKL.
        scheduler: content of scheduler_config.json.
    """

    text_encoder: Any
    unet: Any
    vae: Any
    scheduler: dict[str, Any]


def load_pipeline(folder: Path) -> LoadedPipeline:
    """Load a pipeline from safetensors, upcast to float32.

    Raises:
        ExportError: another kind of pipeline, pickled weights, or something missing.
    """
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind not in _PIPELINES:
        raise ExportError(
            f"{folder} is a {kind}: only Stable Diffusion 1.5's pipeline "
            f"({_PIPELINES[0]}) can be exported so far."
        )
    _refuse_pickles(folder)
    disable_progress_bar()
    try:
        with quiet_exporters():
            pipeline = StableDiffusionPipeline.from_pretrained(
                folder,
                torch_dtype=torch.float32,
                use_safetensors=True,
                safety_checker=None,
                requires_safety_checker=False,
                local_files_only=True,
            )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"{folder} cannot be loaded as a pipeline: {reason}") from error
    return LoadedPipeline(
        text_encoder=pipeline.text_encoder,
        unet=pipeline.unet,
        vae=pipeline.vae,
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
    )


def write_tokenizer(folder: Path, path: Path) -> Tokenizer:
    """Write the pipeline's CLIP tokenizer as one file of the `tokenizers` library.

    Args:
        folder: of the pipeline.
        path: the file to write.

    Returns:
        The manifest's entry.

    Raises:
        ExportError: it is missing, or its ids differ from transformers' own tokenizer.
    """
    source = folder / "tokenizer"
    try:
        slow = CLIPTokenizer.from_pretrained(source, local_files_only=True)
        fast = CLIPTokenizerFast.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"{source} cannot be loaded as a CLIP tokenizer: {reason}") from error
    for text in _SAMPLE_TEXTS:
        expected = slow(text, truncation=True, max_length=slow.model_max_length).input_ids
        got = fast(text, truncation=True, max_length=slow.model_max_length).input_ids
        if got != expected:
            raise ExportError(
                f"{source}: the tokenizers library reads {text!r} as {got}, transformers' "
                f"CLIPTokenizer as {expected}."
            )
    fast.backend_tokenizer.no_truncation()
    fast.backend_tokenizer.no_padding()
    path.parent.mkdir(parents=True, exist_ok=True)
    fast.backend_tokenizer.save(str(path))
    return Tokenizer(
        path=path.name,
        max_tokens=int(slow.model_max_length),
        bos_token_id=int(slow.bos_token_id),
        eos_token_id=int(slow.eos_token_id),
        pad_token_id=int(slow.pad_token_id),
    )


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


def _refuse_pickles(folder: Path) -> None:
    for part in ("unet", "vae", "text_encoder"):
        if not any((folder / part).glob("*.safetensors")):
            raise ExportError(
                f"{folder / part} has no .safetensors file: pickled weights are not loaded, since "
                "opening them can run code; save the pipeline with safe_serialization=True."
            )
