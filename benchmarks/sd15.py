"""Write a pipeline of Stable Diffusion 1.5's architecture with random weights.

The sizes are those of the published configuration files; the tokenizer is the demo's own, whose
ids all lie inside CLIP's vocabulary.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.subjects import WEIGHTS

SEED = 20
# Makes the file half as large; both sides compute in float32 all the same.
DTYPE = torch.float16


def write_sd15(folder: Path, tokenizer: Path) -> None:
    """Write the pipeline to ``folder``; ``tokenizer`` is copied into it."""
    torch.manual_seed(SEED)
    parts = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(parts, ignore_errors=True)
    UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=768,
        norm_num_groups=32,
    ).to(DTYPE).save_pretrained(parts / "unet")
    AutoencoderKL(
        sample_size=512,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=32,
        scaling_factor=0.18215,
    ).to(DTYPE).save_pretrained(parts / "vae")
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=725,
        eos_token_id=726,
        pad_token_id=726,
    )
    CLIPTextModel(text).to(DTYPE).save_pretrained(parts / "text_encoder")
    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(parts / "scheduler")
    shutil.copytree(tokenizer, parts / "tokenizer")
    (parts / "model_index.json").write_text(json.dumps(_INDEX, indent=1), encoding="utf-8")
    parts.rename(folder)


_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    write_sd15(parser.parse_args().out, WEIGHTS / "sd" / "tokenizer")
