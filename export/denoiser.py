"""The denoiser's graph: one sampler step for a batch of sequences, network included.

The sampler itself is data (``step``, ``pick``, ``guidance``, ...); `closeup.samplers` makes the
tables. Nothing here mixes sequences: rows are picked, never multiplied with a dense matrix, so a
sequence that overflows spoils only itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from closeup.manifest import LoraLayer
from export.flux import PATCH, FluxRows
from export.graphs import BATCH, Graph, GraphTensor, Sizes
from export.lora_layers import LoraBank, adapt_layers, bank_rows
from export.unet import TEXT_TIME, UNetRows, pooled_width, refuse_other_unets


class DenoiserStep(nn.Module):
    """One step: rows in, network, guidance, the sampler's matrix, mask.

    Attributes:
        layers: layout of the LoRA bank; empty when there are no LoRA inputs.
    """

    def __init__(self, model: Any, *, with_lora: bool) -> None:
        """Wrap ``model``, a UNet2DConditionModel or a FluxTransformer2DModel.

        It is changed in place.
        """
        super().__init__()
        is_flux = isinstance(model, FluxTransformer2DModel)
        self.network: UNetRows | FluxRows = FluxRows(model) if is_flux else UNetRows(model)
        self.config = model.config
        self.bank = LoraBank()
        self.layers: tuple[LoraLayer, ...] = adapt_layers(model, self.bank) if with_lora else ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights and inputs."""
        return self.network.dtype

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
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        guidance_embed: Tensor | None = None,
        lora: Tensor | None = None,
        lora_row: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run one step for B sequences through R network rows. All float32 unless said.

        Args:
            sample: (B, C, h, w), the sampler's state.
            memory: (B, 2, C, h, w), what the sampler remembers.
            noise: (B, C, h, w), this step's noise.
            known: (B, C, h, w), clean latents that show through where the mask is 0.
            known_noise: (B, C, h, w), the noise they get.
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
            pooled: (R, P), pooled prompt embeddings.
            time_ids: (R, 6), SDXL's original height and width, crop top and left, target height
                and width, in pixels.
            guidance_embed: (R,), the guidance scale, an input of FLUX.1 dev.
            lora: (S, M, r) network dtype, the bank of resident adapters.
            lora_row: (R,) int64, the adapter of each network row.

        Returns:
            next_sample (B, C, h, w) and next_memory (B, 2, C, h, w).
        """
        scaled = sample * _over(input_scale, sample)
        given = {"pooled": pooled, "time_ids": time_ids, "guidance_embed": guidance_embed}
        extras = {name: value for name, value in given.items() if value is not None}
        if lora is not None and lora_row is not None:
            self.bank.open(lora, lora_row)
        try:
            prediction = self.network(scaled.index_select(0, rows), timestep, context, extras)
        finally:
            self.bank.close()
        eps = _over(guidance[:, 0], sample) * prediction.index_select(0, pick[:, 0])
        eps = eps + _over(guidance[:, 1], sample) * prediction.index_select(0, pick[:, 1])
        state = torch.cat([torch.stack([sample, eps], 1), memory, noise.unsqueeze(1)], 1)
        # A sum of products and not a matrix product: engines may run those in TF32.
        moved = (step[..., None, None, None] * state.unsqueeze(1)).sum(2)
        shown = _over(known_step[:, 0], known) * known
        shown = shown + _over(known_step[:, 1], known) * known_noise
        next_sample = mask * moved[:, 0] + (1 - mask) * shown
        return {"next_sample": next_sample, "next_memory": moved[:, 1:]}


def _over(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) so that it multiplies ``like`` (B, ...) sequence by sequence."""
    return values.reshape(-1, *([1] * (like.dim() - 1)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Interface:
    """What tells one family's denoiser from another's.

    Attributes:
        channels: of the latents.
        context: width of the prompt embeddings.
        extras: axes of the inputs that only this family has.
        cases: (batch, rows, height, width, tokens, adapters, rank); 0 tokens: the prompt's, and
            0 as the rank: the largest. The first is the one that is traced, so it is small.
    """

    channels: int
    context: int
    extras: dict[str, tuple[int | str, ...]]
    cases: tuple[tuple[int, ...], ...]


# Plain, odd sides, small, several ranks and banks; the full batch is added.
_UNET_CASES = (
    (2, 3, 8, 12, 0, 3, 4),
    (1, 1, 16, 16, 0, 1, 1),
    (2, 4, 17, 22, 0, 2, 0),
    (3, 5, 8, 9, -2, 5, 2),
)
# Even sides; one network row a sequence.
_FLUX_CASES = (
    (2, 3, 4, 6, 5, 3, 4),
    (3, 3, 8, 12, 0, 2, 0),
    (1, 1, 10, 6, 0, 1, 1),
    (2, 2, 2, 14, 33, 5, 2),
)


def _interface(model: Any) -> _Interface:
    """Read a family's inputs off its network."""
    config = model.config
    if isinstance(model, FluxTransformer2DModel):
        extras: dict[str, tuple[int | str, ...]] = {
            "pooled": ("rows", config.pooled_projection_dim)
        }
        if config.guidance_embeds:
            extras["guidance_embed"] = ("rows",)
        channels, context = config.in_channels // PATCH**2, config.joint_attention_dim
        return _Interface(channels=channels, context=context, extras=extras, cases=_FLUX_CASES)
    refuse_other_unets(model)
    extras = {}
    if config.addition_embed_type == TEXT_TIME:
        extras = {"pooled": ("rows", pooled_width(model)), "time_ids": ("rows", 6)}
    context = config.cross_attention_dim
    return _Interface(
        channels=config.in_channels, context=context, extras=extras, cases=_UNET_CASES
    )


def denoiser_graph(
    model: Any, *, max_tokens: int, max_rank: int, max_batch: int, precision: str
) -> Graph:
    """Describe the denoiser around ``model``, which is changed in place.

    Args:
        model: UNet2DConditionModel or FluxTransformer2DModel in the dtype of ``precision``.
        max_tokens: L of the context; engines take other lengths too.
        max_rank: the largest rank of the LoRA inputs; 0 leaves them out.
        max_batch: the most sequences in a call, checked as one of the cases.
        precision: fp32, fp16 or bf16.

    Raises:
        ExportError: the network has inputs that its family has not.
    """
    interface = _interface(model)
    module = DenoiserStep(model, with_lora=max_rank > 0)
    inputs = _inputs(interface, module, max_rank)
    shapes = {tensor.name: tensor for tensor in inputs}

    def draw(sizes: Sizes, seed: int) -> dict[str, Tensor]:
        return draw_inputs(inputs, sizes, seed)

    return Graph(
        title="denoiser",
        module=module,
        inputs=inputs,
        outputs=(
            GraphTensor(name="next_sample", axes=shapes["sample"].axes),
            GraphTensor(name="next_memory", axes=shapes["memory"].axes),
        ),
        draw=draw,
        cases=_cases(interface, max_tokens, max_rank, max_batch),
        precision=precision,
        use_validation=False,
    )


def _inputs(interface: _Interface, module: DenoiserStep, max_rank: int) -> tuple[GraphTensor, ...]:
    latents = (BATCH, interface.channels, "height", "width")
    axes: dict[str, tuple[int | str, ...]] = {
        "sample": latents,
        "memory": (BATCH, 2, *latents[1:]),
        "noise": latents,
        "known": latents,
        "known_noise": latents,
        "mask": (BATCH, 1, "height", "width"),
        "rows": ("rows",),
        "timestep": ("rows",),
        "context": ("rows", "tokens", interface.context),
        "pick": (BATCH, 2),
        "guidance": (BATCH, 2),
        "input_scale": (BATCH,),
        "step": (BATCH, 3, 5),
        "known_step": (BATCH, 2),
        **interface.extras,
    }
    if max_rank:
        axes |= {"lora": ("adapters", bank_rows(module.layers), "rank"), "lora_row": ("rows",)}
    dtypes = dict.fromkeys(("rows", "pick", "lora_row"), torch.int64) | {"lora": module.dtype}
    return tuple(
        GraphTensor(name=name, axes=axis, dtype=dtypes.get(name, torch.float32))
        for name, axis in axes.items()
    )


def _cases(interface: _Interface, tokens: int, max_rank: int, max_batch: int) -> tuple[Sizes, ...]:
    names = (BATCH, "rows", "height", "width", "tokens", "adapters", "rank")
    per_sequence = 2 if interface.cases is _UNET_CASES else 1
    full = (max_batch, per_sequence * max_batch, 8, 8, 0, 2, 1)
    cases = []
    for row in (*interface.cases, full):
        case = dict(zip(names, row, strict=True))
        if case["tokens"] <= 0:
            case["tokens"] = tokens * max(1, -case["tokens"])
        case["rank"] = min(case["rank"] or max_rank, max_rank)
        cases.append(case if max_rank else {name: case[name] for name in names[:5]})
    return tuple(cases)


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
    if "time_ids" in drawn:
        drawn["time_ids"] = (torch.rand(rows, 6, generator=generator) * 1024).round()
    if "guidance_embed" in drawn:
        drawn["guidance_embed"] = 1 + 4 * torch.rand(rows, generator=generator)
    if "lora" in drawn:
        drawn["lora"] = drawn["lora"] * 0.03
        drawn["lora"][0] = 0
        drawn["lora_row"] = torch.randint(sizes["adapters"], (rows,), generator=generator)
    return drawn
