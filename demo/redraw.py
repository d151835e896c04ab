"""Pass drawn pictures through the generator, for networks that must work on its output.

``python -m demo.redraw --pictures demo/cache/train --out demo/cache/redrawn --count 2400``

A third goes through the VAE alone; the others are noised to a random step below ``--noise``,
denoised again by the UNet with their own caption, and decoded. Faces stay where they were drawn, so
boxes and landmarks hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray

from demo.latents import load_vae
from demo.train_unet import Dataset, load_networks, noise_schedule
from demo.training import CACHE, WEIGHTS, mixed_precision

_STEPS = 4


def denoise(
    unet: Any,
    context: torch.Tensor,
    latents: torch.Tensor,
    start: int,
    products: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Noise latents to step ``start`` and bring them back with a few DDIM steps.

    Args:
        unet: predicts v.
        context: (B, L, D).
        latents: (B, 4, h, w) float32, scaled.
        start: timestep, 0 to 999; below 1 returns ``latents``.
        products: `noise_schedule`.
        generator: CPU stream of the noise.
    """
    if start < 1:
        return latents
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    steps = np.linspace(start, 0, _STEPS + 1).round().astype(int)
    sample = products[start].sqrt() * latents + (1 - products[start]).sqrt() * noise
    for now, after in zip(steps[:-1], steps[1:], strict=True):
        signal, spread = products[now].sqrt(), (1 - products[now]).sqrt()
        timestep = torch.tensor(int(now), device=sample.device)
        velocity = unet(sample, timestep, context).sample
        clean, noise = signal * sample - spread * velocity, spread * sample + signal * velocity
        sample = products[after].sqrt() * clean + (1 - products[after]).sqrt() * noise
    return sample


@torch.no_grad()
def redraw(
    weights: Path, data: Dataset, rows: NDArray[np.int64], noise: int, seed: int, device: str
) -> NDArray[np.uint8]:
    """The pictures of ``rows`` as the generator would paint them, (N, S, S, 3) uint8."""
    unet, encoder = (network.to(device) for network in load_networks(weights, 0, 0))
    unet.set_attn_processor(AttnProcessor())
    vae = load_vae(weights, device)
    random, products = np.random.default_rng(seed), noise_schedule().to(device)
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for first in range(0, len(rows), 24):
        part = torch.from_numpy(rows[first : first + 24])
        start = 0 if random.random() < 1 / 3 else int(random.integers(60, noise))
        context = encoder(data.tokens[part, 0].long().to(device)).last_hidden_state
        latents = data.latents[part].float().to(device)
        with mixed_precision(device):
            latents = denoise(unet, context, latents, start, products, generator)
            decoded = vae.decode(latents.float() / vae.config.scaling_factor).sample
        pixels = (decoded.float().clamp(-1, 1) + 1) * 127.5
        pictures.append(pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(pictures)


def main(arguments: list[str] | None = None) -> None:
    """Redraw a random part of a cache folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, default=CACHE / "train")
    parser.add_argument("--out", type=Path, default=CACHE / "redrawn")
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "sd")
    parser.add_argument("--count", type=int, default=2400)
    parser.add_argument("--noise", type=int, default=350, help="highest timestep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    data = Dataset.load(options.pictures)
    order = np.random.default_rng(options.seed).permutation(len(data.latents))
    rows = np.sort(order[: options.count])
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = redraw(options.weights, data, rows, options.noise, options.seed, options.device)
    np.save(options.out / "images.npy", pictures)
    np.save(options.out / "faces.npy", np.load(options.pictures / "faces.npy")[rows])
    print(f"{len(pictures)} pictures in {options.out.name}")


if __name__ == "__main__":
    main()
