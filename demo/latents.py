"""Encode a cache folder's pictures with the demo's VAE, and its captions with the tokenizer.

``python -m demo.latents --pictures demo/cache/train`` writes latents.npy (N, 4, h, w) float16,
scaled as the UNet sees them, and tokens.npy (N, 4, 77) int16 beside the pictures.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from demo.pictures import WORDINGS, load_captions
from demo.tokenizer import load_tokenizer
from demo.training import CACHE, WEIGHTS, mixed_precision


@torch.no_grad()
def encode_pictures(
    vae: Any, images: NDArray[np.uint8], batch: int, device: str
) -> NDArray[np.float16]:
    """Posterior means of (N, S, S, 3) uint8 pictures, times the scaling factor."""
    side = images.shape[1] // 8
    latents = np.empty((len(images), 4, side, side), np.float16)
    started_s = time.monotonic()
    for first in range(0, len(images), batch):
        pixels = torch.from_numpy(np.ascontiguousarray(images[first : first + batch]))
        pixels = pixels.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        with mixed_precision(device):
            mean = vae.encode(pixels.to(memory_format=torch.channels_last)).latent_dist.mean
        scaled = mean.float() * vae.config.scaling_factor
        latents[first : first + batch] = scaled.cpu().numpy()
        if first % (batch * 100) == 0 and first:
            print(f"{first} of {len(images)}, {first / (time.monotonic() - started_s):.0f}/s")
    return latents


def encode_captions(tokenizer: Any, captions: list[list[str]]) -> NDArray[np.int16]:
    """Token ids (N, WORDINGS, 77) of every wording, cut or padded to 77."""
    flat = [wording for wordings in captions for wording in wordings]
    ids = tokenizer(flat, padding="max_length", max_length=77, truncation=True)["input_ids"]
    return np.array(ids, np.int16).reshape(-1, WORDINGS, 77)


def load_vae(folder: Path, device: str = "cpu") -> Any:
    """The pipeline's VAE in float32, for inference."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    return vae.eval().to(device, memory_format=torch.channels_last)


@torch.no_grad()
def round_trip(vae: Any, pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures encoded and decoded."""
    decoded = []
    for first in range(0, len(pictures), 8):
        pixels = torch.from_numpy(pictures[first : first + 8]).permute(0, 3, 1, 2).float()
        out = vae.decode(vae.encode(pixels / 127.5 - 1).latent_dist.mean).sample
        decoded.append(((out.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(decoded)


def main(arguments: list[str] | None = None) -> None:
    """Encode one folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, default=CACHE / "train")
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "sd")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, help="only the first pictures")
    parser.add_argument("--append", action="store_true", help="keep what latents.npy holds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tokens = encode_captions(load_tokenizer(options.weights), load_captions(options.pictures))
    np.save(options.pictures / "tokens.npy", tokens)
    images = np.load(options.pictures / "images.npy", mmap_mode="r")[: options.limit]
    vae = load_vae(options.weights, options.device)
    path = options.pictures / "latents.npy"
    known = np.load(path) if options.append else np.empty((0, 4, 0, 0), np.float16)
    latents = encode_pictures(vae, images[len(known) :], options.batch, options.device)
    if len(known):
        latents = np.concatenate([known, latents])
    np.save(path, latents)
    spread = latents.astype(np.float32).std((0, 2, 3)).round(3)
    print(f"{len(latents)} pictures, spread per channel {spread.tolist()}")


if __name__ == "__main__":
    main()
