"""Train VAE, text encoder and UNet in one sitting on a GPU, measured in minutes.

``python -m demo.train_gpu --minutes 9 --workers 15``

Workers render pictures while the GPU trains: first the VAE, on crops, then on whole pictures; its
latents are whitened; then text encoder and UNet on the latents of all pictures drawn so far, more
of them every few seconds. Rates fall to zero with the clock, so the run always ends cooled down.
Writes a diffusers pipeline (fp16) into ``--out`` and the VAE in float32 into ``--out``/vae32, from
which `demo.train_vae` and `demo.train_unet` go on. Captions are tokenized with the tokenizer of
``--start``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from demo.picture_stream import PictureStream
from demo.pictures import NATIVE_PX, PictureSet
from demo.tokenizer import load_tokenizer
from demo.train_unet import (
    Dataset,
    diffusion_loss,
    export_networks,
    face_weights,
    load_networks,
    noise_schedule,
    rare_shares,
)
from demo.train_vae import build_vae, export_vae, vae_loss, whiten
from demo.training import CACHE, RUNS, WEIGHTS, Average, Run, mixed_precision

_FIRST_PICTURES = 2048
_ENCODE_BATCH = 256


@dataclass(slots=True)
class Clock:
    """A phase that lasts a number of seconds; the learning rate follows it.

    Attributes:
        seconds: length of the phase.
        learning_rate: at the plateau.
        cooldown: last share of the phase, over which the rate falls to zero.
        warmup: steps from zero up to the plateau.
    """

    seconds: float
    learning_rate: float
    cooldown: float
    warmup: int = 100
    _since_s: float = field(default_factory=time.monotonic)

    @property
    def share(self) -> float:
        """Share of the phase that is over, 0 to 1 and beyond."""
        if self.seconds <= 0:
            return 1.0
        return (time.monotonic() - self._since_s) / self.seconds

    def rate(self, step: int) -> float:
        """Learning rate of step ``step`` now."""
        down = min(1.0, max(0.0, 1 - self.share) / self.cooldown)
        return self.learning_rate * down * min(1.0, (step + 1) / self.warmup)


def crop_batch(images: torch.Tensor, centres: torch.Tensor, count: int, side: int) -> torch.Tensor:
    """Random square crops of pictures on their own device, half of them near a face.

    Args:
        images: (N, S, S, 3) uint8.
        centres: (N, 2) float32, x and y of a face in pixels, NaN where there is none.
        count: crops.
        side: of a crop, at most S.

    Returns:
        (count, 3, side, side) float32 in [-1, 1].
    """
    device, limit = images.device, images.shape[1] - side
    rows = torch.randint(len(images), (count,), device=device)
    corners = (torch.rand(count, 2, device=device) * (limit + 1)).floor()
    near = centres[rows] - side / 2 + torch.randn(count, 2, device=device) * side / 5
    wanted = (torch.rand(count, device=device) < 0.5) & ~near.isnan().any(1)
    corners = torch.where(wanted[:, None], near, corners).clamp(0, limit).long()
    span = torch.arange(side, device=device)
    columns, lines = corners[:, :1] + span, corners[:, 1:] + span
    crops = images[rows[:, None, None], lines[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2).float() / 127.5 - 1


def _report(values: dict[str, float]) -> None:
    print(json.dumps({name: round(value, 4) for name, value in values.items()}), flush=True)


def train_vae(vae: Any, stream: PictureStream, options: argparse.Namespace) -> None:
    """Optimize the VAE for ``--vae-minutes``, then put its averaged, whitened weights in place."""
    ready = min(stream.ready, options.vae_pictures)
    images = torch.from_numpy(stream.images[:ready]).to(options.device)
    faces = torch.from_numpy(stream.faces[:ready, 0])
    wide = faces[:, 2] - faces[:, 0] > options.size / 5
    centres = torch.where(wide[:, None], (faces[:, :2] + faces[:, 2:4]) / 2, torch.nan)
    centres = centres.to(options.device)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    vae.train()
    run = Run(
        folder=options.run, modules={"vae": vae}, optimizer=optimizer,
        average=Average(vae.parameters(), 0.998), generator=torch.Generator(),
    )  # fmt: skip
    clock = Clock(seconds=60 * options.vae_minutes, learning_rate=1.2e-3, cooldown=0.6)
    while clock.share < 1:
        whole = clock.share > 0.6
        side, count = (options.size, options.vae_batch // 4) if whole else (
            options.size // 2, options.vae_batch)  # fmt: skip
        pixels = crop_batch(images, centres, count, side).to(memory_format=torch.channels_last)
        loss, psnr, kl = vae_loss(vae, pixels, options.kl)
        run.advance(loss, clock.rate(run.step))
        if run.step % 200 == 0:
            _report({"vae_step": run.step, "psnr": psnr, "kl": kl, "share": clock.share})
    _report({"vae_steps": run.step, "pictures": ready})
    run.average.swap()
    vae.eval()
    whiten(vae, stream.images[: options.vae_pictures][:512])


def start_vae(options: argparse.Namespace) -> Any:
    """The VAE on the device: ``--vae-start``'s, or untrained."""
    vae = build_vae()
    if options.vae_start:
        vae = AutoencoderKL.from_pretrained(options.vae_start, torch_dtype=torch.float32)
    vae = vae.to(options.device, memory_format=torch.channels_last)
    vae.register_to_config(sample_size=options.size)
    return vae


class GrowingData:
    """Latents, tokens and face weights of the pictures drawn so far, on the GPU.

    Attributes:
        data: what can be drawn from now.
    """

    def __init__(self, vae: Any, stream: PictureStream, options: argparse.Namespace) -> None:
        device = options.device
        self._vae, self._stream, self._device = vae, stream, device
        self._tokenizer, self._rare = load_tokenizer(options.start), options.rare
        side = stream.images.shape[1] // 8
        self._latents = torch.empty(
            (stream.count, 4, side, side), dtype=torch.float16, device=device
        )
        self._tokens = torch.empty(stream.tokens.shape, dtype=torch.int16, device=device)
        self._weights = torch.empty(
            (stream.count, 1, side, side), dtype=torch.float16, device=device
        )
        self._shares = torch.ones(stream.count, device=device)
        self.count = 0
        self.grow(_ENCODE_BATCH)

    @property
    def data(self) -> Dataset:
        """The pictures encoded so far."""
        return Dataset(
            latents=self._latents[: self.count],
            tokens=self._tokens[: self.count],
            weights=self._weights[: self.count],
            shares=self._shares[: self.count] if self._rare else None,
        )

    @torch.no_grad()
    def grow(self, least: int) -> None:
        """Encode whole batches of new pictures, waiting until ``least`` are encoded in all."""
        end_s = time.monotonic() + 15
        while self.count < least or (
            self.count + _ENCODE_BATCH <= self._stream.ready and time.monotonic() < end_s
        ):
            end = min(self.count + _ENCODE_BATCH, self._stream.count)
            if end > self._stream.ready:
                time.sleep(0.2)
                continue
            self._encode(self.count, end)
            self.count = end

    def save(self, folder: Path, count: int) -> None:
        """Write the first ``count`` pictures as `demo.latents` does, for `demo.redraw`."""
        folder.mkdir(parents=True, exist_ok=True)
        count = min(count, self.count)
        np.save(folder / "latents.npy", self._latents[:count].cpu().numpy())
        for name in ("images", "faces", "tokens"):
            np.save(folder / f"{name}.npy", getattr(self._stream, name)[:count])

    def _encode(self, first: int, end: int) -> None:
        pixels = torch.from_numpy(self._stream.images[first:end]).to(self._device)
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        with mixed_precision(pixels.device.type):
            mean = self._vae.encode(pixels.to(memory_format=torch.channels_last)).latent_dist.mean
        self._latents[first:end] = mean.float() * self._vae.config.scaling_factor
        tokens = torch.from_numpy(self._stream.tokens[first:end])
        self._tokens[first:end] = tokens
        self._shares[first:end] = rare_shares(tokens, self._tokenizer, self._rare)
        self._weights[first:end] = face_weights(
            self._stream.faces[first:end], self._latents.shape[-1]
        )


def start_networks(options: argparse.Namespace) -> Run:
    """UNet and text encoder on the device, with optimizer and average."""
    unet, encoder = load_networks(options.start, 0, options.size // 8)
    unet.register_to_config(sample_size=options.size // 8)
    unet, encoder = unet.to(options.device).train(), encoder.to(options.device).train()
    parameters = [*unet.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=1e-2, fused=True
    )
    return Run(
        folder=options.run, modules={"unet": unet, "text_encoder": encoder}, optimizer=optimizer,
        average=Average(parameters, options.decay),
        generator=torch.Generator(options.device).manual_seed(options.seed),
    )  # fmt: skip


def unet_loss(
    run: Run, unet: Callable[..., Any], batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    products: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """`diffusion_loss` of latents, token ids and weights, as `Dataset.draw` gives them."""
    latents, ids, weights = batch
    with mixed_precision(latents.device.type):
        context = run.modules["text_encoder"](ids).last_hidden_state
    return diffusion_loss(unet, context, latents, weights, products, run.generator)


def compile_unet(run: Run, options: argparse.Namespace) -> Callable[..., Any]:
    """The UNet compiled for one batch size and tried both ways; plain if that fails."""
    unet: Any = run.modules["unet"]
    if options.eager:
        return unet  # type: ignore[no-any-return]
    started_s, side = time.monotonic(), options.size // 8
    compiled = torch.compile(unet, dynamic=False)
    try:
        # Through the very function that trains: a context of another dtype compiles it again.
        latents = torch.randn(options.batch, 4, side, side, device=options.device)
        ids = torch.zeros(options.batch, 77, dtype=torch.long, device=options.device)
        batch = (latents, ids, torch.ones_like(latents[:, :1]))
        unet_loss(run, compiled, batch, noise_schedule().to(options.device)).backward()
        run.optimizer.zero_grad(set_to_none=True)
    except Exception as error:  # whatever the compiler raises, training must go on
        print(f"not compiled: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return unet  # type: ignore[no-any-return]
    _report({"compiled_s": time.monotonic() - started_s})
    return compiled


def train_unet(
    run: Run, unet: Callable[..., Any], growing: GrowingData, seconds: float,
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """Optimize UNet and text encoder for ``seconds``."""
    products = noise_schedule().to(options.device)
    clock = Clock(
        seconds=seconds, learning_rate=options.learning_rate, cooldown=options.cooldown, warmup=200
    )
    torch.backends.cudnn.benchmark = True
    total, noted_s = torch.zeros((), device=options.device), time.monotonic()
    while clock.share < 1:
        if run.step % 100 == 0 and clock.share < 0.8:
            growing.grow(0)
        batch = growing.data.draw(options.batch, run.generator, options.dropout)
        loss = unet_loss(run, unet, batch, products)
        run.advance(loss, clock.rate(run.step))
        total += loss.detach()
        if run.step % 200 == 0:
            rate = 200 * options.batch / (time.monotonic() - noted_s)
            _report({"step": run.step, "loss": float(total) / 200, "samples_per_s": rate,
                     "pictures": growing.count, "share": clock.share})  # fmt: skip
            total.zero_()
            noted_s = time.monotonic()
    _report({"steps": run.step, "samples": run.step * options.batch, "pictures": growing.count})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="of everything")
    parser.add_argument("--vae-minutes", type=float, default=1.5,
                        help="0 leaves --vae-start as it is")  # fmt: skip
    parser.add_argument("--size", type=int, default=NATIVE_PX, help="side of the pictures, px")
    parser.add_argument("--count", type=int, default=240000, help="pictures at most")
    parser.add_argument("--crops", type=float, default=0.4, help="share of tight face crops")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--seed", type=int, default=20_000_000, help="of the first picture")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--vae-batch", type=int, default=96)
    parser.add_argument("--vae-pictures", type=int, default=40000)
    parser.add_argument("--vae-start", type=Path, help="a VAE folder to start from")
    parser.add_argument("--kl", type=float, default=5e-4)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1.2e-3)
    parser.add_argument("--cooldown", type=float, default=0.45)
    parser.add_argument("--rare", type=float, default=1.0, help="favour pictures of rare words")
    parser.add_argument("--dropout", type=float, default=0.1, help="share of empty captions")
    parser.add_argument("--decay", type=float, default=0.999)
    parser.add_argument("--eager", action="store_true", help="do not compile the UNet")
    parser.add_argument("--start", type=Path, default=WEIGHTS / "sd")
    parser.add_argument("--cache", type=Path, default=CACHE / "stream")
    parser.add_argument("--run", type=Path, default=RUNS / "gpu")
    parser.add_argument("--out", type=Path, default=RUNS / "gpu" / "sd")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Render, train, export."""
    options, started_s = _parser().parse_args(arguments), time.monotonic()
    if options.vae_minutes <= 0 and not options.vae_start:
        raise SystemExit("--vae-minutes is 0: name the VAE to use with --vae-start.")
    wanted = PictureSet(
        count=options.count, seed=options.seed, size=options.size, crops=options.crops
    )
    stream = PictureStream(options.cache, options.start, wanted, options.workers)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    run = start_networks(options)
    unet = compile_unet(run, options)
    while stream.ready < min(_FIRST_PICTURES, options.count):
        time.sleep(0.5)
    _report({"pictures": stream.ready, "seconds": time.monotonic() - started_s})
    vae = start_vae(options)
    if options.vae_minutes > 0:
        train_vae(vae, stream, options)
    growing = GrowingData(vae, stream, options)
    _report({"encoded": growing.count, "seconds": time.monotonic() - started_s,
             "spread": float(growing.data.latents[:2048].float().std())})  # fmt: skip
    left_s = 60 * options.minutes - (time.monotonic() - started_s)
    train_unet(run, unet, growing, left_s, options)
    growing.save(options.run / "first", 3000)
    stream.stop()
    vae.cpu()
    export_vae(vae, options.out / "vae")
    vae.save_pretrained(options.out / "vae32")
    export_networks(run, options.out)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(options.start / name, options.out / name, dirs_exist_ok=True)
    shutil.copy(options.start / "model_index.json", options.out)
    _report({"seconds": time.monotonic() - started_s})


if __name__ == "__main__":
    main()
