"""A checkpoint that is one .safetensors file in the original key layout, as a pipeline's folder.

It is converted once, one component at a time, into a folder that the export then reads like any
other.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import safe_open

from closeup.errors import ExportError
from export.facts import FOLDER_OPTIONS_NAME
from export.graphs import quiet_exporters, torch_dtype
from export.layouts import (
    FLUX_LAYOUT,
    INDEX_NAME,
    SD15_LAYOUT,
    SDXL_LAYOUT,
    PipelineLayout,
    layout_of,
)
from export.pipelines import VAE
from export.precisions import Precision
from export.scratch import open_scratch

_LAYOUTS: Mapping[str, PipelineLayout] = {"v1": SD15_LAYOUT, "xl": SDXL_LAYOUT, "flux": FLUX_LAYOUT}


@contextlib.contextmanager
def converted_folder(
    path: Path, config: Path | None, precision: Precision, others: Precision, beside: Path
) -> Iterator[Path]:
    """Give a pipeline's folder made from one file; it is gone afterwards.

    Args:
        path: the checkpoint.
        config: a folder with the pipeline's configs and tokenizers, for FLUX.1 with all components
            but the transformer; None: diffusers fetches the configs from the hub.
        precision: of the denoiser.
        others: of the text encoders.
        beside: the repository; the folder lies where its exports work.

    Raises:
        ExportError: no checkpoint of a known family, its configs cannot be had, or the repository
            cannot be written.
    """
    with open_scratch(beside) as scratch:
        folder = scratch / "pipeline"
        folder.mkdir()
        try:
            with quiet_exporters():
                _convert(path, config, torch_dtype(precision), torch_dtype(others), folder)
        except ExportError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            hint = "" if config else " (without the hub, give the pipeline's configs by --config)"
            raise ExportError(f"{path} cannot be read as a checkpoint{hint}: {reason}") from error
        gc.collect()
        yield folder


def family_of_file(path: Path) -> PipelineLayout:
    """Tell the family of a checkpoint by its keys.

    Raises:
        ExportError: no safetensors file, or of no known family.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: _Shape(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ExportError(f"{path} cannot be read as safetensors: {error}") from error
    kind = infer_diffusers_model_type(shapes)
    # diffusers answers v1 for whatever it does not know.
    is_v1 = kind == "v1" and "model.diffusion_model.input_blocks.0.0.weight" in shapes
    layout = None if kind == "v1" and not is_v1 else _LAYOUTS.get(kind.split("_")[0].split("-")[0])
    if layout is None:
        raise ExportError(
            f"{path} is no checkpoint of Stable Diffusion 1.5, XL or FLUX.1 in the original key "
            f"layout (diffusers takes it for {kind!r})."
        )
    return layout


class _Shape:
    """What `infer_diffusers_model_type` asks of a tensor."""

    def __init__(self, shape: list[int]) -> None:
        self.shape = tuple(shape)


def _convert(
    path: Path, config: Path | None, dtype: torch.dtype, others: torch.dtype, folder: Path
) -> None:
    layout = family_of_file(path) if config is None else layout_of(config)
    options: dict[str, Any] = {} if config is None else {"config": str(config)}
    options["local_files_only"] = config is not None
    if layout is FLUX_LAYOUT:
        _adopt_components(path, config, layout, folder)
        _save_part(path, layout.denoiser_class, folder / layout.denoiser, dtype, options)
        return
    kind = getattr(diffusers, layout.pipelines[0])
    # The largest part alone, and the VAE in full precision.
    parts = {layout.denoiser: None, VAE: None}
    pipeline = kind.from_single_file(str(path), torch_dtype=others, **parts, **options)
    pipeline.save_pretrained(folder, safe_serialization=True)
    del pipeline
    gc.collect()
    _save_part(path, layout.denoiser_class, folder / layout.denoiser, dtype, options)
    _save_part(path, "AutoencoderKL", folder / VAE, torch.float32, options)
    _complete_index(folder, layout, config)


def _save_part(
    path: Path, class_name: str, target: Path, dtype: torch.dtype, options: Mapping[str, Any]
) -> None:
    kind = getattr(diffusers, class_name)
    module = kind.from_single_file(str(path), subfolder=target.name, torch_dtype=dtype, **options)
    module.save_pretrained(target, safe_serialization=True)
    del module
    gc.collect()


def _complete_index(folder: Path, layout: PipelineLayout, config: Path | None) -> None:
    """Name the components that were saved alone."""
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    index[layout.denoiser] = ["diffusers", layout.denoiser_class]
    index[VAE] = ["diffusers", "AutoencoderKL"]
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")
    if config is not None and (config / FOLDER_OPTIONS_NAME).exists():
        text = (config / FOLDER_OPTIONS_NAME).read_text(encoding="utf-8")
        (folder / FOLDER_OPTIONS_NAME).write_text(text, encoding="utf-8")


def _adopt_components(
    path: Path, config: Path | None, layout: PipelineLayout, folder: Path
) -> None:
    """Link everything but the transformer from the folder of the configs."""
    if config is None:
        raise ExportError(
            f"{path} holds FLUX.1's transformer alone: give --config, a FLUX.1 pipeline's folder "
            "with the other components."
        )
    for entry in config.iterdir():
        if entry.name != layout.denoiser:
            (folder / entry.name).symlink_to(entry.resolve())
