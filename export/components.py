"""The graphs around the denoiser: text encoder, VAE, upscaler, face detector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from export.graphs import BATCH, Graph, GraphTensor, Sizes, normal_inputs, uniform_inputs


class TextEncoder(nn.Module):
    """Token ids to the embeddings that the denoiser attends to."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        encoder.set_attn_implementation("eager")  # the causal mask of sdpa does not trace
        self.encoder = encoder
        self.config = encoder.config

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Map input_ids (B, L) int64 to last_hidden_state (B, L, D) float32."""
        return {"last_hidden_state": self.encoder(input_ids, return_dict=False)[0].float()}


class VaeEncoder(nn.Module):
    """A picture to the moments of its latents; the sample is drawn outside, from the seed."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.config = vae.config

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Map image (B, 3, H, W) float32 in [-1, 1] to moments (B, 2C, H/f, W/f), raw.

        The first C channels are the mean, the rest the log-variance, both before scaling.
        """
        return {"moments": self.vae.encode(image).latent_dist.parameters}


class VaeDecoder(nn.Module):
    """The denoiser's latents to a picture."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.config = vae.config
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def forward(self, latents: Tensor) -> dict[str, Tensor]:
        """Map latents (B, C, h, w) float32, scaled, to image (B, 3, fh, fw) about in [-1, 1]."""
        raw = latents / self.scaling_factor
        if self.shift_factor:
            raw = raw + self.shift_factor
        return {"image": self.vae.decode(raw, return_dict=False)[0]}


class Upscaler(nn.Module):
    """A super-resolution network with named tensors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Map image (B, 3, H, W) float32 RGB in [0, 1] to upscaled (B, 3, sH, sW)."""
        return {"upscaled": self.network(image)}


def text_encoder_graph(encoder: Any, *, max_tokens: int, precision: str) -> Graph:
    """Describe the text encoder ``encoder`` (CLIPTextModel)."""
    vocabulary, width = encoder.config.vocab_size, encoder.config.hidden_size
    ids = GraphTensor(name="input_ids", axes=(BATCH, max_tokens), dtype=torch.int64)

    def draw(sizes: Sizes, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = ids.shape(sizes)
        return {"input_ids": torch.randint(vocabulary, shape, generator=generator)}

    return Graph(
        title="text encoder",
        module=TextEncoder(encoder),
        inputs=(ids,),
        outputs=(GraphTensor(name="last_hidden_state", axes=(BATCH, max_tokens, width)),),
        draw=draw,
        cases=({BATCH: 2}, {BATCH: 1}, {BATCH: 5}),
        precision=precision,
    )


def vae_factor(vae: Any) -> int:
    """Picture pixels per latent pixel."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def vae_encoder_graph(vae: Any) -> Graph:
    """Describe the encoder of ``vae`` (AutoencoderKL, float32)."""
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
    )


def vae_decoder_graph(vae: Any) -> Graph:
    """Describe the decoder of ``vae`` (AutoencoderKL, float32)."""
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
    )


def upscaler_graph(network: nn.Module) -> Graph:
    """Describe a super-resolution network, (B, 3, H, W) in [0, 1] to (B, 3, sH, sW)."""
    image = GraphTensor(name="image", axes=(BATCH, 3, "height", "width"))
    axes = (BATCH, 3, "upscaled_height", "upscaled_width")
    return Graph(
        title="upscaler",
        module=Upscaler(network),
        inputs=(image,),
        outputs=(GraphTensor(name="upscaled", axes=axes),),
        draw=uniform_inputs(0, 1, image),
        cases=(
            {BATCH: 2, "height": 24, "width": 16},
            {BATCH: 1, "height": 40, "width": 56},
            {BATCH: 3, "height": 18, "width": 34},
        ),
    )


class FaceDetectorModule(nn.Module):
    """A face detector whose input is called ``input``, as YuNet's."""

    def __init__(self, detector: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.detector = detector
        self.names = names

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        """Map input (B, 3, H, W) float32 raw BGR 0-255 to the twelve outputs."""
        found = self.detector(input)
        if isinstance(found, dict):
            return {name: found[name] for name in self.names}
        return dict(zip(self.names, found, strict=True))


_DETECTOR_CHANNELS = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}


def face_detector_tensors(
    names: tuple[str, ...],
) -> tuple[GraphTensor, tuple[GraphTensor, ...]]:
    """Return the input and the outputs of a detector in YuNet's layout."""
    image = GraphTensor(name="input", axes=(BATCH, 3, "height", "width"))
    outputs = []
    for name in names:
        kind, _, stride = name.partition("_")
        axes = (BATCH, f"cells_{stride}", _DETECTOR_CHANNELS[kind])
        outputs.append(GraphTensor(name=name, axes=axes))
    return image, tuple(outputs)


def face_detector_graph(detector: nn.Module, names: tuple[str, ...]) -> Graph:
    """Describe a detector in YuNet's layout; sides are multiples of 32."""
    image, outputs = face_detector_tensors(names)
    return Graph(
        title="face detector",
        module=FaceDetectorModule(detector, names),
        inputs=(image,),
        outputs=outputs,
        draw=uniform_inputs(0, 255, image),
        cases=(
            {BATCH: 2, "height": 64, "width": 96},
            {BATCH: 1, "height": 160, "width": 128},
            {BATCH: 3, "height": 32, "width": 32},
        ),
    )
