"""What files call the layers of a bank: diffusers' names, and those of the original code.

All spellings are looked up in one table made from the layout, so nothing is guessed back from
underscores. FLUX.1's original code joins projections that diffusers keeps apart (q, k and v, and
in the single blocks the MLP's first layer): one layer of such a file is several of the bank's.

Source: diffusers, scripts/convert_flux_to_diffusers.py for which layer is which; kohya-ss
sd-scripts, networks/lora_flux.py for the joined layers' names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from closeup.manifest import LoraLayer


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What one module of a file adapts.

    Attributes:
        places: in the layout; several where the file's layer joins their outputs in this order.
        swaps_halves: the file's outputs come as (shift, scale), the bank's as (scale, shift).
    """

    places: tuple[int, ...]
    swaps_halves: bool = False


class LayerNames:
    """Finds a network's layers by any of the spellings a file may use for them.

    Args:
        layers: of the layout, named as in diffusers.
    """

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        places = {layer.name: place for place, layer in enumerate(layers)}
        self._targets: dict[str, Target] = {}
        for alias, names in _aliases(list(places)):
            if all(name in places for name in names):
                target = Target(
                    places=tuple(places[name] for name in names),
                    swaps_halves=alias == _FLUX_FINAL,
                )
                self._targets.setdefault(alias, target)
                self._targets.setdefault(alias.replace(".", "_"), target)

    def find(self, module: str) -> Target | None:
        """Return what a module adapts, None when the layout has no such layer.

        Args:
            module: as the file spells it, without the prefix that names the network.
        """
        return self._targets.get(module.replace(".processor", ""))


def _aliases(names: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Spellings and what each means, the surest first."""
    per_block = _layers_per_block(names)
    for name in names:
        yield name, (name,)
    for name in names:
        yield name.removesuffix(".0") if name.endswith(".to_out.0") else name, (name,)
        yield original_name(name, per_block), (name,)
        yield from _clip_aliases(name)
    yield from _flux_aliases(names)


def _clip_aliases(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for ours, theirs in _CLIP_ATTENTION.items():
        if name.endswith(f".self_attn.{ours}"):
            yield f"{name.removesuffix(ours)}{theirs}", (name,)
    if name.startswith("text_model."):
        yield name.removeprefix("text_model."), (name,)
    elif name.startswith("encoder.layers."):
        yield f"text_model.{name}", (name,)


# How diffusers' first LoRA files call CLIP's projections.
_CLIP_ATTENTION: Mapping[str, str] = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "out_proj": "to_out",
}


def original_name(name: str, layers_per_block: int) -> str:
    """Return how the original Stable Diffusion code calls a UNet module of diffusers.

    Args:
        name: such as ``down_blocks.1.attentions.0.proj_in``.
        layers_per_block: residual blocks of a down block.

    Returns:
        Such as ``input_blocks.4.1.proj_in``; the name itself when it has no such form.
    """
    for ours, theirs in _ORIGINAL_LEAVES.items():
        name = name.replace(ours, theirs)
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if match:
        index = int(match[2]) * (layers_per_block + 1) + int(match[4])
        block = f"input_blocks.{index + 1}" if match[1] == "down" else f"output_blocks.{index}"
        return f"{block}.{int(match[3] == 'attentions')}.{match[5]}"
    match = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if match:
        index = 2 * int(match[2]) + int(match[1] == "attentions")
        return f"middle_block.{index}.{match[3]}"
    return name


_ORIGINAL_LEAVES: Mapping[str, str] = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _layers_per_block(names: Iterable[str]) -> int:
    found = (re.match(r"down_blocks\.\d+\.(?:resnets|attentions)\.(\d+)\.", name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=1)


def _flux_aliases(names: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    found = (re.match(r"((?:single_)?transformer_blocks)\.(\d+)\.", name) for name in names)
    blocks = {(match[1], match[2]) for match in found if match}
    if not blocks:
        return
    for kind, number in sorted(blocks):
        original, leaves = _FLUX_BLOCKS[kind]
        for theirs, ours in leaves.items():
            yield (
                f"{original}.{number}.{theirs}",
                tuple(f"{kind}.{number}.{leaf}" for leaf in ours),
            )
    for theirs, name in _FLUX_WHOLE.items():
        yield theirs, (name,)


_IMAGE_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_FLUX_FINAL = "final_layer.adaLN_modulation.1"

_FLUX_BLOCKS: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] = {
    "transformer_blocks": (
        "double_blocks",
        {
            "img_attn.qkv": _IMAGE_QKV,
            "txt_attn.qkv": _TEXT_QKV,
            "img_attn.proj": ("attn.to_out.0",),
            "txt_attn.proj": ("attn.to_add_out",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
            "img_mod.lin": ("norm1.linear",),
            "txt_mod.lin": ("norm1_context.linear",),
            # XLabs' attention processors
            "qkv_lora1": _IMAGE_QKV,
            "qkv_lora2": _TEXT_QKV,
            "proj_lora1": ("attn.to_out.0",),
            "proj_lora2": ("attn.to_add_out",),
        },
    ),
    "single_transformer_blocks": (
        "single_blocks",
        {
            "linear1": (*_IMAGE_QKV, "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation.lin": ("norm.linear",),
            "qkv": _IMAGE_QKV,  # XLabs
        },
    ),
}

_FLUX_WHOLE: Mapping[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    _FLUX_FINAL: "norm_out.linear",
    "final_layer.linear": "proj_out",
}
