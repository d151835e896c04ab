"""Train the demo's x4 upscaler (SRVGGNetCompact) on drawn pictures and their VAE round trips.

``python -m demo.train_upscaler``
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from demo.latents import load_vae, round_trip
from demo.training import (
    CACHE,
    WEIGHTS,
    Run,
    Schedule,
    add_run_arguments,
    open_run,
    parse_run_options,
    save_half,
    size_of,
    steps_to_take,
)
from export.upscalers import SRVGGNetCompact

FEATURES, CONVOLUTIONS, SCALE = 32, 6, 4
_SHRINK = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)


def build_upscaler() -> SRVGGNetCompact:
    """The untrained network: 70 k parameters, starting as a nearest-neighbour enlargement."""
    model = SRVGGNetCompact(features=FEATURES, convolutions=CONVOLUTIONS, scale=SCALE)
    last = model.body[-1]
    assert isinstance(last, torch.nn.Conv2d)
    assert last.bias is not None
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.zero_()
    return model


class Pairs:
    """Low and high resolution pairs: drawn large, seen small as drawn or as the VAE decodes them.

    Attributes:
        images: (N, S, S, 3) uint8, large.
        decoded: (N, S/4, S/4, 3) uint8, the same through the VAE at a quarter, or None.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        decoded: NDArray[np.uint8] | None,
        side: int,
        seed: int,
    ) -> None:
        self.images = images
        self.decoded = decoded
        self.side = side
        self.random = np.random.default_rng(seed)

    def _shrink(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What a sharp picture a quarter as large looks like, give or take blur and noise."""
        random = self.random
        if random.random() < 0.5:
            image = cv2.GaussianBlur(image, (0, 0), random.uniform(0.3, 2.4))
        method = _SHRINK[int(random.integers(3))] if random.random() < 0.5 else cv2.INTER_AREA
        size = self.side // SCALE
        small = cv2.resize(image, (size, size), interpolation=method).astype(np.float32)
        noise = random.normal(0, random.uniform(0, 4), small.shape)
        return np.asarray(small + noise, np.float32)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(count, 3, s/4, s/4) and (count, 3, s, s) float32 in [0, 1]."""
        quarter = self.side // SCALE
        low = np.empty((count, quarter, quarter, 3), np.float32)
        high = np.empty((count, self.side, self.side, 3), np.float32)
        limit = self.images.shape[1] // SCALE - quarter
        for row in range(count):
            x, y = self.random.integers(0, limit + 1, 2)
            index = int(self.random.integers(len(self.images)))
            rows, columns = slice(SCALE * y, None), slice(SCALE * x, None)
            crop = self.images[index, rows, columns][: self.side, : self.side]
            high[row] = crop
            if self.decoded is not None and self.random.random() < 0.5:
                low[row] = self.decoded[index, y : y + quarter, x : x + quarter]
            else:
                low[row] = self._shrink(np.ascontiguousarray(crop))
        pair = [
            torch.from_numpy(np.clip(part, 0, 255)).permute(0, 3, 1, 2) / 255
            for part in (low, high)
        ]
        return pair[0], pair[1]


def decode_small(folder: Path, weights: Path) -> NDArray[np.uint8]:
    """The folder's pictures at a quarter through the VAE, kept in decoded.npy beside them."""
    path = folder / "decoded.npy"
    if not path.exists():
        images = np.load(folder / "images.npy", mmap_mode="r")
        size = images.shape[1] // SCALE
        small = [cv2.resize(p, (size, size), interpolation=cv2.INTER_AREA) for p in images]
        np.save(path, round_trip(load_vae(weights), np.stack(small)))
    return np.asarray(np.load(path), np.uint8)


def upscaler_loss(enlarged: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Absolute error of pixels and of their differences to both sides."""
    loss = (enlarged - wanted).abs().mean()
    for axis in (2, 3):
        edges = torch.diff(enlarged, dim=axis) - torch.diff(wanted, dim=axis)
        loss = loss + 0.5 * edges.abs().mean()
    return loss


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    return float(-10 * torch.log10(F.mse_loss(first.clamp(0, 1), second).detach()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, run="upscaler", steps=3000, batch=16)
    parser.add_argument("--pictures", type=Path, default=CACHE / "large")
    parser.add_argument("--weights", type=Path, help="a pipeline whose VAE blurs half the pairs")
    parser.add_argument("--out", type=Path, default=WEIGHTS / "upscaler.safetensors")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--side", type=int, default=128, help="of the large picture")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Train and export."""
    options = parse_run_options(_parser(), arguments)
    cv2.setNumThreads(1)
    model = build_upscaler().to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    run = open_run(options, modules={"upscaler": model}, optimizer=optimizer, decay=0.98)
    print(size_of(model), "from step", run.step, flush=True)
    train(run, options)
    metadata = {"architecture": "SRVGGNetCompact", "num_feat": FEATURES, "num_conv": CONVOLUTIONS}
    save_half(model.state_dict(), options.out, metadata | {"upscale": SCALE, "act_type": "prelu"})


def train(run: Run, options: argparse.Namespace) -> None:
    """Optimize until the last step or minute; logs its PSNR beside bicubic's."""
    images = np.load(options.pictures / "images.npy", mmap_mode="r")
    decoded = decode_small(options.pictures, options.weights) if options.weights else None
    pairs = Pairs(images, decoded, options.side, options.seed + run.step)
    schedule = Schedule(
        learning_rate=options.learning_rate, steps=options.steps, cooldown=options.steps * 3 // 4
    )
    for step in steps_to_take(run, options):
        low, high = (part.to(options.device) for part in pairs.draw(options.batch))
        enlarged = run.modules["upscaler"](low)
        loss = upscaler_loss(enlarged, high)
        run.advance(loss, schedule.at(step))
        bicubic = F.interpolate(low, scale_factor=SCALE, mode="bicubic")
        figures = {"psnr": psnr(enlarged, high), "bicubic": psnr(bicubic, high)}
        run.note({"loss": float(loss.detach())} | figures, 100, options.batch)


if __name__ == "__main__":
    main()
