"""The denoiser's graph: one sampler step for a batch of sequences, network included.

The sampler itself is data (``step``, ``pick``, ``guidance``, ...); `closeup.samplers` makes the
tables. Nothing here mixes sequences: rows are picked, never multiplied with a dense matrix, so a
sequence that overflows spoils only itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from closeup.errors import ExportError
from closeup.manifest import LoraLayer
from export.graphs import BATCH, Graph, GraphTensor, Sizes
from export.lora_layers import LoraBank, adapt_layers

# diffusers forwards the sizes of the skip connections to its upsamplers only when the latents are
# no multiple of 2**num_upsamplers. With this many the test is true for every size, so the one
# graph serves every multiple of the VAE's factor.
_ALWAYS_FORWARD_SIZES = 30


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


class DenoiserStep(nn.Module):
    """One step: rows in, network, guidance, the sampler's matrix, mask.

    Attributes:
        layers: layout of the LoRA bank; empty when there are no LoRA inputs.
    """

    def __init__(self, unet: Any, *, with_lora: bool) -> None:
        """Wrap ``unet`` (UNet2DConditionModel, float32 or float16), which is changed in place."""
        super().__init__()
        unet.num_upsamplers = _ALWAYS_FORWARD_SIZES
        unet.set_attn_processor(PlainAttention())
        self.unet = unet
        self.config = unet.config
        self.bank = LoraBank()
        self.layers: tuple[LoraLayer, ...] = adapt_layers(unet, self.bank) if with_lora else ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights and inputs."""
        dtype: torch.dtype = next(self.unet.parameters()).dtype
        return dtype

    def forward(
        self,
        sample: Tensor,
        memory: Tensor,
        noise: Tensor,
        known: Tensor,
        known_noise: Tensor,
        mask: Tensor,
        rows: Tensor,
        timestep: Tensor,
        context: Tensor,
        pick: Tensor,
        guidance: Tensor,
        input_scale: Tensor,
        step: Tensor,
        known_step: Tensor,
        lora: Tensor | None = None,
        lora_row: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run one step for B sequences through R network rows. All float32 unless said.

        Args:
            sample: (B, 4, h, w), the sampler's state.
            memory: (B, 2, 4, h, w), what the sampler remembers.
            noise: (B, 4, h, w), this step's noise.
            known: (B, 4, h, w), clean latents that show through where the mask is 0.
            known_noise: (B, 4, h, w), the noise they get.
            mask: (B, 1, h, w) in [0, 1], 1 where the sampler's result is kept.
            rows: (R,) int64, the sequence each network row belongs to.
            timestep: (R,).
            context: (R, L, D), prompt embeddings.
            pick: (B, 2) int64, the network rows that make a sequence's prediction.
            guidance: (B, 2), their weights.
            input_scale: (B,), multiplies the sample before the network.
            step: (B, 3, 5), from [sample, prediction, memory0, memory1, noise] to
                [next, memory0', memory1'].
            known_step: (B, 2), weights of known and known_noise.
            lora: (S, M, r) network dtype, the bank of resident adapters.
            lora_row: (R,) int64, the adapter of each network row.

        Returns:
            next_sample (B, 4, h, w) and next_memory (B, 2, 4, h, w).
        """
        scaled = sample * _over(input_scale, sample)
        prediction = self._network(scaled.index_select(0, rows), timestep, context, lora, lora_row)
        eps = _over(guidance[:, 0], sample) * prediction.index_select(0, pick[:, 0])
        eps = eps + _over(guidance[:, 1], sample) * prediction.index_select(0, pick[:, 1])
        state = torch.cat([torch.stack([sample, eps], 1), memory, noise.unsqueeze(1)], 1)
        # A sum of products and not a matrix product: engines may run those in TF32.
        moved = (step[..., None, None, None] * state.unsqueeze(1)).sum(2)
        shown = _over(known_step[:, 0], known) * known
        shown = shown + _over(known_step[:, 1], known) * known_noise
        next_sample = mask * moved[:, 0] + (1 - mask) * shown
        return {"next_sample": next_sample, "next_memory": moved[:, 1:]}

    def _network(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        lora: Tensor | None,
        lora_row: Tensor | None,
    ) -> Tensor:
        if lora is not None and lora_row is not None:
            self.bank.open(lora, lora_row)
        dtype = self.dtype
        try:
            (out,) = self.unet(x.to(dtype), timestep, context.to(dtype), return_dict=False)
        finally:
            self.bank.close()
        result: Tensor = out.float()
        return result


def _over(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) so that it multiplies ``like`` (B, ...) sequence by sequence."""
    return values.reshape(-1, *([1] * (like.dim() - 1)))


def denoiser_graph(
    unet: Any, *, max_tokens: int, max_rank: int, max_batch: int, precision: str
) -> Graph:
    """Describe the denoiser around ``unet``, which is changed in place.

    Args:
        unet: UNet2DConditionModel in the dtype of ``precision``.
        max_tokens: L of the context; engines take other lengths too.
        max_rank: the largest rank of the LoRA inputs; 0 leaves them out.
        max_batch: the most sequences in a call, checked as one of the cases.
        precision: fp32 or fp16.

    Raises:
        ExportError: the UNet has inputs that Stable Diffusion 1.5's has not.
    """
    refuse_other_unets(unet)
    module = DenoiserStep(unet, with_lora=max_rank > 0)
    bank_rows = sum(layer.in_features + layer.out_features for layer in module.layers)
    channels, width = unet.config.in_channels, unet.config.cross_attention_dim
    latents = (BATCH, channels, "height", "width")
    state = (BATCH, 2, *latents[1:])
    axes: dict[str, tuple[int | str, ...]] = {
        "sample": latents,
        "memory": state,
        "noise": latents,
        "known": latents,
        "known_noise": latents,
        "mask": (BATCH, 1, "height", "width"),
        "rows": ("rows",),
        "timestep": ("rows",),
        "context": ("rows", "tokens", width),
        "pick": (BATCH, 2),
        "guidance": (BATCH, 2),
        "input_scale": (BATCH,),
        "step": (BATCH, 3, 5),
        "known_step": (BATCH, 2),
    }
    if max_rank:
        axes |= {"lora": ("adapters", bank_rows, "rank"), "lora_row": ("rows",)}
    dtypes = dict.fromkeys(("rows", "pick", "lora_row"), torch.int64) | {"lora": module.dtype}
    inputs = tuple(
        GraphTensor(name=name, axes=axis, dtype=dtypes.get(name, torch.float32))
        for name, axis in axes.items()
    )

    def draw(sizes: Sizes, seed: int) -> dict[str, Tensor]:
        return draw_inputs(inputs, sizes, seed)

    return Graph(
        title="denoiser",
        module=module,
        inputs=inputs,
        outputs=(
            GraphTensor(name="next_sample", axes=latents),
            GraphTensor(name="next_memory", axes=state),
        ),
        draw=draw,
        cases=_cases(max_tokens, max_rank, max_batch),
        precision=precision,
        use_validation=False,
    )


def _cases(tokens: int, max_rank: int, max_batch: int) -> tuple[Sizes, ...]:
    """The traced case, then: plain, odd sides, small, the full batch; several ranks and banks."""
    table = (
        # batch, rows, height, width, tokens, adapters, rank
        (2, 3, 20, 28, tokens, 3, 4),
        (1, 1, 16, 16, tokens, 1, 1),
        (2, 4, 17, 22, tokens, 2, max_rank),
        (3, 5, 8, 9, 2 * tokens, 5, 2),
        (max_batch, 2 * max_batch, 8, 8, tokens, 2, 1),
    )
    names = (BATCH, "rows", "height", "width", "tokens", "adapters", "rank")
    cases = [dict(zip(names, row, strict=True)) for row in table]
    if max_rank:
        return tuple({**case, "rank": min(case["rank"], max_rank)} for case in cases)
    return tuple({name: case[name] for name in names[:5]} for case in cases)


def draw_inputs(inputs: tuple[GraphTensor, ...], sizes: Sizes, seed: int) -> dict[str, Tensor]:
    """Draw inputs of a call; the first ``batch`` rows are one a sequence, the rest in turn."""
    generator = torch.Generator().manual_seed(seed)
    batch, rows = sizes[BATCH], sizes["rows"]
    drawn = {
        tensor.name: torch.randn(tensor.shape(sizes), generator=generator).to(tensor.dtype)
        for tensor in inputs
    }
    first = torch.arange(batch)
    second = torch.where(first + batch < rows, first + batch, first)
    scale = 1 + 6 * torch.rand(batch, generator=generator)
    drawn |= {
        "mask": torch.rand(drawn["mask"].shape, generator=generator),
        "rows": torch.arange(rows) % batch,
        "timestep": torch.rand(rows, generator=generator) * 999,
        "pick": torch.stack([first, second], 1),
        "guidance": torch.stack([1 - scale, scale], 1),
        "input_scale": 0.5 + torch.rand(batch, generator=generator),
    }
    if "lora" in drawn:
        drawn["lora"] = drawn["lora"] * 0.03
        drawn["lora"][0] = 0
        drawn["lora_row"] = torch.randint(sizes["adapters"], (rows,), generator=generator)
    return drawn


def refuse_other_unets(unet: Any) -> None:
    """Refuse a UNet that needs inputs this graph has not.

    Raises:
        ExportError: it conditions on more than a timestep and a context.
    """
    config = unet.config
    extras = ("addition_embed_type", "class_embed_type", "encoder_hid_dim", "time_cond_proj_dim")
    for name in extras:
        if getattr(config, name, None) is not None:
            raise ExportError(
                f"this UNet has {name} = {getattr(config, name)!r}: only Stable Diffusion 1.5's "
                "layout can be exported so far."
            )
    if config.in_channels != 4 or config.out_channels != 4:
        raise ExportError(
            f"this UNet maps {config.in_channels} to {config.out_channels} channels; expected 4 "
            "to 4 (an inpainting checkpoint? masked inpainting works with the plain one)."
        )
