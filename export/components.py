"""The graphs around the denoiser: text encoder, upscaler, face detector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from closeup.manifest import LoraLayer
from export.graphs import BATCH, Graph, GraphTensor, Sizes, uniform_inputs
from export.layouts import EncoderLayout
from export.lora_layers import LoraBank, adapt_layers, bank_rows

# What LoRAs adapt in a CLIP text model: the transformer, not the projection after it.
CLIP_LAYERS = "text_model.encoder."


class TextEncoder(nn.Module):
    """Token ids to the embeddings that the denoiser takes.

    Attributes:
        layers: layout of the LoRA bank; empty when there are no LoRA inputs.
    """

    def __init__(self, encoder: Any, layout: EncoderLayout, *, with_lora: bool) -> None:
        """Wrap ``encoder``, a text model of transformers, which is changed in place."""
        super().__init__()
        if hasattr(encoder, "text_model"):
            encoder.set_attn_implementation("eager")  # the causal mask of sdpa does not trace
        self.encoder = encoder
        self.config = encoder.config
        self.layout = layout
        self.bank = LoraBank()
        self.layers: tuple[LoraLayer, ...] = ()
        if with_lora:
            self.layers = adapt_layers(encoder, self.bank, under=CLIP_LAYERS)

    def forward(
        self, input_ids: Tensor, lora: Tensor | None = None, lora_row: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Map input_ids (B, L) int64 to context (B, L, D), pooled (B, P), or both, float32.

        Args:
            input_ids: with begin, end and padding, as the tokenizer gives them.
            lora: (S, M, r) network dtype, the bank of resident adapters.
            lora_row: (B,) int64, the adapter of each prompt.
        """
        if lora is not None and lora_row is not None:
            self.bank.open(lora, lora_row)
        try:
            found = self.encoder(input_ids, output_hidden_states=True)
        finally:
            self.bank.close()
        layer = self.layout.hidden_layer
        outputs = {}
        if "context" in self.layout.outputs:
            hidden = found.last_hidden_state if layer is None else found.hidden_states[layer]
            outputs["context"] = hidden.float()
        if "pooled" in self.layout.outputs:
            has_projection = hasattr(found, "text_embeds")
            pooled = found.text_embeds if has_projection else found.pooler_output
            outputs["pooled"] = pooled.float()
        return outputs


class Upscaler(nn.Module):
    """A super-resolution network with named tensors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Map image (B, 3, H, W) float32 RGB in [0, 1] to upscaled (B, 3, sH, sW) float32."""
        dtype = next(self.network.parameters()).dtype
        return {"upscaled": self.network(image.to(dtype)).float()}


def text_encoder_graph(
    encoder: Any, layout: EncoderLayout, *, max_tokens: int, max_rank: int, precision: str
) -> Graph:
    """Describe a text encoder, which is changed in place.

    Args:
        encoder: a text model of transformers in the dtype of ``precision``.
        layout: which of a family's encoders it is.
        max_tokens: L.
        max_rank: the largest rank of the LoRA inputs; 0 leaves them out.
        precision: fp32, fp16 or bf16.
    """
    module = TextEncoder(encoder, layout, with_lora=max_rank > 0)
    config = encoder.config
    ids = GraphTensor(name="input_ids", axes=(BATCH, max_tokens), dtype=torch.int64)
    inputs = [ids]
    if module.layers:
        dtype = next(encoder.parameters()).dtype
        axes = ("adapters", bank_rows(module.layers), "rank")
        inputs.append(GraphTensor(name="lora", axes=axes, dtype=dtype))
        inputs.append(GraphTensor(name="lora_row", axes=(BATCH,), dtype=torch.int64))
    has_projection = layout.class_name.endswith("WithProjection")
    width = config.projection_dim if has_projection else config.hidden_size
    axes_by_name: dict[str, tuple[int | str, ...]] = {
        "context": (BATCH, max_tokens, config.hidden_size),
        "pooled": (BATCH, width),
    }

    def draw(sizes: Sizes, seed: int) -> dict[str, Tensor]:
        return draw_prompts(tuple(inputs), sizes, seed, config)

    cases: tuple[Sizes, ...] = ({BATCH: 2}, {BATCH: 1}, {BATCH: 5})
    ranks = ((3, 4), (1, 1), (2, max_rank))
    if module.layers:
        cases = tuple(
            {**case, "adapters": adapters, "rank": min(rank, max_rank)}
            for case, (adapters, rank) in zip(cases, ranks, strict=True)
        )
    return Graph(
        title="text encoder" if layout.name == "text_encoder" else "second text encoder",
        module=module,
        inputs=tuple(inputs),
        outputs=tuple(GraphTensor(name=name, axes=axes_by_name[name]) for name in layout.outputs),
        draw=draw,
        cases=cases,
        precision=precision,
        use_validation=not module.layers,
    )


def draw_prompts(
    inputs: tuple[GraphTensor, ...], sizes: Sizes, seed: int, config: Any
) -> dict[str, Tensor]:
    """Draw token ids that end like prompts, and a LoRA bank whose first adapter is zeros."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for tensor in inputs:
        shape = tensor.shape(sizes)
        if tensor.name == "input_ids":
            ids = torch.randint(config.vocab_size, shape, generator=generator)
            ids[:, shape[1] // 2 :] = config.eos_token_id
            drawn["input_ids"] = ids
        elif tensor.name == "lora_row":
            drawn["lora_row"] = torch.randint(sizes["adapters"], shape, generator=generator)
        else:
            bank = 0.1 * torch.randn(shape, generator=generator)
            bank[0] = 0
            drawn[tensor.name] = bank.to(tensor.dtype)
    return drawn


def upscaler_graph(network: nn.Module, *, precision: str = "fp32") -> Graph:
    """Describe a super-resolution network, (B, 3, H, W) in [0, 1] to (B, 3, sH, sW).

    Args:
        network: in the dtype of ``precision``.
        precision: fp32, fp16 or bf16.
    """
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
        precision=precision,
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
