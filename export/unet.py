"""UNet2DConditionModel behind the denoiser's tensors: Stable Diffusion 1.5 and XL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from closeup.errors import ExportError

# diffusers forwards the sizes of the skip connections to its upsamplers only when the latents are
# no multiple of 2**num_upsamplers. With this many the test is true for every size, so the one
# graph serves every multiple of the VAE's factor.
_ALWAYS_FORWARD_SIZES = 30
TEXT_TIME = "text_time"
_OTHER_INPUTS = ("class_embed_type", "encoder_hid_dim", "time_cond_proj_dim")


class PlainAttention:
    """Attention as two matrix products and a softmax, the form that engine builders fuse."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """Attend from hidden_states (R, n, C) to the context (R, L, D), or to itself."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        key = attn.to_k(context).unflatten(-1, (attn.heads, -1)).permute(0, 2, 3, 1)
        value = attn.to_v(context).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        weights = ((query * attn.scale) @ key).softmax(-1)
        mixed: Tensor = attn.to_out[0]((weights @ value).transpose(1, 2).flatten(2))
        return mixed


class UNetRows(nn.Module):
    """A UNet over latents (R, 4, h, w)."""

    def __init__(self, unet: Any) -> None:
        """Wrap ``unet``, which is changed in place."""
        super().__init__()
        unet.num_upsamplers = _ALWAYS_FORWARD_SIZES
        unet.set_attn_processor(PlainAttention())
        self.model = unet

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights and inputs."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, extras: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the prediction (R, 4, h, w) float32 for x at ``timestep`` (R,)."""
        added = None
        if "pooled" in extras:
            added = {
                "text_embeds": extras["pooled"],  # joined with float32 sinusoids, then rounded
                "time_ids": extras["time_ids"],
            }
        (out,) = self.model(
            x.to(self.dtype),
            timestep,
            context.to(self.dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )
        result: Tensor = out.float()
        return result


def refuse_other_unets(unet: Any) -> None:
    """Refuse a UNet that needs inputs this graph has not.

    Raises:
        ExportError: it conditions on more than its family does.
    """
    config = unet.config
    if config.addition_embed_type not in (None, TEXT_TIME):
        raise _other_input("addition_embed_type", config.addition_embed_type)
    for name in _OTHER_INPUTS:
        if getattr(config, name, None) is not None:
            raise _other_input(name, getattr(config, name))
    if config.in_channels != 4 or config.out_channels != 4:
        raise ExportError(
            f"this UNet maps {config.in_channels} to {config.out_channels} channels; expected 4 "
            "to 4 (an inpainting checkpoint? masked inpainting works with the plain one)."
        )


def pooled_width(unet: Any) -> int:
    """Width of the pooled embedding of a UNet of Stable Diffusion XL."""
    config = unet.config
    return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)


def _other_input(name: str, value: object) -> ExportError:
    return ExportError(
        f"this UNet has {name} = {value!r}: only the layouts of Stable Diffusion 1.5 and XL can "
        "be exported."
    )
