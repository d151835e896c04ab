"""Figures of the demo's small networks on held-out scenes: ``python -m demo.evaluate``.

Prints one JSON line each for the VAE, the detector and the upscaler.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from closeup.detection import (
    Face,
    decode_detections,
    detection_long_sides,
    detector_input,
    merge_detections,
)
from demo.attributes import Framing, sample_scene
from demo.latents import load_vae, round_trip
from demo.pictures import NATIVE_PX, face_rows
from demo.sample import HELD_OUT_SEED
from demo.training import WEIGHTS
from demo.world import draw_scene
from export.detector import OUTPUT_NAMES, FaceDetector, load_face_detector
from export.upscalers import load_upscaler

Floats = NDArray[np.float64]


def held_out_pictures(
    count: int, size: int = NATIVE_PX, framing: Framing | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Pictures (N, S, S, 3) that no training set holds, and their face rows (N, 3, 14)."""
    drawn = [
        draw_scene(sample_scene(HELD_OUT_SEED + i, framing=framing), size=size)
        for i in range(count)
    ]
    return np.stack([d.pixels for d in drawn]), np.stack([face_rows(d) for d in drawn])


def psnr(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error))


def ssim(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Structural similarity of grey values, Gaussian window of 1.5 px (Wang et al. 2004)."""
    a, b = (
        cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float64) for picture in (first, second)
    )

    def mean(values: Floats) -> Floats:
        return np.asarray(cv2.GaussianBlur(values, (11, 11), 1.5))

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    both = mean(a * b) - mean_a * mean_b
    low, high = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    shared = (2 * mean_a * mean_b + low) * (2 * both + high)
    return float((shared / ((mean_a**2 + mean_b**2 + low) * (var_a + var_b + high))).mean())


@torch.no_grad()
def find_faces(model: FaceDetector, pixels: NDArray[np.uint8], *, score: float = 0.6) -> list[Face]:
    """Faces of at least ``score`` in one picture, found as closeup finds them."""
    size = (pixels.shape[0], pixels.shape[1])
    looks = []
    for long_side in detection_long_sides(*size):
        tensor, scale = detector_input(pixels, long_side=long_side)
        outputs = [output.numpy() for output in model(torch.from_numpy(tensor))]
        named = dict(zip(OUTPUT_NAMES, outputs, strict=True))
        looks.append(decode_detections(named, scale=scale, size=size, score_threshold=score))
    return merge_detections(*looks)


def overlap(first: Floats, second: Floats) -> float:
    """IoU of two boxes."""
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:4], second[2:4])
    shared = float(np.clip(high - low, 0, None).prod())
    whole = float((first[2:4] - first[:2]).prod() + (second[2:4] - second[:2]).prod())
    return shared / (whole - shared)


def count_matches(
    model: FaceDetector, pictures: NDArray[np.uint8], faces: NDArray[np.float32]
) -> tuple[int, int, int]:
    """Faces found at IoU 0.5, faces there, detections made."""
    hits = there = made = 0
    for picture, rows in zip(pictures, faces, strict=True):
        found = [np.array(face.box) for face in find_faces(model, picture)]
        truth = rows[~np.isnan(rows[:, 0])].astype(np.float64)
        made += len(found)
        there += len(truth)
        hits += sum(any(overlap(box, row) >= 0.5 for box in found) for row in truth)
    return hits, there, made


def evaluate_detector(model: FaceDetector, vae: Any, count: int) -> dict[str, float]:
    """Recall and precision on renders, on long shots, and on both after the VAE."""
    figures: dict[str, float] = {}
    for name, framing in (("all", None), ("long_shots", Framing.FULL)):
        pictures, faces = held_out_pictures(count, framing=framing)
        for kind, shown in (("drawn", pictures), ("vae", round_trip(vae, pictures))):
            hits, there, made = count_matches(model, shown, faces)
            figures[f"{name}_{kind}_recall"] = round(hits / there, 4)
            figures[f"{name}_{kind}_precision"] = round(hits / max(1, made), 4)
    return figures


@torch.no_grad()
def evaluate_upscaler(path: Path, vae: Any, count: int) -> dict[str, float]:
    """PSNR and SSIM of x4 enlargements beside bicubic and Lanczos, of native-size pictures."""
    network = load_upscaler(path).network
    side = 4 * NATIVE_PX
    large, _ = held_out_pictures(count, size=side)
    small = np.stack(
        [cv2.resize(p, (NATIVE_PX, NATIVE_PX), interpolation=cv2.INTER_AREA) for p in large]
    )
    figures: dict[str, float] = {}
    for kind, shown in (("drawn", small), ("vae", round_trip(vae, small))):
        enlarged = {"network": [], "bicubic": [], "lanczos": []}  # type: dict[str, list[Any]]
        for picture in shown:
            pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
            out = (network(pixels).clamp(0, 1)[0] * 255).round().byte().permute(1, 2, 0).numpy()
            enlarged["network"].append(out)
            for name, method in (("bicubic", cv2.INTER_CUBIC), ("lanczos", cv2.INTER_LANCZOS4)):
                enlarged[name].append(cv2.resize(picture, (side, side), interpolation=method))
        for name, pictures in enlarged.items():
            figures[f"{kind}_{name}_psnr"] = round(psnr(np.stack(pictures), large), 2)
            scores = [ssim(a, b) for a, b in zip(pictures, large, strict=True)]
            figures[f"{kind}_{name}_ssim"] = round(float(np.mean(scores)), 4)
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    vae = load_vae(options.weights / "sd")
    pictures, _ = held_out_pictures(options.count)
    print(json.dumps({"vae_psnr": round(psnr(round_trip(vae, pictures), pictures), 2)}))
    path = options.weights / "face_detector.safetensors"
    if path.exists():
        print(json.dumps(evaluate_detector(load_face_detector(path), vae, options.count)))
    path = options.weights / "upscaler.safetensors"
    if path.exists():
        print(json.dumps(evaluate_upscaler(path, vae, max(1, options.count // 4))))


if __name__ == "__main__":
    main()
