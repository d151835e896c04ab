"""Train VAE, text encoder and UNet in one sitting on a GPU, measured in minutes.

``python -m demo.train_gpu --minutes 9 --workers 15``

Workers render pictures while the GPU trains. A process of its own trains the VAE, on crops, then
on whole pictures, whitens its latents, and goes on encoding what is drawn; meanwhile the UNet's
step is compiled and captured as a CUDA graph. Then text encoder and UNet train on all latents that
are there, more of them every few seconds. Rates fall to zero with the clock, so the run always ends
cooled down. Writes a diffusers pipeline (fp16) into ``--out`` and the VAE in float32 into
``--run``/vae32, from which `demo.train_vae` and `demo.train_unet` go on. Captions are tokenized
with the tokenizer of ``--start``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config as inductor
from diffusers import AutoencoderKL
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from demo.graphed import Step
from demo.picture_stream import PictureFolder, PictureStream
from demo.pictures import NATIVE_PX, PictureSet
from demo.tokenizer import load_tokenizer
from demo.train_unet import (
    Dataset,
    diffusion_loss,
    draw_noise,
    export_networks,
    face_weights,
    load_networks,
    noise_schedule,
    rare_shares,
)
from demo.train_vae import build_vae, export_vae, vae_loss, whiten
from demo.training import CACHE, RUNS, WEIGHTS, Average, Run, mixed_precision

_FIRST_PICTURES = 2048
_FIRST_ENCODED = 8192
_ENCODE_BATCH = 256
#: Half side of the square around an eye, the nose or a mouth's corner, in shares of the face.
_FEATURE_REACH = 0.16


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

    def end_in(self, seconds: float) -> None:
        """Let the phase end ``seconds`` from now."""
        self.seconds = time.monotonic() - self._since_s + seconds

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


def crop_batch(
    images: torch.Tensor, centres: torch.Tensor, count: int, side: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random square crops of pictures on their own device, half of them near a face.

    Args:
        images: (N, S, S, 3) uint8.
        centres: (N, 2) float32, x and y of a face in pixels, NaN where there is none.
        count: crops.
        side: of a crop, at most S.

    Returns:
        (count, 3, side, side) float32 in [-1, 1]; (count,) their pictures; (count, 2) x and y of
        their upper left corners.
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
    return crops.permute(0, 3, 1, 2).float() / 127.5 - 1, rows, corners


def crop_weights(
    faces: torch.Tensor, rows: torch.Tensor, corners: torch.Tensor, side: int
) -> torch.Tensor:
    """How much a crop's pixels count: faces more than the rest, eyes and mouths most.

    The features of a face of 48 px count 8 times, of smaller ones up to twice as much: few pixels
    hold the colour of their eyes.

    Args:
        faces: (N, F, 14) float32 boxes and landmarks of the pictures in pixels, NaN for none.
        rows: (B,) the crops' pictures.
        corners: (B, 2) x and y of the crops' upper left corners.
        side: of the crops.

    Returns:
        (B, 1, side, side) float32.
    """
    found = faces[rows]
    width = found[..., 2] - found[..., 0]
    points = (found.unflatten(2, (7, 2)) - corners[:, None, None]).permute(0, 1, 3, 2)
    span = torch.arange(side, device=faces.device) + 0.5
    low, high = points[..., :1], points[..., 1:2]
    inside = (span >= low) & (span < high)  # (B, F, 2, side): columns, then lines
    in_face = (inside[:, :, 1, :, None] & inside[:, :, 0, None, :]).any(1)
    near = (span - points[..., 2:, None]).abs() < _FEATURE_REACH * width[..., None, None, None]
    features = (near[:, :, 1, :, :, None] & near[:, :, 0, :, None, :]).any(2)
    importance = 7 * (48 / width.nan_to_num(48.0).clamp(min=1.0)).clamp(0.5, 2.0)
    boost = (features * importance[..., None, None]).amax(1)
    return (1 + torch.maximum(2.0 * in_face, boost))[:, None]


def _report(values: dict[str, float]) -> None:
    print(json.dumps({name: round(value, 4) for name, value in values.items()}), flush=True)


class CropPool:
    """Pictures on the GPU, more of them whenever asked, and random crops of them."""

    def __init__(self, pictures: PictureFolder, options: argparse.Namespace) -> None:
        self._pictures, self._most = pictures, min(options.vae_pictures, pictures.count)
        self._images = torch.empty(
            (self._most, *pictures.images.shape[1:]), dtype=torch.uint8, device=options.device
        )
        self._faces = torch.empty((self._most, *pictures.faces.shape[1:]), device=options.device)
        self.count = 0

    def grow(self) -> None:
        """Take in the pictures drawn since."""
        first, end = self.count, min(self._most, self._pictures.ready)
        self._images[first:end] = torch.from_numpy(self._pictures.images[first:end])
        self._faces[first:end] = torch.from_numpy(self._pictures.faces[first:end])
        self.count = end

    def draw(self, count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops (count, 3, side, side) float32 in [-1, 1], and their `crop_weights`."""
        images, faces = self._images[: self.count], self._faces[: self.count]
        wide = faces[:, 0, 2] - faces[:, 0, 0] > images.shape[1] / 8
        centres = torch.where(wide[:, None], (faces[:, 0, :2] + faces[:, 0, 2:4]) / 2, torch.nan)
        crops, rows, corners = crop_batch(images, centres, count, side)
        weights = crop_weights(faces, rows, corners, side)
        return crops.to(memory_format=torch.channels_last), weights


def train_vae(vae: Any, pool: CropPool, options: argparse.Namespace) -> None:
    """Optimize the VAE for ``--vae-minutes``, then put its averaged, whitened weights in place."""
    on_gpu = options.device != "cpu"
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-3, fused=True,
        capturable=on_gpu,
    )  # fmt: skip
    vae.train()
    run = Run(
        folder=options.run, modules={"vae": vae}, optimizer=optimizer,
        average=Average(vae.parameters(), 0.998), generator=torch.Generator(),
    )  # fmt: skip
    clock = Clock(seconds=60 * options.vae_minutes, learning_rate=1.0e-3, cooldown=0.6)
    crops, wholes = (
        Step(run, lambda pixels, weights: vae_loss(vae, pixels, options.kl, weights), graph=on_gpu)
        for _ in range(2)
    )
    while clock.share < 1:
        whole = clock.share > 0.6
        side, count = (options.size, max(1, options.vae_batch // 4)) if whole else (
            options.size // 2, options.vae_batch)  # fmt: skip
        step = wholes if whole else crops
        loss, psnr, kl = step(clock.rate(run.step), *pool.draw(count, side))
        if run.step % 200 == 0:
            pool.grow()
            _report({"vae_step": run.step, "loss": float(loss), "psnr": float(psnr),
                     "kl": float(kl), "share": clock.share})  # fmt: skip
    _report({"vae_steps": run.step, "pictures": pool.count})
    run.average.swap()


def start_vae(options: argparse.Namespace) -> Any:
    """The VAE on the device: ``--vae-start``'s, or untrained."""
    vae = build_vae()
    if options.vae_start:
        vae = AutoencoderKL.from_pretrained(options.vae_start, torch_dtype=torch.float32)
    vae = vae.to(options.device, memory_format=torch.channels_last)
    vae.register_to_config(sample_size=options.size)
    return vae


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentFiles:
    """Growing arrays of encoded pictures, memory-mapped: one process writes, another reads.

    Attributes:
        latents: (N, 4, h, w) float16.
        weights: (N, 1, h, w) float16, of `face_weights`.
        shares: (N,) float32, of `rare_shares`.
        done: (1,) int64, rows that are there.
    """

    latents: NDArray[np.float16]
    weights: NDArray[np.float16]
    shares: NDArray[np.float32]
    done: NDArray[np.int64]

    @staticmethod
    def prepare(folder: Path, count: int, side: int) -> LatentFiles:
        """Lay the arrays out anew."""
        layout: dict[str, tuple[Any, tuple[int, ...]]] = {
            "latents": (np.float16, (count, 4, side, side)),
            "weights": (np.float16, (count, 1, side, side)),
            "shares": (np.float32, (count,)),
            "done": (np.int64, (1,)),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, (dtype, shape) in layout.items():
            open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)  # type: ignore[no-untyped-call]
        return LatentFiles.open(folder)

    @staticmethod
    def open(folder: Path) -> LatentFiles:
        """The arrays as another process has laid them out."""
        arrays: dict[str, Any] = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r+")
            for name in LatentFiles.__dataclass_fields__
        }
        return LatentFiles(**arrays)


@torch.no_grad()
def encode_forever(vae: Any, pictures: PictureFolder, options: argparse.Namespace) -> None:
    """Encode pictures as they are drawn, until all are or the process is ended."""
    tokenizer, files = load_tokenizer(options.start), LatentFiles.open(options.run / "latents")
    first = 0
    while first < pictures.count:
        end = min(first + _ENCODE_BATCH, pictures.count)
        if end > pictures.ready:
            time.sleep(0.1)
            continue
        pixels = torch.from_numpy(pictures.images[first:end]).to(options.device)
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        with mixed_precision(pixels.device.type):
            mean = vae.encode(pixels.to(memory_format=torch.channels_last)).latent_dist.mean
        files.latents[first:end] = (mean.float() * vae.config.scaling_factor).half().cpu().numpy()
        tokens = torch.from_numpy(pictures.tokens[first:end])
        files.shares[first:end] = rare_shares(tokens, tokenizer, options.rare).numpy()
        faces = pictures.faces[first:end]
        files.weights[first:end] = face_weights(faces, files.latents.shape[-1]).numpy()
        files.done[0] = first = end


def serve_vae(options: argparse.Namespace) -> None:
    """A process of its own: train the VAE while the UNet is compiled, then encode pictures."""
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    pictures = PictureFolder(options.cache)
    while pictures.ready < min(_FIRST_PICTURES, pictures.count):
        time.sleep(0.2)
    vae = start_vae(options)
    if options.vae_minutes > 0:
        pool = CropPool(pictures, options)
        pool.grow()
        train_vae(vae, pool, options)
        vae.eval()
        whiten(vae, pictures.images[: pool.count][:512])
    vae.eval().save_pretrained(options.run / "vae32")
    encode_forever(vae, pictures, options)


class GrowingData:
    """Latents, tokens and face weights of the pictures encoded so far, on the GPU.

    Attributes:
        count: pictures that can be drawn from.
    """

    def __init__(
        self, files: LatentFiles, pictures: PictureFolder, options: argparse.Namespace
    ) -> None:
        self._files, self._tokens_drawn = files, pictures.tokens
        device = options.device
        self._latents = torch.empty(files.latents.shape, dtype=torch.float16, device=device)
        self._tokens = torch.empty(pictures.tokens.shape, dtype=torch.int16, device=device)
        self._weights = torch.empty(files.weights.shape, dtype=torch.float16, device=device)
        self._shares = torch.empty(files.shares.shape, device=device) if options.rare else None
        self.count = 0

    @property
    def data(self) -> Dataset:
        """The pictures taken in so far."""
        return Dataset(
            latents=self._latents[: self.count],
            tokens=self._tokens[: self.count],
            weights=self._weights[: self.count],
            shares=None if self._shares is None else self._shares[: self.count],
        )

    def grow(self) -> int:
        """Take in what was encoded since; returns `count`."""
        first, end = self.count, int(self._files.done[0])
        if end > first:
            self._latents[first:end] = torch.from_numpy(self._files.latents[first:end])
            self._weights[first:end] = torch.from_numpy(self._files.weights[first:end])
            self._tokens[first:end] = torch.from_numpy(self._tokens_drawn[first:end])
            if self._shares is not None:
                self._shares[first:end] = torch.from_numpy(self._files.shares[first:end])
            self.count = end
        return self.count


def start_networks(options: argparse.Namespace) -> Run:
    """UNet and text encoder on the device, with optimizer and average."""
    unet, encoder = load_networks(options.start, 0, options.size // 8, options.text_encoder)
    unet.register_to_config(sample_size=options.size // 8)
    unet = unet.to(options.device, memory_format=torch.channels_last).train()
    encoder = encoder.to(options.device).train()
    # The eager one builds its mask from a constant on the CPU, which no graph can capture.
    encoder.set_attn_implementation("sdpa")
    parameters = [*unet.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=1e-2, fused=True,
        capturable=options.device != "cpu",
    )  # fmt: skip
    return Run(
        folder=options.run, modules={"unet": unet, "text_encoder": encoder}, optimizer=optimizer,
        average=Average(parameters, options.decay),
        generator=torch.Generator(options.device).manual_seed(options.seed),
    )  # fmt: skip


def unet_step(run: Run, options: argparse.Namespace) -> Step:
    """The step that trains UNet and text encoder: compiled and captured on a GPU.

    Its inputs are latents, token ids and weights, as `Dataset.draw` gives them, and the noise and
    timesteps of `draw_noise`.
    """
    unet: Any = run.modules["unet"]
    encoder: Any = run.modules["text_encoder"]
    products = noise_schedule().to(options.device)

    def losses_of(network: Callable[..., Any], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        latents, ids, weights, noise, steps = inputs
        with mixed_precision(latents.device.type):
            context = encoder(ids).last_hidden_state
        return (diffusion_loss(network, context, latents, weights, products, noise, steps),)

    plain = Step(run, partial(losses_of, unet), graph=not options.eager)
    if options.eager:
        return plain
    torch.backends.cudnn.benchmark = True
    # The heuristics leave a UNet's convolutions in an order that tensor cores must shuffle.
    inductor.force_layout_optimization = True
    started_s, side = time.monotonic(), options.size // 8
    latents = torch.randn(options.batch, 4, side, side, device=options.device)
    ids = torch.zeros(options.batch, 77, dtype=torch.long, device=options.device)
    noise, steps = draw_noise(latents, len(products), run.generator)
    inputs = (latents, ids, torch.ones_like(latents[:, :1]), noise, steps)
    step = Step(run, partial(losses_of, torch.compile(unet, dynamic=False)), graph=True)
    try:
        step.prepare(*inputs)
    except Exception as error:  # whatever the compiler raises, training must go on
        print(f"not compiled: {type(error).__name__}: {str(error)[:300]}", flush=True)
        run.optimizer.zero_grad(set_to_none=True)
        step = plain
    _report({"compiled_s": time.monotonic() - started_s, "captured": step.captured})
    return step


class Deadline:
    """When the training has to end: a moment, or what a file says as long as it runs.

    Args:
        seconds: from now on, where there is no file.
        file: holds the moment, in seconds since the epoch; looked at again every few seconds.
    """

    def __init__(self, seconds: float, file: Path | None) -> None:
        self._end_s, self._file = time.time() + seconds, file

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        if self._file is not None and self._file.exists():
            with suppress(ValueError):  # it may be half written
                self._end_s = float(self._file.read_text(encoding="utf-8"))
        return self._end_s - time.time()


def train_unet(
    run: Run, step: Step, growing: GrowingData, deadline: Deadline, options: argparse.Namespace
) -> None:
    """Optimize UNet and text encoder until the deadline, writing them now and then."""
    clock = Clock(
        seconds=deadline.left_s, learning_rate=options.learning_rate, cooldown=options.cooldown,
        warmup=500,
    )  # fmt: skip
    timesteps = len(noise_schedule())
    total, noted_s = torch.zeros((), device=options.device), time.monotonic()
    saved_s = noted_s
    while clock.share < 1:
        if run.step % 100 == 0:
            clock.end_in(deadline.left_s)
            growing.grow()
        latents, ids, weights = growing.data.draw(options.batch, run.generator, options.dropout)
        noise, steps = draw_noise(latents, timesteps, run.generator)
        total += step(clock.rate(run.step), latents, ids, weights, noise, steps)[0]
        if run.step % 400 == 0:
            rate = 400 * options.batch / (time.monotonic() - noted_s)
            _report({"step": run.step, "loss": float(total) / 400, "samples_per_s": rate,
                     "pictures": growing.count, "share": clock.share})  # fmt: skip
            total.zero_()
            noted_s = time.monotonic()
        if time.monotonic() - saved_s > 60 * options.save_minutes:
            export_networks(run, options.out)
            saved_s = time.monotonic()
    _report({"steps": run.step, "samples": run.step * options.batch, "pictures": growing.count})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="of everything but the writing")
    parser.add_argument("--until", type=Path, help="a file that says when to end instead, in "
                        "seconds since the epoch; it may change meanwhile")  # fmt: skip
    parser.add_argument("--save-minutes", type=float, default=2.0, help="between two writings")
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
    parser.add_argument("--learning-rate", type=float, default=1.0e-3)
    parser.add_argument("--cooldown", type=float, default=0.45)
    parser.add_argument("--rare", type=float, default=1.0, help="favour pictures of rare words")
    parser.add_argument("--dropout", type=float, default=0.1, help="share of empty captions")
    parser.add_argument("--decay", type=float, default=0.999)
    parser.add_argument(
        "--eager", action="store_true", help="neither compile nor capture the UNet's step"
    )
    parser.add_argument("--start", type=Path, default=WEIGHTS / "sd")
    parser.add_argument("--text-encoder", type=Path, help="demo.train_text's, to start from")
    parser.add_argument("--cache", type=Path, default=CACHE / "stream")
    parser.add_argument("--run", type=Path, default=RUNS / "gpu")
    parser.add_argument("--out", type=Path, default=RUNS / "gpu" / "sd")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Render, train, export."""
    options = _parser().parse_args(arguments)
    deadline = Deadline(60 * options.minutes, options.until)
    started_s = time.monotonic()
    if options.vae_minutes <= 0 and not options.vae_start:
        raise SystemExit("--vae-minutes is 0: name the VAE to use with --vae-start.")
    wanted = PictureSet(
        count=options.count, seed=options.seed, size=options.size, crops=options.crops
    )
    stream = PictureStream(options.cache, options.start, wanted, options.workers)
    files = LatentFiles.prepare(options.run / "latents", options.count, options.size // 8)
    painter = get_context("spawn").Process(target=serve_vae, args=(options,), daemon=True)
    painter.start()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    run = start_networks(options)
    step = unet_step(run, options)
    growing = GrowingData(files, stream, options)
    while growing.grow() < min(_FIRST_ENCODED, options.count):
        time.sleep(0.2)
        if painter.exitcode or stream.ready < 0:
            raise RuntimeError("The VAE's process has failed; its error is printed above.")
    _report({"encoded": growing.count, "seconds": time.monotonic() - started_s,
             "spread": float(growing.data.latents[:2048].float().std())})  # fmt: skip
    vae = AutoencoderKL.from_pretrained(options.run / "vae32")
    export_vae(vae, options.out / "vae")
    train_unet(run, step, growing, deadline, options)
    export_networks(run, options.out)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(options.start / name, options.out / name, dirs_exist_ok=True)
    shutil.copy(options.start / "model_index.json", options.out)
    painter.terminate()
    stream.stop()
    _report({"seconds": time.monotonic() - started_s})


if __name__ == "__main__":
    main()
