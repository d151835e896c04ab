"""Train the demo's face detector on drawn pictures, as drawn and as the generator would blur them.

``python -m demo.train_detector``

Of its pictures a third each are drawn, drawn and passed through VAE or UNet (``--redrawn``), and
painted by the generator (``--painted``): the last two are what it sees in service. Folders that do
not exist are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from demo.training import (
    CACHE,
    WEIGHTS,
    Run,
    Schedule,
    add_run_arguments,
    open_run,
    parse_run_options,
    size_of,
    steps_to_take,
)
from export.detector import STRIDES, FaceDetector, load_face_detector, save_face_detector

_LEVELS = ((0.0, 40.0), (28.0, 100.0), (76.0, 1e4))
"""Face sizes in pixels that each stride answers for; they overlap."""
_SMALLEST_PX, _LARGEST_PX = 7.0, 150.0


class Samples:
    """Augmented pictures with their faces, cut out of random sets.

    Attributes:
        side: of a training picture in pixels, a multiple of 32.
    """

    def __init__(self, folders: list[Path], side: int, seed: int) -> None:
        self.sets = [
            (np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "faces.npy"))
            for folder in folders
        ]
        self.side = side
        self.random = np.random.default_rng(seed)

    def _draw_one(self) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        images, faces = self.sets[int(self.random.integers(len(self.sets)))]
        index = int(self.random.integers(len(images)))
        rows = faces[index]
        return images[index], rows[~np.isnan(rows[:, 0])]

    def _place(
        self, image: NDArray[np.uint8], rows: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Scale, shift, mirror: picture and rows (k, 14) on the training canvas."""
        zoom = float(np.exp(self.random.uniform(np.log(0.7), np.log(5.0))))
        if len(rows) and self.random.random() < 0.85:
            largest = float((rows[:, 2] - rows[:, 0]).max())
            zoom = min(zoom, _LARGEST_PX / max(1.0, largest))
        shift = self._shift(image, rows, zoom)
        matrix = np.array([[zoom, 0, shift[0]], [0, zoom, shift[1]]], np.float32)
        border = cv2.BORDER_CONSTANT if self.random.random() < 0.5 else cv2.BORDER_REPLICATE
        flags = cv2.INTER_CUBIC if self.random.random() < 0.6 else cv2.INTER_LINEAR
        size = (self.side, self.side)
        canvas = cv2.warpAffine(image, matrix, size, flags=flags, borderMode=border)
        points = rows.reshape(-1, 7, 2) * zoom + shift
        if self.random.random() < 0.5:
            canvas = np.ascontiguousarray(canvas[:, ::-1])
            points = _mirror(points, self.side)
        return canvas.astype(np.float32), points.reshape(-1, 14).astype(np.float32)

    def _shift(
        self, image: NDArray[np.uint8], rows: NDArray[np.float32], zoom: float
    ) -> NDArray[np.float64]:
        """Where the picture goes: half the time so that one of its faces is on the canvas.

        The other half shows feet, trees and windows, which pass for faces at small sizes.
        """
        if len(rows) and self.random.random() < 0.5:
            row = rows[int(self.random.integers(len(rows)))]
            wanted = self.random.uniform(0.1, 0.9, 2) * self.side
            return np.asarray(wanted - (row[:2] + row[2:4]) / 2 * zoom)
        slack = self.side - image.shape[1] * zoom
        low, high = min(0.0, slack) - 0.1 * self.side, max(0.0, slack) + 0.1 * self.side
        return self.random.uniform(low, high, 2)

    def _degrade(self, canvas: NDArray[np.float32]) -> NDArray[np.float32]:
        """Blur, coarse pixels, light and noise, as they fall."""
        random = self.random
        if random.random() < 0.4:
            canvas = cv2.GaussianBlur(canvas, (0, 0), random.uniform(0.3, 1.8))
        if random.random() < 0.2:
            small = self.side // int(random.integers(2, 4))
            canvas = cv2.resize(canvas, (small, small), interpolation=cv2.INTER_AREA)
            canvas = cv2.resize(canvas, (self.side, self.side))
        canvas = canvas * random.uniform(0.75, 1.2, 3) + random.uniform(-15, 15)
        noise = random.normal(0, random.uniform(0, 8), canvas.shape)
        return np.clip(canvas + noise, 0, 255).astype(np.float32)

    def draw(self, count: int) -> tuple[torch.Tensor, list[NDArray[np.float32]]]:
        """Pictures (count, 3, side, side) float32 BGR 0-255, and rows (k, 14) of each."""
        pictures = np.empty((count, self.side, self.side, 3), np.float32)
        rows = []
        for index in range(count):
            canvas, faces = self._place(*self._draw_one())
            pictures[index] = self._degrade(canvas)[..., ::-1]
            rows.append(_visible(faces, self.side))
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), rows


def _mirror(points: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Points (k, 7, 2), box corners then landmarks, seen in a mirror."""
    flipped = points.copy()
    flipped[..., 0] = side - points[..., 0]
    flipped[:, [0, 1], 0] = flipped[:, [1, 0], 0]
    flipped[:, 2:] = flipped[:, [3, 2, 4, 6, 5]]
    return flipped


def _visible(rows: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Rows whose face is at least 60 % on the canvas, the box cut at its edge."""
    kept = []
    for row in rows:
        cut = np.clip(row[:4], 0, side)
        area = (cut[2] - cut[0]) * (cut[3] - cut[1])
        whole = (row[2] - row[0]) * (row[3] - row[1])
        if area >= 0.6 * whole and row[2] - row[0] >= _SMALLEST_PX:
            kept.append(np.concatenate([cut, row[4:]]))
    return np.array(kept, np.float32).reshape(-1, 14)


def assign_cells(
    rows: NDArray[np.float32], side: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which cells of all levels answer for a face.

    Args:
        rows: (k, 14) faces of one picture in pixels.
        side: of the picture.

    Returns:
        Cell indices (p,) over the concatenated levels, and their targets (p, 15): dx, dy, log w,
        log h and ten landmark offsets in strides from the cell's corner, then the stride.
    """
    cells: dict[int, NDArray[np.float32]] = {}
    start = 0
    for stride, (low, high) in zip(STRIDES, _LEVELS, strict=True):
        count = side // stride
        for row in rows:
            size = float(np.sqrt((row[2] - row[0]) * (row[3] - row[1])))
            if low <= size < high:
                cells |= _cells_of_face(row, stride, count, start)
        start += count * count
    index = np.array(sorted(cells), np.int64)
    return index, np.array([cells[i] for i in index], np.float32).reshape(-1, 15)


def _cells_of_face(
    row: NDArray[np.float32], stride: int, count: int, start: int
) -> dict[int, NDArray[np.float32]]:
    """The cells within a quarter of the face from its centre; at least the nearest."""
    centre = (row[:2] + row[2:4]) / 2
    extent = np.maximum(row[2:4] - row[:2], 1.0)
    reach = np.maximum(0.22 * extent, 0.5 * stride + 1e-3)
    first = np.clip(np.ceil((centre - reach) / stride), 0, count - 1).astype(int)
    last = np.clip(np.floor((centre + reach) / stride), first, count - 1).astype(int)
    found = {}
    for y in range(first[1], last[1] + 1):
        for x in range(first[0], last[0] + 1):
            corner = np.array([x, y], np.float32)
            parts = [
                centre / stride - corner,
                np.log(extent / stride),
                (row[4:].reshape(5, 2) / stride - corner).ravel(),
                [stride],
            ]
            found[start + y * count + x] = np.concatenate(parts).astype(np.float32)
    return found


def detector_loss(
    outputs: tuple[torch.Tensor, ...], rows: list[NDArray[np.float32]], side: int
) -> dict[str, torch.Tensor]:
    """Objectness, quality, box and landmark losses of a batch, normalised by its positives."""
    levels = len(STRIDES)
    quality, objectness, boxes, points = (
        torch.cat(outputs[kind * levels : (kind + 1) * levels], 1) for kind in range(4)
    )
    wanted = torch.zeros_like(objectness)
    assigned = [assign_cells(faces, side) for faces in rows]
    picture = np.concatenate([np.full(len(index), i) for i, (index, _) in enumerate(assigned)])
    cell = np.concatenate([index for index, _ in assigned])
    target = torch.from_numpy(np.concatenate([rows for _, rows in assigned])).to(boxes.device)
    wanted[picture, cell] = 1.0
    count = max(1, len(cell))
    guess = objectness.clamp(1e-5, 1 - 1e-5)
    error = F.binary_cross_entropy(guess, wanted, reduction="none")
    losses = {"obj": (error * (guess.detach() - wanted).abs()).sum() * 4 / count}
    overlap = _overlap(boxes[picture, cell], target[:, :4])
    kind = quality[picture, cell, 0].clamp(1e-5, 1 - 1e-5)
    losses["cls"] = F.binary_cross_entropy(kind, overlap.detach().clamp(0, 1), reduction="sum")
    losses["cls"] = losses["cls"] / count
    scale = target[:, 2:4].exp().amin(1, keepdim=True).clamp(min=0.5)
    shift = (boxes[picture, cell] - target[:, :4]).abs()
    losses["box"] = (2 * (1 - overlap).sum() + shift.sum()) / count
    losses["kps"] = ((points[picture, cell] - target[:, 4:14]) / scale).abs().sum() / count
    return losses


def _overlap(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """IoU of boxes given as (dx, dy, log w, log h) in a shared frame, (p, 4) each."""
    half_a, half_b = first[:, 2:].clamp(max=6).exp() / 2, second[:, 2:].exp() / 2
    low = torch.maximum(first[:, :2] - half_a, second[:, :2] - half_b)
    high = torch.minimum(first[:, :2] + half_a, second[:, :2] + half_b)
    shared = (high - low).clamp(min=0).prod(1)
    whole = 4 * half_a.prod(1) + 4 * half_b.prod(1) - shared
    return shared / whole.clamp(min=1e-6)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, run="detector", steps=2500, batch=32)
    parser.add_argument("--pictures", type=Path, default=CACHE / "train")
    parser.add_argument("--redrawn", type=Path, default=CACHE / "redrawn")
    parser.add_argument("--painted", type=Path, nargs="*",
                        default=[CACHE / "painted", CACHE / "painted-park"])  # fmt: skip
    parser.add_argument("--start", type=Path, help="a detector's file to start from")
    parser.add_argument("--out", type=Path, default=WEIGHTS / "face_detector.safetensors")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--side", type=int, default=192)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Train and export."""
    options = parse_run_options(_parser(), arguments)
    cv2.setNumThreads(1)
    if options.start:
        model = load_face_detector(options.start)
    else:
        model = FaceDetector()
        model.start_objectness(0.018)
    model = model.to(options.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=1e-3, fused=True)
    run = open_run(options, modules={"detector": model}, optimizer=optimizer, decay=0.98)
    print(size_of(model), "from step", run.step, flush=True)
    train(run, options)
    save_face_detector(model.eval(), options.out)


def train(run: Run, options: argparse.Namespace) -> None:
    """Optimize until the last step or minute, with checkpoints."""
    folders = [options.pictures, options.redrawn, *options.painted]
    folders = [folder for folder in folders if (folder / "images.npy").exists()]
    samples = Samples(folders, options.side, options.seed + run.step)
    schedule = Schedule(
        learning_rate=options.learning_rate, steps=options.steps, cooldown=options.steps * 3 // 4
    )
    for step in steps_to_take(run, options):
        pictures, rows = samples.draw(options.batch)
        outputs = run.modules["detector"](pictures.to(options.device))
        losses = detector_loss(outputs, rows, options.side)
        total = torch.stack(list(losses.values())).sum()
        run.advance(total, schedule.at(step), max_norm=10.0)
        run.note({k: float(v.detach()) for k, v in losses.items()}, 100, options.batch)


if __name__ == "__main__":
    main()
