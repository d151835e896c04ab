"""Tiny pipelines with random weights, shaped like Stable Diffusion 1.5, for tests.

A few hundred thousand parameters; every network's output is scaled to a spread that real weights
give, so that a wrong step, a missing layer or a zero shows in the comparison.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from export.upscalers import RRDBNet, SRVGGNetCompact

CONTEXT = 32
TOKENS = 77
WORDS = ("a", "photo", "of", "the", "woman", "man", "face", "close", "up", "forest", "red", "coat")
SCHEDULER: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def write_tiny_pipeline(
    folder: Path,
    *,
    seed: int = 0,
    scheduler: Mapping[str, Any] = SCHEDULER,
    linear_projection: bool = False,
) -> Path:
    """Save a random `StableDiffusionPipeline` into ``folder``, native size 64x64 px.

    Args:
        folder: made when missing.
        seed: of the weights.
        scheduler: arguments of DDIMScheduler, whose config is saved; samplers are built from it.
        linear_projection: project into the transformers with linear layers, not convolutions.

    Returns:
        ``folder``.
    """
    pipeline = StableDiffusionPipeline(
        vae=make_tiny_vae(seed + 1),
        text_encoder=make_tiny_text_encoder(seed + 2, write_tiny_tokenizer(folder / "tokenizer")),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=make_tiny_unet(seed, linear_projection=linear_projection),
        scheduler=DDIMScheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def make_tiny_unet(seed: int = 0, *, linear_projection: bool = False) -> UNet2DConditionModel:
    """Make a UNet of three levels (so latent sides need not be multiples of 4), 4 channels."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=CONTEXT,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        use_linear_projection=linear_projection,
    ).eval()
    with torch.no_grad():
        sample = torch.randn(2, 4, 16, 16)
        out = unet(sample, torch.tensor([10.0, 800.0]), torch.randn(2, TOKENS, CONTEXT)).sample
        _scale(unet.conv_out, 1.0 / out.std())
    return unet


def make_tiny_vae(seed: int = 1) -> AutoencoderKL:
    """Make a VAE of factor 8 with 4 latent channels."""
    torch.manual_seed(seed)
    blocks = 4
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.18215,
    ).eval()
    with torch.no_grad():
        latents = torch.randn(2, 4, 8, 8) / 0.18215
        _scale(vae.decoder.conv_out, 0.4 / vae.decode(latents).sample.std())
    return vae


def make_tiny_text_encoder(seed: int, vocabulary: int) -> CLIPTextModel:
    """Make a CLIP text encoder of two layers for a tokenizer of ``vocabulary`` tokens."""
    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=CONTEXT,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
            # The library's 0.02 leaves a tiny network's attention uniform.
            initializer_factor=4.0,
        )
    ).eval()


def write_tiny_tokenizer(folder: Path) -> int:
    """Write a CLIP tokenizer: single bytes, and merges that make `WORDS`; returns its size."""
    letters = list(_byte_letters())
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
            if pair not in merges:
                merges.append(pair)
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: number for number, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS
    ).save_pretrained(folder)
    return len(vocabulary)


def write_tiny_upscaler(path: Path, *, scale: int = 4, seed: int = 3) -> SRVGGNetCompact:
    """Write random weights of a compact upscaler, keys under ``params.``; returns the network."""
    torch.manual_seed(seed)
    network = SRVGGNetCompact(features=8, convolutions=2, scale=scale).eval()
    save_file({f"params.{key}": value for key, value in network.state_dict().items()}, path)
    return network


def write_tiny_rrdb(path: Path, *, scale: int, seed: int = 4) -> RRDBNet:
    """Write random weights of an RRDBNet, keys under ``params_ema.``; returns the network."""
    torch.manual_seed(seed)
    network = RRDBNet(features=8, growth=4, blocks=2, scale=scale).eval()
    save_file({f"params_ema.{key}": value for key, value in network.state_dict().items()}, path)
    return network


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in CLIP's vocabulary, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _scale(conv: nn.Conv2d, factor: torch.Tensor) -> None:
    conv.weight.mul_(factor)
    if conv.bias is not None:
        conv.bias.mul_(factor)
