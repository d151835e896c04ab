"""FLUX.1's transformer behind the denoiser's tensors: packing and positions inside the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PATCH = 2


class PlainRmsNorm(nn.Module):
    """RMS norm from elementary operations: ONNX has none before opset 23."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., D) over its last dimension; float32, which `rotate` goes on with."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            wide = wide * self.weight.float()
        return wide


class RotaryTables(nn.Module):
    """Cosines and sines of the positions; the frequencies are rounded once, from float64."""

    frequencies: Tensor

    def __init__(self, theta: int, axes_dim: tuple[int, ...]) -> None:
        super().__init__()
        self.axes_dim = axes_dim
        parts = [
            1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim) for dim in axes_dim
        ]
        self.register_buffer("frequencies", torch.cat(parts).float(), persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Map ids (n, axes) float32 to cosines and sines (n, sum of axes_dim / 2) float32."""
        # Expanded axis by axis: which axis a frequency belongs to is a constant.
        columns = [
            ids[:, axis : axis + 1].expand(-1, dim // 2) for axis, dim in enumerate(self.axes_dim)
        ]
        angles = torch.cat(columns, 1) * self.frequencies
        return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of neighbours of x (R, heads, n, d) float32 by its angle, tables (n, d/2)."""
    cos, sin = tables
    pairs = x.unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    return turned.flatten(-2)


class PlainFluxAttention:
    """Joint attention as two matrix products and a softmax."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from image tokens (R, n, C), and text tokens (R, L, C) before them, to both."""
        query = attn.norm_q(_split(attn, attn.to_q(hidden_states)))
        key = attn.norm_k(_split(attn, attn.to_k(hidden_states)))
        value = _split(attn, attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            text_query = attn.norm_added_q(_split(attn, attn.add_q_proj(text)))
            text_key = attn.norm_added_k(_split(attn, attn.add_k_proj(text)))
            query = torch.cat([text_query, query], 2)
            key = torch.cat([text_key, key], 2)
            value = torch.cat([_split(attn, attn.add_v_proj(text)), value], 2)
        assert image_rotary_emb is not None
        # One stretch of float32 from the norm to the product, as in FLUX.1's own code.
        query = rotate(query, image_rotary_emb) * attn.head_dim**-0.5
        key = rotate(key, image_rotary_emb)
        weights = (query.to(value.dtype) @ key.to(value.dtype).transpose(2, 3)).softmax(-1)
        mixed: Tensor = (weights @ value).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return mixed
        tokens = encoder_hidden_states.shape[1]
        return attn.to_out[0](mixed[:, tokens:]), attn.to_add_out(mixed[:, :tokens])


class ExactTimes(nn.Module):
    """Sinusoids of the timestep and the guidance from their float32 values.

    diffusers multiplies both by 1000 in the network's type, where float16 is off by up to 0.25:
    enough to turn the fastest sinusoids.

    Attributes:
        given: (R,) float32 tensors of the call, in the order in which they are asked for.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.given: list[Tensor] = []

    def forward(self, rounded: Tensor) -> Tensor:
        """Map what was given, not ``rounded`` (R,), to sinusoids (R, 256) float32."""
        sinusoids: Tensor = self.base(self.given.pop(0))
        return sinusoids


class FluxRows(nn.Module):
    """FluxTransformer2DModel over latents (R, C, h, w), h and w even."""

    def __init__(self, transformer: Any) -> None:
        """Wrap ``transformer``, which is changed in place."""
        super().__init__()
        config = transformer.config
        transformer.set_attn_processor(PlainFluxAttention())
        transformer.pos_embed = RotaryTables(10000, tuple(config.axes_dims_rope))
        self.times = ExactTimes(transformer.time_text_embed.time_proj)
        transformer.time_text_embed.time_proj = self.times
        for name, module in list(transformer.named_modules()):
            if isinstance(module, nn.RMSNorm):
                parent, _, leaf = name.rpartition(".")
                setattr(transformer.get_submodule(parent), leaf, PlainRmsNorm(module))
        self.model = transformer

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer's weights and inputs."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, extras: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the velocity (R, C, h, w) float32 of x at ``timestep`` (R,) in 0..1000."""
        dtype = self.dtype
        guidance = extras.get("guidance_embed")
        # Divided and multiplied again, as diffusers does: the same rounding.
        self.times.given = [timestep / 1000 * 1000]
        if guidance is not None:
            self.times.given.append(guidance * 1000)
        (out,) = self.model(
            hidden_states=pack(x).to(dtype),
            timestep=timestep / 1000,
            guidance=guidance,
            pooled_projections=extras["pooled"].to(dtype),
            encoder_hidden_states=context.to(dtype),
            txt_ids=torch.zeros_like(context[0, :, :3]),
            img_ids=picture_positions(x),
            return_dict=False,
        )
        return unpack(out.float(), x)


def pack(x: Tensor) -> Tensor:
    """Map latents (R, C, h, w) to tokens (R, h/2 * w/2, 4C), channel-major inside a patch."""
    rows, channels, height, width = x.shape
    split = x.reshape(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, like: Tensor) -> Tensor:
    """Map tokens (R, h/2 * w/2, 4C) back to latents of the size of ``like`` (R, C, h, w)."""
    rows, channels, height, width = like.shape
    split = tokens.reshape(rows, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels, height, width)


def picture_positions(x: Tensor) -> Tensor:
    """Return (h/2 * w/2, 3) float32: zero, row and column of each token of x (R, C, h, w)."""
    height, width = x.shape[2] // PATCH, x.shape[3] // PATCH
    down = torch.arange(height, device=x.device, dtype=torch.float32)[:, None].expand(-1, width)
    across = torch.arange(width, device=x.device, dtype=torch.float32)[None].expand(height, -1)
    return torch.stack([torch.zeros_like(down), down, across], -1).flatten(0, 1)


def _split(attn: Any, x: Tensor) -> Tensor:
    """(R, n, C) to (R, heads, n, d)."""
    split: Tensor = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return split
