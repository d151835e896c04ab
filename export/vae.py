"""The graphs of the VAE: a picture to the moments of its latents, and latents to a picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from export.graphs import BATCH, Graph, GraphTensor, normal_inputs, uniform_inputs

#: Parts that the queries of the VAE's attention are cut into.
QUERY_PARTS = 8


class PlainVaeAttention:
    """Attention among pixels as matrix products and a softmax, its scale a constant.

    The queries go through in parts, one after the other: every latent looks at every other, and at
    2048x2048 pixels the weights of all of them at once, in float32, are 17 GB.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> Tensor:
        """Map hidden_states (B, C, h, w) to the same shape; a VAE passes nothing else."""
        normed = attn.group_norm(hidden_states).flatten(2).transpose(1, 2)
        query = attn.to_q(normed).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        key = attn.to_k(normed).unflatten(-1, (attn.heads, -1)).permute(0, 2, 3, 1)
        value = attn.to_v(normed).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        query = query * attn.scale
        count = hidden_states.shape[2] * hidden_states.shape[3]
        cuts = [count * part // QUERY_PARTS for part in range(QUERY_PARTS + 1)]
        looked = torch.cat(
            [
                (query[:, :, start:stop] @ key).softmax(-1) @ value
                for start, stop in zip(cuts[:-1], cuts[1:], strict=True)
            ],
            2,
        )
        mixed = attn.to_out[0](looked.transpose(1, 2).flatten(2))
        result: Tensor = mixed.transpose(1, 2).reshape(hidden_states.shape) + hidden_states
        return result


class VaeEncoder(nn.Module):
    """A picture to the moments of its latents; the sample is drawn outside, from the seed."""

    def __init__(self, vae: Any) -> None:
        """Wrap ``vae``, which is changed in place."""
        super().__init__()
        vae.set_attn_processor(PlainVaeAttention())
        self.vae = vae
        self.config = vae.config

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Map image (B, 3, H, W) float32 in [-1, 1] to moments (B, 2C, H/f, W/f), raw.

        The first C channels are the mean, the rest the log-variance, both before scaling.
        """
        moments = self.vae.encode(image.to(self.vae.dtype)).latent_dist.parameters
        return {"moments": moments.float()}


class VaeDecoder(nn.Module):
    """The denoiser's latents to a picture."""

    def __init__(self, vae: Any) -> None:
        """Wrap ``vae``, which is changed in place."""
        super().__init__()
        vae.set_attn_processor(PlainVaeAttention())
        self.vae = vae
        self.config = vae.config
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def forward(self, latents: Tensor) -> dict[str, Tensor]:
        """Map latents (B, C, h, w) float32, scaled, to image (B, 3, fh, fw) about in [-1, 1]."""
        raw = latents / self.scaling_factor
        if self.shift_factor:
            raw = raw + self.shift_factor
        return {"image": self.vae.decode(raw.to(self.vae.dtype), return_dict=False)[0].float()}


def vae_factor(vae: Any) -> int:
    """Picture pixels per latent pixel."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def vae_encoder_graph(vae: Any, *, precision: str = "fp32") -> Graph:
    """Describe the encoder of ``vae`` (AutoencoderKL in the dtype of ``precision``)."""
    factor, channels = vae_factor(vae), vae.config.latent_channels
    image = GraphTensor(name="image", axes=(BATCH, 3, "height", "width"))
    axes = (BATCH, 2 * channels, "latent_height", "latent_width")
    return Graph(
        title="VAE encoder",
        module=VaeEncoder(vae),
        inputs=(image,),
        outputs=(GraphTensor(name="moments", axes=axes),),
        draw=uniform_inputs(-1, 1, image),
        cases=tuple(
            {BATCH: batch, "height": factor * height, "width": factor * width}
            for batch, height, width in ((2, 4, 6), (1, 9, 5), (3, 7, 8))
        ),
        precision=precision,
    )


def vae_decoder_graph(vae: Any, *, precision: str = "fp32") -> Graph:
    """Describe the decoder of ``vae`` (AutoencoderKL in the dtype of ``precision``)."""
    latents = GraphTensor(
        name="latents", axes=(BATCH, vae.config.latent_channels, "latent_height", "latent_width")
    )
    return Graph(
        title="VAE decoder",
        module=VaeDecoder(vae),
        inputs=(latents,),
        outputs=(GraphTensor(name="image", axes=(BATCH, 3, "height", "width")),),
        draw=normal_inputs(latents),
        cases=tuple(
            {BATCH: batch, "latent_height": height, "latent_width": width}
            for batch, height, width in ((2, 4, 6), (1, 9, 5), (3, 7, 8))
        ),
        precision=precision,
    )
