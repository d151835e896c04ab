"""Train the demo model's AutoencoderKL on random crops of drawn pictures.

``python -m demo.train_vae``
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray

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


def build_vae() -> Any:
    """The untrained VAE: f8, 4 channels, 2.75 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=192,
    )


class Crops:
    """Random square crops, half of them around a face of more than 38 px.

    Attributes:
        side: of a crop in pixels.
    """

    def __init__(self, folder: Path, side: int, seed: int) -> None:
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        faces = np.load(folder / "faces.npy")[:, 0]
        self.centres = (faces[:, :2] + faces[:, 2:4]) / 2
        self.large = np.flatnonzero(faces[:, 2] - faces[:, 0] > 38)
        self.side = side
        self.random = np.random.default_rng(seed)

    def _corner(self) -> tuple[int, int, int]:
        """Picture index and the crop's upper left corner."""
        limit = self.images.shape[1] - self.side
        if len(self.large) and self.random.random() < 0.5:
            index = int(self.large[self.random.integers(len(self.large))])
            centre = self.centres[index] - self.side / 2 + self.random.normal(0, 16, 2)
            x, y = np.clip(centre, 0, limit).astype(int)
            return index, int(x), int(y)
        index = int(self.random.integers(len(self.images)))
        return index, int(self.random.integers(limit + 1)), int(self.random.integers(limit + 1))

    def draw(self, count: int) -> torch.Tensor:
        """A batch (count, 3, side, side) float32 in [-1, 1]."""
        crops = np.empty((count, self.side, self.side, 3), np.uint8)
        for row in range(count):
            index, x, y = self._corner()
            crop = self.images[index, y : y + self.side, x : x + self.side]
            crops[row] = crop[:, ::-1] if self.random.random() < 0.5 else crop
        return torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1


def _edges(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pixels[..., 1:] - pixels[..., :-1], pixels[..., 1:, :] - pixels[..., :-1, :]


def vae_loss(
    vae: Any, pixels: torch.Tensor, kl_weight: float, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, PSNR in dB and KL of one batch, scalars on its device.

    Args:
        vae: the AutoencoderKL.
        pixels: (B, 3, H, W) float32 in [-1, 1].
        kl_weight: weight of the mean KL divergence per latent value.
        weights: (B, 1, H, W) float32 of the pixels' errors; None counts all alike.
    """
    with mixed_precision(pixels.device.type):
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    decoded, mean, logvar = decoded.float(), posterior.mean.float(), posterior.logvar.float()
    if weights is None:
        weights = torch.ones_like(pixels[:, :1])
    weights = weights / weights.mean()
    errors = decoded - pixels
    across, down = _edges(errors)
    edges = (across.abs() * weights[..., 1:]).mean() + (down.abs() * weights[..., 1:, :]).mean()
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    pixel_loss = ((errors.abs() + errors**2) * weights).mean()
    loss = pixel_loss + 0.5 * edges + kl_weight * divergence
    psnr = 10 * torch.log10(4 / F.mse_loss(decoded, pixels).detach())
    return loss, psnr, divergence.detach()


@torch.no_grad()
def whiten(vae: Any, pictures: NDArray[np.uint8]) -> None:
    """Give the latents zero mean and unit spread per channel, exactly, inside the 1x1 convolutions.

    A UNet trained on even latents learns all four channels at the same noise levels.

    Args:
        vae: changed in place; its scaling factor becomes 1.
        pictures: (N, H, W, 3) uint8, a sample to measure on.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float()
    latents = torch.cat(
        [vae.encode(p.to(vae.device) / 127.5 - 1).latent_dist.mean for p in pixels.split(16)]
    )
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    out, back = vae.quant_conv, vae.post_quant_conv
    out.weight[:4] /= spread[:, None, None, None]
    out.bias[:4] = (out.bias[:4] - mean) / spread
    out.bias[4:] -= 2 * spread.log()
    back.bias += (back.weight[:, :, 0, 0] * mean).sum(1)
    back.weight *= spread[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)


def export_vae(vae: Any, folder: Path) -> None:
    """Write a copy of ``vae`` as fp16 into ``folder``; ``vae`` itself stays float32."""
    # from_config drops what equalled a default when the module was built: the scale is set again.
    half = AutoencoderKL.from_config(vae.config)
    half.register_to_config(scaling_factor=vae.config.scaling_factor, _name_or_path="")
    half.load_state_dict(vae.state_dict())
    half.half().save_pretrained(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, run="vae", steps=40000, batch=4)
    parser.add_argument("--pictures", type=Path, default=CACHE / "train")
    parser.add_argument("--start", type=Path, help="a VAE folder to start from")
    parser.add_argument("--out", type=Path, default=WEIGHTS / "sd" / "vae")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--cooldown", type=int, default=20000)
    parser.add_argument("--kl", type=float, default=5e-4)
    parser.add_argument("--side", type=int, default=64)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Train, whiten, export."""
    options = parse_run_options(_parser(), arguments)
    vae = build_vae()
    if options.start:
        vae = AutoencoderKL.from_pretrained(options.start, torch_dtype=torch.float32)
    vae = vae.to(options.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    run = open_run(options, modules={"vae": vae}, optimizer=optimizer, decay=0.998)
    print(size_of(vae), "from step", run.step)
    _train(run, options)
    run.average.swap()
    vae.eval().cpu()
    whiten(vae, np.load(options.pictures / "images.npy", mmap_mode="r")[:256])
    export_vae(vae, options.out)


def _train(run: Run, options: argparse.Namespace) -> None:
    """The loop: stops at the last step or when the minutes are over, and saves."""
    crops = Crops(options.pictures, options.side, options.seed + run.step)
    schedule = Schedule(
        learning_rate=options.learning_rate, steps=options.steps, cooldown=options.cooldown
    )
    for step in steps_to_take(run, options):
        pixels = crops.draw(options.batch).to(options.device, memory_format=torch.channels_last)
        loss, psnr, kl = vae_loss(run.modules["vae"], pixels, options.kl)
        run.advance(loss, schedule.at(step))
        figures = {"loss": loss.detach(), "psnr": psnr, "kl": kl}
        run.note({name: float(value) for name, value in figures.items()}, 200, options.batch)


if __name__ == "__main__":
    main()
