"""Train the demo's text encoder and UNet on encoded pictures (v-prediction).

``python -m demo.train_unet --resume``

Stops after ``--minutes`` or ``--steps``, saves, and writes the averaged weights as fp16 into
``--out``; the next call with ``--resume`` goes on.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from transformers import CLIPTextConfig, CLIPTextModel

from demo.tokenizer import load_tokenizer
from demo.training import (
    CACHE,
    WEIGHTS,
    Run,
    Schedule,
    add_run_arguments,
    mixed_precision,
    open_run,
    parse_run_options,
    size_of,
    steps_to_take,
)

START_TOKEN, END_TOKEN = 725, 726
_FACE_WEIGHT = 2.0
_FEATURE_WEIGHT = 6.0
#: Half side of the square around an eye, the nose or a mouth's corner, in shares of the face.
_FEATURE_REACH = 0.14
_SNR_CAP = 5.0
_RARE_WORDS = {"freckles": 1.0, "mole": 1.0, "earrings": 1.0, "eyes": 0.5, "surprised": 0.5}
"""Word of a caption -> how much more often its picture is drawn, where rare ones are wanted."""


def build_unet(sample_size: int = 24) -> Any:
    """The untrained UNet, 10.9 M parameters, at ``sample_size`` latents a side."""
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(2, 4, 6),
        norm_num_groups=32,
    )


def build_text_encoder(vocab_size: int) -> Any:
    """The untrained text encoder, 0.5 M parameters."""
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=START_TOKEN,
        eos_token_id=END_TOKEN,
        pad_token_id=END_TOKEN,
        projection_dim=128,
    )
    return CLIPTextModel(config)


def noise_schedule() -> torch.Tensor:
    """(1000,) float32: the cumulative product of alphas, Stable Diffusion's own."""
    scheduler = DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
    )
    products: torch.Tensor = scheduler.alphas_cumprod
    return products


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """An encoded cache folder in memory.

    Attributes:
        latents: (N, 4, h, w) float16.
        tokens: (N, W, 77) int16.
        weights: (N, 1, h, w) float16, above 1 on faces.
        shares: (N,) float32, how often each picture is drawn, relative; None for equally often.
    """

    latents: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor
    shares: torch.Tensor | None = None

    @staticmethod
    def load(folder: Path) -> Dataset:
        """Read latents, tokens and faces, as `demo.pictures` and `demo.latents` leave them."""
        latents = np.load(folder / "latents.npy")
        faces = np.load(folder / "faces.npy")[: len(latents)]
        return Dataset(
            latents=torch.from_numpy(latents),
            tokens=torch.from_numpy(np.load(folder / "tokens.npy")[: len(latents)]),
            weights=face_weights(faces, latents.shape[-1]),
        )

    def draw(
        self, count: int, generator: torch.Generator, dropout: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, token ids and loss weights of random pictures, captions dropped at times.

        The generator must be on the data's device.
        """
        device = self.latents.device
        if self.shares is None:
            rows = torch.randint(0, len(self.latents), (count,), generator=generator, device=device)
        else:
            rows = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        wording = torch.randint(
            0, self.tokens.shape[1], (count,), generator=generator, device=device
        )
        ids = self.tokens[rows, wording].long()
        empty = torch.full((77,), END_TOKEN, device=device)
        empty[0] = START_TOKEN
        dropped = torch.rand(count, generator=generator, device=device) < dropout
        ids = torch.where(dropped[:, None], empty, ids)
        return self.latents[rows].float(), ids, self.weights[rows].float()


def rare_shares(tokens: torch.Tensor, tokenizer: Any, strength: float) -> torch.Tensor:
    """How often to draw each picture: 1, and more for what captions say but seldom show.

    Args:
        tokens: (N, W, 77) integers, the wordings of every picture.
        tokenizer: gave the tokens.
        strength: factor on `_RARE_WORDS`; 0 gives ones.

    Returns:
        (N,) float32, relative frequencies.
    """
    shares = torch.ones(len(tokens))
    for word, more in _RARE_WORDS.items():
        (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        named = (tokens == token).sum((1, 2)).float() / tokens.shape[1]
        shares += strength * more * named.to(shares.device)
    return shares


def face_weights(faces: NDArray[np.float32], side: int) -> torch.Tensor:
    """Loss weights (N, 1, side, side) float16: face cells count 3 times, eyes and mouths 9 times.

    Args:
        faces: (N, F, 14) boxes and landmarks in pixels, NaN where there is none.
        side: of the latents; a cell is 8 px.
    """
    weights = np.ones((len(faces), 1, side, side), np.float16)
    for row, boxes in enumerate(faces):
        found = boxes[~np.isnan(boxes[:, 0])]
        for face in found:
            weights[row, 0][_cells(*face[:4])] = 1 + _FACE_WEIGHT
        for face in found:
            reach = _FEATURE_REACH * float(face[2] - face[0])
            for x, y in face[4:].reshape(5, 2):
                cells = _cells(x - reach, y - reach, x + reach, y + reach)
                weights[row, 0][cells] = 1 + _FACE_WEIGHT + _FEATURE_WEIGHT
    return torch.from_numpy(weights)


def _cells(x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice]:
    """Rows and columns of the latents that a box in pixels touches."""
    return (
        slice(max(0, int(y0 / 8)), max(0, math.ceil(y1 / 8))),
        slice(max(0, int(x0 / 8)), max(0, math.ceil(x1 / 8))),
    )


def draw_noise(
    latents: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of the latents' shape and (B,) timesteps below ``count``, on the latents' device.

    The generator is on the CPU or on that device.
    """
    device, source = latents.device, generator.device
    noise = torch.randn(latents.shape, generator=generator, device=source).to(device)
    steps = torch.randint(0, count, (len(latents),), generator=generator, device=source)
    return noise, steps.to(device)


def diffusion_loss(
    unet: Any,
    context: torch.Tensor,
    latents: torch.Tensor,
    weights: torch.Tensor,
    products: torch.Tensor,
    noise: torch.Tensor,
    steps: torch.Tensor,
) -> torch.Tensor:
    """Weighted v-prediction error at given timesteps.

    Args:
        unet: predicts v.
        context: (B, L, D), the text encoder's states.
        latents: (B, 4, h, w) float32, scaled.
        weights: (B, 1, h, w) float32.
        products: `noise_schedule`, on the same device.
        noise: (B, 4, h, w) float32, of `draw_noise`.
        steps: (B,) integers, likewise.

    Source: Salimans & Ho 2022 (v), Hang et al. 2023, "Min-SNR weighting", eq. 10 in the v form.
    """
    kept = products[steps][:, None, None, None]
    signal, spread = kept.sqrt(), (1 - kept).sqrt()
    velocity = signal * noise - spread * latents
    with mixed_precision(latents.device.type):
        predicted = unet(signal * latents + spread * noise, steps, context).sample
    # v's own weight of a clean picture's error is SNR + 1; capped, fine noise does not rule.
    capped = ((_SNR_CAP + 1) * (1 - kept)).clamp(max=1.0)
    loss: torch.Tensor = ((predicted.float() - velocity) ** 2 * weights * capped).mean()
    return loss


def load_networks(
    start: Path | None, vocab_size: int, sample_size: int, text_encoder: Path | None = None
) -> tuple[Any, Any]:
    """UNet and text encoder in float32: from a pipeline's folder, or untrained when None.

    ``text_encoder`` is the folder of another encoder, as `demo.train_text` leaves it.
    """
    if start is None:
        unet = build_unet(sample_size)
    else:
        unet = UNet2DConditionModel.from_pretrained(start / "unet", torch_dtype=torch.float32)
        text_encoder = text_encoder or start / "text_encoder"
    if text_encoder is None:
        return unet, build_text_encoder(vocab_size)
    encoder = CLIPTextModel.from_pretrained(
        text_encoder, torch_dtype=torch.float32, attn_implementation="eager"
    )
    return unet, encoder


def export_networks(run: Run, folder: Path) -> None:
    """Write the averaged UNet and text encoder as fp16; the run stays as it is."""
    run.average.swap()
    for name, module in run.modules.items():
        network: Any = module
        half = type(network)(network.config) if name == "text_encoder" else None
        half = half or type(network).from_config(network.config)
        half.load_state_dict(network.state_dict(), strict=False)
        if name == "unet":
            half.register_to_config(_name_or_path="")
        half.half().save_pretrained(folder / name)
    run.average.swap()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, run="unet", steps=60000, batch=32)
    parser.add_argument("--export-only", action="store_true", help="write --out and stop")
    parser.add_argument("--data", type=Path, default=CACHE / "train")
    parser.add_argument("--start", type=Path, help="a pipeline folder to start from")
    parser.add_argument("--text-encoder", type=Path, help="demo.train_text's, to start from")
    parser.add_argument("--out", type=Path, default=WEIGHTS / "sd")
    parser.add_argument("--vocabulary", type=int, default=803, help="tokens, for a new encoder")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--cooldown", type=int, default=0, help="last steps, rate falling to 0")
    parser.add_argument("--rare", type=float, default=0.0, help="favour pictures of rare words")
    parser.add_argument("--dropout", type=float, default=0.1, help="share of empty captions")
    parser.add_argument("--decay", type=float, default=0.999, help="of the moving average")
    return parser


def start_run(options: argparse.Namespace, sample_size: int) -> Run:
    """Networks, optimizer and average, resumed when asked for."""
    unet, encoder = load_networks(
        options.start, options.vocabulary, sample_size, options.text_encoder
    )
    if options.device == "cpu":
        # A third faster than the fused kernel at these sizes.
        unet.set_attn_processor(AttnProcessor())
    unet, encoder = unet.to(options.device).train(), encoder.to(options.device).train()
    parameters = [*unet.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=1e-2, fused=True
    )
    run = open_run(
        options,
        modules={"unet": unet, "text_encoder": encoder},
        optimizer=optimizer,
        decay=options.decay,
    )
    print(size_of(unet), "and", size_of(encoder), "from step", run.step, flush=True)
    return run


def train(run: Run, data: Dataset, options: argparse.Namespace) -> None:
    """Optimize until the last step or the last minute, with checkpoints."""
    products = noise_schedule().to(options.device)
    schedule = Schedule(
        learning_rate=options.learning_rate,
        steps=options.steps,
        warmup=200,
        cooldown=options.cooldown,
    )
    unet, encoder = run.modules["unet"], run.modules["text_encoder"]
    for step in steps_to_take(run, options):
        drawn = data.draw(options.batch, run.generator, options.dropout)
        latents, ids, weights = (tensor.to(options.device) for tensor in drawn)
        with mixed_precision(latents.device.type):
            context = encoder(ids).last_hidden_state
        noise, steps = draw_noise(latents, len(products), run.generator)
        loss = diffusion_loss(unet, context, latents, weights, products, noise, steps)
        run.advance(loss, schedule.at(step))
        run.note({"loss": float(loss.detach())}, 100, options.batch)


def main(arguments: list[str] | None = None) -> None:
    """Train, save, export."""
    options = parse_run_options(_parser(), arguments)
    data = Dataset.load(options.data)
    if options.rare:
        tokenizer = load_tokenizer(options.start or options.out)
        shares = rare_shares(data.tokens, tokenizer, options.rare)
        data = replace(data, shares=shares)
    run = start_run(options, data.latents.shape[-1])
    if not options.export_only:
        train(run, data, options)
    export_networks(run, options.out)


if __name__ == "__main__":
    main()
