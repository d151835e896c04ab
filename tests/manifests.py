"""A pipeline's manifest for tests that need no weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from closeup.manifest import LoraLayer, LoraLayout, ModelManifest, TextEncoder, Tokenizer

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.39.0",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def make_manifest(**changes: Any) -> ModelManifest:
    """Return an SD 1.5 manifest of native size 512 with one LoRA layer."""
    manifest = ModelManifest(
        name="toy",
        family="sd15",
        native_px=512,
        vae_scale_factor=8,
        scaling_factor=0.18215,
        shift_factor=0.0,
        scheduler=SCHEDULER,
        encoders=(
            TextEncoder(
                name="text_encoder",
                tokenizer=Tokenizer(
                    path="tokenizer.json",
                    max_tokens=77,
                    bos_token_id=0,
                    eos_token_id=1,
                    pad_token_id=1,
                ),
            ),
        ),
        precision="fp32",
        max_batch=4,
        lora=LoraLayout(
            max_rank=8, layers=(LoraLayer(name="a.to_q", in_features=4, out_features=6),)
        ),
        face_prompt_suffix=", close up of the face",
    )
    return replace(manifest, **changes)
