"""Tiny pipelines with random weights, of the true classes of each family, for tests.

A few hundred thousand parameters; every network's output is scaled to a spread that real weights
give, so that a wrong step, a missing layer or a zero shows in the comparison.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from export.upscalers import RRDBNet, SRVGGNetCompact

CONTEXT = 32
CONTEXT_2 = 48
POOLED = 40
TOKENS = 77
T5_CONTEXT = 32
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
    full_attention: bool = True,
) -> Path:
    """Save a random `StableDiffusionPipeline` into ``folder``, native size 64x64 px.

    Args:
        folder: made when missing.
        seed: of the weights.
        scheduler: arguments of DDIMScheduler, whose config is saved; samplers are built from it.
        linear_projection: project into the transformers with linear layers, not convolutions.
        full_attention: attend among all latent pixels, not from half their number a side on alone;
            at 896x1152 px that takes gigabytes.

    Returns:
        ``folder``.
    """
    unet = make_tiny_unet(seed, linear_projection=linear_projection, full_attention=full_attention)
    pipeline = StableDiffusionPipeline(
        vae=make_tiny_vae(seed + 1),
        text_encoder=make_tiny_text_encoder(seed + 2, write_tiny_tokenizer(folder / "tokenizer")),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def write_tiny_sdxl(
    folder: Path,
    *,
    seed: int = 0,
    scheduler: Mapping[str, Any] = SCHEDULER,
    force_zeros: bool = True,
) -> Path:
    """Save a random `StableDiffusionXLPipeline` into ``folder``, native size 64x64 px.

    Args:
        folder: made when missing.
        seed: of the weights.
        scheduler: arguments of EulerDiscreteScheduler; what it does not take is left out.
        force_zeros: without a negative prompt its embeddings are zeros.

    Returns:
        ``folder``.
    """
    vocabulary = write_tiny_tokenizer(folder / "tokenizer")
    write_tiny_tokenizer(folder / "tokenizer_2", pad_token="!")
    unused = ("clip_sample", "set_alpha_to_one")
    pipeline = StableDiffusionXLPipeline(
        vae=make_tiny_vae(seed + 1, scaling_factor=0.13025),
        text_encoder=make_tiny_text_encoder(seed + 2, vocabulary),
        text_encoder_2=make_tiny_projected_encoder(seed + 3, vocabulary),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=make_tiny_xl_unet(seed),
        scheduler=EulerDiscreteScheduler(
            **{key: value for key, value in scheduler.items() if key not in unused}
        ),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def write_tiny_flux(folder: Path, *, seed: int = 0, guidance_embeds: bool = True) -> Path:
    """Save a random `FluxPipeline` into ``folder``, native size 64x64 px.

    Args:
        folder: made when missing.
        seed: of the weights.
        guidance_embeds: like FLUX.1 dev; otherwise like schnell, whose schedule is not shifted.

    Returns:
        ``folder``.
    """
    vocabulary = write_tiny_tokenizer(folder / "tokenizer")
    words = write_tiny_t5_tokenizer(folder / "tokenizer_2")
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=guidance_embeds, shift=3.0 if guidance_embeds else 1.0
        ),
        vae=make_tiny_vae(
            seed + 1,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=make_tiny_text_encoder(seed + 2, vocabulary),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=make_tiny_t5(seed + 3, words),
        tokenizer_2=T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
        transformer=make_tiny_flux_transformer(seed, guidance_embeds=guidance_embeds),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    facts = {"native_px": 64}
    (folder / "closeup.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def make_tiny_xl_unet(seed: int = 0) -> UNet2DConditionModel:
    """Make a UNet as Stable Diffusion XL's: linear projections, pooled embedding, time ids."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=CONTEXT + CONTEXT_2,
        attention_head_dim=(2, 4, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED + 6 * 8,
    ).eval()
    with torch.no_grad():
        out = unet(
            torch.randn(2, 4, 16, 16),
            torch.tensor([10.0, 800.0]),
            torch.randn(2, TOKENS, CONTEXT + CONTEXT_2),
            added_cond_kwargs={
                "text_embeds": torch.randn(2, POOLED),
                "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
            },
        ).sample
        _scale(unet.conv_out, 1.0 / out.std())
    return unet


def make_tiny_flux_transformer(
    seed: int = 0, *, guidance_embeds: bool = True
) -> FluxTransformer2DModel:
    """Make a FLUX transformer of two double and two single blocks, 16 latent channels."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_CONTEXT,
        pooled_projection_dim=CONTEXT,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "norm_" in name and name.endswith("weight") and parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        out = transformer(
            hidden_states=torch.randn(2, 24, 64),
            timestep=torch.tensor([0.01, 0.8]),
            guidance=torch.tensor([3.5, 2.0]) if guidance_embeds else None,
            pooled_projections=torch.randn(2, CONTEXT),
            encoder_hidden_states=torch.randn(2, 9, T5_CONTEXT),
            txt_ids=torch.zeros(9, 3),
            img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0)),
        ).sample
        _scale(transformer.proj_out, 1.0 / out.std())
    return transformer


def make_tiny_unet(
    seed: int = 0, *, linear_projection: bool = False, full_attention: bool = True
) -> UNet2DConditionModel:
    """Make a UNet of three levels (so latent sides need not be multiples of 4), 4 channels."""
    torch.manual_seed(seed)
    outer = "CrossAttn" if full_attention else ""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=CONTEXT,
        attention_head_dim=2,
        down_block_types=(f"{outer}DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", f"{outer}UpBlock2D"),
        use_linear_projection=linear_projection,
    ).eval()
    with torch.no_grad():
        sample = torch.randn(2, 4, 16, 16)
        out = unet(sample, torch.tensor([10.0, 800.0]), torch.randn(2, TOKENS, CONTEXT)).sample
        _scale(unet.conv_out, 1.0 / out.std())
    return unet


def make_tiny_vae(
    seed: int = 1, *, latent_channels: int = 4, scaling_factor: float = 0.18215, **config: Any
) -> AutoencoderKL:
    """Make a VAE of factor 8."""
    torch.manual_seed(seed)
    blocks = 4
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=64,
        scaling_factor=scaling_factor,
        **config,
    ).eval()
    with torch.no_grad():
        latents = torch.randn(2, latent_channels, 8, 8) / scaling_factor
        _scale(vae.decoder.conv_out, 0.4 / vae.decode(latents).sample.std())
    return vae


def make_tiny_text_encoder(seed: int, vocabulary: int) -> CLIPTextModel:
    """Make a CLIP text encoder of two layers for a tokenizer of ``vocabulary`` tokens."""
    torch.manual_seed(seed)
    return CLIPTextModel(_clip_config(vocabulary, hidden_size=CONTEXT)).eval()


def make_tiny_projected_encoder(seed: int, vocabulary: int) -> CLIPTextModelWithProjection:
    """Make a CLIP text encoder of three layers with a projection of its pooled output."""
    torch.manual_seed(seed)
    config = _clip_config(
        vocabulary,
        hidden_size=CONTEXT_2,
        num_hidden_layers=3,
        projection_dim=POOLED,
        hidden_act="gelu",
    )
    return CLIPTextModelWithProjection(config).eval()


def _clip_config(vocabulary: int, **changes: Any) -> CLIPTextConfig:
    config = {
        "vocab_size": vocabulary,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TOKENS,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
        # The library's 0.02 leaves a tiny network's attention uniform.
        "initializer_factor": 4.0,
    }
    return CLIPTextConfig(**{**config, **changes})


def make_tiny_t5(seed: int, vocabulary: int) -> T5EncoderModel:
    """Make a T5 encoder of two layers with gated feed-forward layers, as FLUX.1's."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=T5_CONTEXT,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config).eval()


def write_tiny_t5_tokenizer(folder: Path) -> int:
    """Write a T5 tokenizer: a unigram model of letters and `WORDS`; returns its size."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(f"\u2581{word}", -4.0) for word in WORDS if len(word) > 1]
    pieces += [(letter, -6.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=512).save_pretrained(
        folder
    )
    return len(pieces)


def write_tiny_tokenizer(folder: Path, *, pad_token: str = "<|endoftext|>") -> int:
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
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=TOKENS,
        pad_token=pad_token,
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


def _scale(conv: nn.Conv2d | nn.Linear, factor: torch.Tensor) -> None:
    conv.weight.mul_(factor)
    if conv.bias is not None:
        conv.bias.mul_(factor)
