"""Whole pipelines of the families' published sizes on disk, random weights, made on the device."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from benchmarks.gpu_blocks import NotRun
from benchmarks.gpu_models import Subject, build_network, default_dtype
from benchmarks.subjects import WEIGHTS
from export.detector import STRIDES, FaceDetector, save_face_detector
from tests.tiny_pipelines import (
    write_tiny_flux,
    write_tiny_pipeline,
    write_tiny_sdxl,
    write_tiny_t5_tokenizer,
)

DTYPE = torch.bfloat16
# Weights of the whole pipeline, GB of 2-byte numbers: the published counts of parameters.
WEIGHTS_GB: Mapping[str, float] = {"sd15": 2.2, "sdxl": 7.0, "flux": 34.0}
# Of the pipeline, its graphs and its plans: each of them holds the weights once.
COPIES = 3
# The detector's answer (`write_sure_detector`): a box of this side, px of its own input.
SURE_FACE_PX = 24.0
_TINY: Mapping[str, Callable[[Path], Path]] = {
    "sd15": write_tiny_pipeline,
    "sdxl": write_tiny_sdxl,
    "flux": write_tiny_flux,
}
_BETAS: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
# The first and the last token of the demo's tokenizer; all its ids lie within CLIP's vocabulary.
_CLIP: Mapping[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 725,
    "eos_token_id": 726,
    "pad_token_id": 726,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Maker:
    """Makes modules on a device in `DTYPE`."""

    device: str

    def clip(self, kind: Any = transformers.CLIPTextModel, **sizes: Any) -> nn.Module:
        published = {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "hidden_act": "quick_gelu",
        }  # fmt: skip
        return self.module(kind, transformers.CLIPTextConfig(**{**_CLIP, **published, **sizes}))

    def big_clip(self) -> nn.Module:
        return self.clip(
            transformers.CLIPTextModelWithProjection, hidden_size=1280, intermediate_size=5120,
            num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu", projection_dim=1280,
        )  # fmt: skip

    def t5(self) -> nn.Module:
        config = transformers.T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        )  # fmt: skip
        return self.module(transformers.T5EncoderModel, config)

    def vae(self, **config: Any) -> nn.Module:
        return self.module(
            diffusers.AutoencoderKL, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=32, **config,
        )  # fmt: skip

    def module(self, kind: Any, *config: Any, **sizes: Any) -> nn.Module:
        with self._place(), torch.device(self.device):
            module: nn.Module = kind(*config, **sizes)
        return module.eval()

    def _place(self) -> AbstractContextManager[None]:
        return default_dtype(DTYPE)


def require_space(folder: Path, name: str) -> None:
    """Refuse a pipeline that does not fit on the disk.

    Raises:
        NotRun: says how much is wanted and free.
    """
    wanted_gb = COPIES * WEIGHTS_GB[name]
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < wanted_gb:
        raise NotRun(
            f"pipeline, graphs and plans take {wanted_gb:.0f} GB of scratch space and "
            f"{free_gb:.0f} GB are free; set TMPDIR to a larger disk."
        )


def write_pipeline(subject: Subject, folder: Path, *, device: str, use_tiny: bool) -> None:
    """Write a pipeline with random weights in diffusers layout.

    Args:
        subject: its denoiser.
        folder: new.
        device: where the weights are made.
        use_tiny: of the tests' tiny networks, for a trial.
    """
    if use_tiny:
        _TINY[subject.name](folder)
        return
    torch.manual_seed(0)
    make = {"sd15": _sd15, "sdxl": _sdxl, "flux": _flux}[subject.name]
    network = build_network(subject, device=device, dtype=DTYPE)
    make(_Maker(device=device), network, folder).save_pretrained(folder, safe_serialization=True)


def write_sure_detector(path: Path) -> None:
    """Write a face detector that sees a face in every cell of 32 px, whatever the picture.

    A random picture has no faces. The network is the real one with all its work to do; only the
    last layers ignore what it found. With ``max_faces`` 1 a request repaints one face of
    `SURE_FACE_PX` or a little more, upright, in the upper left.
    """
    torch.manual_seed(0)
    detector = FaceDetector().eval()
    side = SURE_FACE_PX / 32
    # Eyes, nose and corners of the mouth around the cell's middle, in cells.
    points = [(-0.2, -0.15), (0.2, -0.15), (0.0, 0.05), (-0.15, 0.2), (0.15, 0.2)]
    answers = {
        "bbox": [0.5, 0.5, math.log(side), math.log(side)],
        "kps": [0.5 + side * offset for point in points for offset in point],
    }
    with torch.no_grad():
        for index, stride in enumerate(STRIDES):
            logit = 6.0 if stride == 32 else -4.0  # a score of 0.02
            for kind in ("cls", "obj", "bbox", "kps"):
                head = detector.get_submodule(f"heads.{kind}.{index}.depthwise")
                assert isinstance(head, nn.Conv2d)
                assert head.bias is not None
                head.weight.zero_()
                head.bias.copy_(torch.tensor(answers.get(kind, [logit])))
    save_face_detector(detector, path)


def _clip_tokenizer() -> Any:
    return transformers.CLIPTokenizer.from_pretrained(WEIGHTS / "sd" / "tokenizer")


def _sd15(make: _Maker, unet: nn.Module, folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=make.vae(latent_channels=4, sample_size=512, scaling_factor=0.18215),
        text_encoder=make.clip(),
        tokenizer=_clip_tokenizer(),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**_BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(make: _Maker, unet: nn.Module, folder: Path) -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=make.vae(latent_channels=4, sample_size=1024, scaling_factor=0.13025),
        text_encoder=make.clip(projection_dim=768),
        text_encoder_2=make.big_clip(),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**_BETAS),
        add_watermarker=False,
    )


def _flux(make: _Maker, transformer: nn.Module, folder: Path) -> Any:
    write_tiny_t5_tokenizer(folder / "tokenizer_2")
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=make.vae(
            latent_channels=16, sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159,
            use_quant_conv=False, use_post_quant_conv=False,
        ),
        text_encoder=make.clip(),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=make.t5(),
        tokenizer_2=transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
        transformer=transformer,
    )  # fmt: skip


def request_fields(subject: Subject, *, native_px: int) -> dict[str, Any]:
    """Return the request that is timed, without the face pass."""
    return {
        "prompt": "a photo of a woman in a park",
        "seed": 7,
        "steps": subject.steps,
        "cfg_scale": 3.5 if subject.is_flux else 7.0,
        "scheduler": "euler",
        "w": native_px,
        "h": native_px,
    }


def describe_request(fields: Mapping[str, Any]) -> str:
    """Return the request in words, for a table's title."""
    return (
        f"{fields['w']}x{fields['h']}, {fields['steps']} steps, {json.dumps(fields['scheduler'])}"
    )
