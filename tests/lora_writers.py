"""LoRA files in the key styles that trainers write, made from one set of random factors."""

from __future__ import annotations

import json
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


def _kohya_original(name: str) -> tuple[str, str, str]:
    return _kohya(original_name(name, 1))


STYLES: Mapping[str, Callable[[str], tuple[str, str, str]]] = {
    "peft": _peft,
    "peft_default": _peft_default,
    "diffusers": _diffusers,
    "diffusers_down_up": _diffusers_down_up,
    "processor": _processor,
    "kohya": _kohya,
    "kohya_original": _kohya_original,
}


def tensors_from_factors(
    factors: Factors, style: str, *, conv_names: tuple[str, ...] = ()
) -> dict[str, npt.NDArray[Any]]:
    """Name the factors in a style; those of `conv_names` get two more dimensions of size 1."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, layer in factors.items():
        down_key, up_key, alpha_key = STYLES[style](name)
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
