"""A Stable Diffusion 1.5 pipeline's weights under the keys of the original checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def write_original_checkpoint(pipeline: Any, path: Path) -> None:
    """Save a `StableDiffusionPipeline` as one file."""
    tensors: dict[str, Tensor] = {}
    layers = pipeline.unet.config.layers_per_block
    blocks = len(pipeline.unet.config.block_out_channels)
    for key, value in pipeline.unet.state_dict().items():
        tensors[f"model.diffusion_model.{unet_key(key, layers, blocks)}"] = value
    for key, value in pipeline.vae.state_dict().items():
        name = vae_key(key, len(pipeline.vae.config.block_out_channels))
        is_projection = re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$", name)
        tensors[f"first_stage_model.{name}"] = value[..., None, None] if is_projection else value
    for key, value in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.{key}"] = value
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)


def unet_key(key: str, layers: int, blocks: int) -> str:
    """The original name of a UNet's weight."""
    found = re.match(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(\w+?)\.(\d+)\.(.*)", key)
    if found is None:
        return replaced(key, _UNET)
    place, block, kind, layer = found[1], int(found[2] or 0), found[3], int(found[4])
    rest = replaced(found[5], _RESNET) if kind == "resnets" else found[5]
    if place == "mid":
        return f"middle_block.{2 * layer if kind == 'resnets' else 1}.{rest}"
    if place == "down":
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        number = 1 + block * (layers + 1) + layer
        return f"input_blocks.{number}.{int(kind == 'attentions')}.{rest}"
    if kind == "upsamplers":
        # After the attention, where the block has one: all but the first.
        return f"output_blocks.{block * (layers + 1) + layers}.{1 if block == 0 else 2}.{rest}"
    number = block * (layers + 1) + layer
    return f"output_blocks.{number}.{int(kind == 'attentions')}.{rest}"


def vae_key(key: str, blocks: int) -> str:
    """The original name of a VAE's weight."""

    def up(match: re.Match[str]) -> str:
        return f"up.{blocks - 1 - int(match[1])}."

    key = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", key)
    key = re.sub(r"up_blocks\.(\d+)\.", up, key)
    key = re.sub(r"(down|up)\.(\d+)\.resnets\.", r"\1.\2.block.", key)
    key = re.sub(r"(down|up)samplers\.0", r"\1sample", key)
    return replaced(key, _VAE)


def replaced(key: str, names: Mapping[str, str]) -> str:
    """Replace whole parts of a dotted name."""
    for old, new in names.items():
        key = re.sub(rf"(^|\.){re.escape(old)}(?=\.)", rf"\g<1>{new}", key)
    return key
