"""The three families' denoisers at their published sizes, random weights, made on the device.

The sizes are those of the published configuration files. Weights are the layers' own random
start, drawn where they live: nothing is downloaded or copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

BATCHES = (1, 4, 8)
_SDXL_POOLED = 1280


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A denoiser and the calls it is timed with.

    Attributes:
        name: short, for keys and options.
        title: for tables, with the picture's size.
        build: makes the network on the current default device, in the default dtype.
        side: of the latents.
        channels: of the latents.
        tokens: of the prompt.
        context: width of the prompt embeddings.
        pooled: width of the pooled embeddings; 0: none.
        guided: two network rows a picture (classifier-free guidance), else one.
        steps: of a request, for pictures per second.
        is_flux: takes packed tokens.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    side: int
    channels: int
    tokens: int
    context: int
    pooled: int = 0
    guided: bool = True
    steps: int
    is_flux: bool = False

    def rows(self, batch: int) -> int:
        """Network rows of ``batch`` pictures."""
        return 2 * batch if self.guided else batch


def sd15() -> Subject:
    """Stable Diffusion 1.5 at 512x512."""
    return Subject(
        name="sd15", title="SD 1.5, 512x512", build=_build_sd15,
        side=64, channels=4, tokens=77, context=768, steps=20,
    )  # fmt: skip


def sdxl() -> Subject:
    """Stable Diffusion XL at 1024x1024."""
    return Subject(
        name="sdxl", title="SDXL, 1024x1024", build=_build_sdxl,
        side=128, channels=4, tokens=77, context=2048, pooled=_SDXL_POOLED, steps=30,
    )  # fmt: skip


def flux() -> Subject:
    """FLUX.1 dev at 1024x1024, 512 prompt tokens."""
    return Subject(
        name="flux", title="FLUX.1 dev, 1024x1024", build=_build_flux,
        side=128, channels=16, tokens=512, context=4096, pooled=768, guided=False,
        steps=28, is_flux=True,
    )  # fmt: skip


def tiny(subject: Subject) -> Subject:
    """The same kind of network, small enough for two CPU cores; for trying the script."""
    builds: Mapping[str, Callable[[], nn.Module]] = {
        "sd15": lambda: UNet2DConditionModel(**{**_SD15, **_TINY, "cross_attention_dim": 32}),
        "sdxl": _build_tiny_sdxl,
        "flux": lambda: FluxTransformer2DModel(**{**_FLUX, **_TINY_FLUX}),
    }
    return Subject(
        name=subject.name, title=f"tiny {subject.name}", build=builds[subject.name],
        side=16, channels=subject.channels, tokens=9, context=32,
        pooled=24 if subject.pooled else 0, guided=subject.guided, steps=subject.steps,
        is_flux=subject.is_flux,
    )  # fmt: skip


SUBJECTS: Mapping[str, Callable[[], Subject]] = {"sd15": sd15, "sdxl": sdxl, "flux": flux}


def make_subject(name: str, use_tiny: bool) -> Subject:
    """Return a subject by name, at its real size or tiny."""
    subject = SUBJECTS[name]()
    return tiny(subject) if use_tiny else subject


_SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": _SDXL_POOLED + 6 * 256,
}
_FLUX: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
_TINY: dict[str, Any] = {
    "block_out_channels": (16, 32, 32, 32),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
_TINY_FLUX: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


def _build_sd15() -> nn.Module:
    network: nn.Module = UNet2DConditionModel(**_SD15)
    return network


def _build_sdxl() -> nn.Module:
    network: nn.Module = UNet2DConditionModel(**_SDXL)
    return network


def _build_flux() -> nn.Module:
    network: nn.Module = FluxTransformer2DModel(**_FLUX)
    return network


def _build_tiny_sdxl() -> nn.Module:
    changes = {
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    }
    network: nn.Module = UNet2DConditionModel(**{**_SDXL, **changes})
    return network


def build_network(subject: Subject, *, device: str, dtype: torch.dtype) -> nn.Module:
    """Make a subject's network on ``device`` with random weights, ready for inference."""
    torch.manual_seed(0)
    with default_dtype(dtype), torch.device(device):
        network = subject.build()
    return network.eval().requires_grad_(False)


def call_inputs(subject: Subject, batch: int, *, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Draw the keyword arguments of one network call for ``batch`` pictures."""
    rows, side = subject.rows(batch), subject.side

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    context = draw(rows, subject.tokens, subject.context)
    if subject.is_flux:
        half = side // 2
        positions = torch.zeros(half, half, 3, device=device, dtype=dtype)
        positions[..., 1] += torch.arange(half, device=device, dtype=dtype)[:, None]
        positions[..., 2] += torch.arange(half, device=device, dtype=dtype)[None]
        return {
            "hidden_states": draw(rows, half * half, 4 * subject.channels),
            "timestep": torch.full((rows,), 0.5, device=device, dtype=dtype),
            "guidance": torch.full((rows,), 3.5, device=device),
            "pooled_projections": draw(rows, subject.pooled),
            "encoder_hidden_states": context,
            "txt_ids": torch.zeros(subject.tokens, 3, device=device, dtype=dtype),
            "img_ids": positions.reshape(-1, 3),
            "return_dict": False,
        }
    inputs: dict[str, Any] = {
        "sample": draw(rows, subject.channels, side, side),
        "timestep": torch.full((rows,), 500.0, device=device),
        "encoder_hidden_states": context,
        "return_dict": False,
    }
    if subject.pooled:
        size = float(8 * side)
        ids = torch.tensor([[size, size, 0, 0, size, size]], device=device, dtype=dtype)
        inputs["added_cond_kwargs"] = {
            "text_embeds": draw(rows, subject.pooled),
            "time_ids": ids.expand(rows, -1),
        }
    return inputs


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let modules made inside have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
