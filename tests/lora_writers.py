"""LoRA files in the key styles that trainers write, made from one set of random factors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from closeup.lora import LoraWeights, layer_starts
from closeup.lora_keys import DENOISER
from closeup.lora_names import original_name
from closeup.lora_read import read_lora
from closeup.manifest import LoraLayer, LoraLayout

Floats = npt.NDArray[np.float32]
Style = Callable[[str], tuple[str, str, str]]  # layer -> keys of down, up and alpha


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerFactors:
    """down (r, in), up (out, r), alpha None where the file has none."""

    down: Floats
    up: Floats
    alpha: float | None

    @property
    def delta(self) -> Floats:
        """What the layer's weight gains, (out, in), computed in float64."""
        rank = len(self.down)
        scale = 1.0 if self.alpha is None else self.alpha / rank
        return (scale * self.up.astype(np.float64) @ self.down.astype(np.float64)).astype("f4")


Factors = dict[str, LayerFactors]


def random_factors(
    layers: tuple[LoraLayer, ...],
    *,
    seed: int,
    ranks: tuple[int, ...] = (4,),
    alphas: tuple[float | None, ...] = (None,),
    scale: float = 0.1,
) -> Factors:
    """Factors for every layer; ranks and alphas are dealt out in turn."""
    rng = np.random.default_rng(seed)
    factors = {}
    for index, layer in enumerate(layers):
        rank = ranks[index % len(ranks)]
        factors[layer.name] = LayerFactors(
            down=(rng.standard_normal((rank, layer.in_features)) * scale).astype(np.float32),
            up=(rng.standard_normal((layer.out_features, rank)) * scale).astype(np.float32),
            alpha=alphas[index % len(alphas)],
        )
    return factors


def _peft(name: str) -> tuple[str, str, str]:
    return f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight", ""


def _peft_default(name: str) -> tuple[str, str, str]:
    stem = f"base_model.model.unet.{name}"
    return f"{stem}.lora_A.default.weight", f"{stem}.lora_B.default.weight", ""


def _diffusers(name: str) -> tuple[str, str, str]:
    return f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight", f"unet.{name}.alpha"


def _diffusers_down_up(name: str) -> tuple[str, str, str]:
    return f"unet.{name}.lora.down.weight", f"unet.{name}.lora.up.weight", f"unet.{name}.alpha"


def _processor(name: str) -> tuple[str, str, str]:
    parent, _, leaf = name.removesuffix(".0").rpartition(".")
    stem = f"unet.{parent}.processor.{leaf}_lora"
    return f"{stem}.down.weight", f"{stem}.up.weight", ""


def _kohya(name: str) -> tuple[str, str, str]:
    stem = "lora_unet_" + name.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def kohya_original_style(layers_per_block: int) -> Style:
    """Kohya keys with the blocks counted as in the original Stable Diffusion code."""
    return lambda name: _kohya(original_name(name, layers_per_block))


def _transformer(name: str) -> tuple[str, str, str]:
    return f"transformer.{name}.lora_A.weight", f"transformer.{name}.lora_B.weight", ""


def _lora_transformer(name: str) -> tuple[str, str, str]:
    stem = "lora_transformer_" + name.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


STYLES: Mapping[str, Style] = {
    "peft": _peft,
    "peft_default": _peft_default,
    "diffusers": _diffusers,
    "diffusers_down_up": _diffusers_down_up,
    "processor": _processor,
    "kohya": _kohya,
    "kohya_original": kohya_original_style(1),
    "transformer": _transformer,
    "lora_transformer": _lora_transformer,
}

_KOHYA_TEXT = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def text_style(style: str, network: str) -> Style:
    """How a text encoder's layers are named.

    Args:
        style: ``diffusers``, ``diffusers_linear`` and ``processor`` (its first two), ``kohya``.
        network: ``text_encoder`` or ``text_encoder_2``.
    """

    def keys(name: str) -> tuple[str, str, str]:
        stem = f"{network}.{name}"
        if style == "diffusers":
            return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", ""
        if style == "diffusers_linear":
            stem += ".lora_linear_layer"
        elif style == "processor":
            stem = stem.replace("out_proj", "to_out") if "out_proj" in stem else re.sub(
                r"([qkv])_proj$", r"to_\1", stem
            )  # fmt: skip
            stem += "_lora"
        else:
            stem = _KOHYA_TEXT[network] + name.replace(".", "_")
            return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"
        return f"{stem}.down.weight", f"{stem}.up.weight", ""

    return keys


def original_flux_sizes(width: int, text: int, channels: int, pooled: int) -> dict[str, Any]:
    """(in, out) of the linear layers in FLUX.1's own code, two blocks of each kind."""
    block = {
        f"{stream}_{leaf}": size
        for stream in ("img", "txt")
        for leaf, size in {
            "attn.qkv": (width, 3 * width), "attn.proj": (width, width),
            "mlp.0": (width, 4 * width), "mlp.2": (4 * width, width),
            "mod.lin": (width, 6 * width),
        }.items()
    }  # fmt: skip
    single = {"linear2": (5 * width, width), "modulation.lin": (width, 3 * width)}
    sizes = {f"double_blocks.{n}.{leaf}": size for n in range(2) for leaf, size in block.items()}
    sizes |= {f"single_blocks.{n}.{leaf}": size for n in range(2) for leaf, size in single.items()}
    for name, size in {"time_in": 256, "vector_in": pooled, "guidance_in": 256}.items():
        sizes |= {f"{name}.in_layer": (size, width), f"{name}.out_layer": (width, width)}
    return sizes | {
        "img_in": (channels, width), "txt_in": (text, width),
        "final_layer.linear": (width, channels),
        "final_layer.adaLN_modulation.1": (width, 2 * width),
    }  # fmt: skip


def tensors_from_factors(
    factors: Factors, style: str | Style, *, conv_names: tuple[str, ...] = ()
) -> dict[str, npt.NDArray[Any]]:
    """Name the factors in a style; those of `conv_names` get two more dimensions of size 1."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    keys = STYLES[style] if isinstance(style, str) else style
    for name, layer in factors.items():
        down_key, up_key, alpha_key = keys(name)
        extra = (1, 1) if name in conv_names else ()
        tensors[down_key] = layer.down.reshape(*layer.down.shape, *extra)
        tensors[up_key] = layer.up.reshape(*layer.up.shape, *extra)
        if layer.alpha is not None:
            if not alpha_key:
                raise ValueError(f"{style} files have no alpha")
            tensors[alpha_key] = np.array(layer.alpha, np.float32)
    return tensors


def write_lora(
    path: Path, tensors: dict[str, npt.NDArray[Any]], config: Mapping[str, Any] | None = None
) -> Path:
    """Save tensors, with diffusers' adapter metadata when `config` is given."""
    metadata = {"format": "pt"}
    if config is not None:
        metadata["lora_adapter_metadata"] = json.dumps(config)
    contiguous = {name: np.ascontiguousarray(t) if t.ndim else t for name, t in tensors.items()}
    save_file(contiguous, path, metadata)
    return path


def delta_of(weights: LoraWeights, layout: LoraLayout, name: str) -> Floats:
    """What the bank rows add to the weight of a layer, (out, in), computed in float64."""
    place = [layer.name for layer in layout.layers].index(name)
    layer = layout.layers[place]
    start = int(layer_starts(layout)[2 * place])
    middle = start + layer.in_features
    down = weights.rows[start:middle].astype(np.float64)
    up = weights.rows[middle : middle + layer.out_features].astype(np.float64)
    return (up @ down.T).astype(np.float32)


def read_denoiser(path: Path, layout: LoraLayout) -> LoraWeights:
    """Read a file for a pipeline that has a denoiser only."""
    return read_lora(path, {DENOISER: layout}).networks[DENOISER]
