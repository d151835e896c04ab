"""Render training pictures into a cache folder.

``python -m demo.pictures --out demo/cache/train --count 24000 --workers 2``

The folder holds images.npy (N, S, S, 3) uint8; faces.npy (N, 3, 14) float32, a row being a box
and five landmarks in pixels, NaN where there is no face; captions.jsonl, one list of wordings a
picture. Picture ``i`` depends on the seed and ``i`` alone.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from multiprocessing import Process
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from demo.attributes import Framing, Scene, sample_scene
from demo.canvas import View
from demo.captions import CLOSE_UP, describe_scene
from demo.training import CACHE
from demo.world import Picture, draw_scene, face_view

WORDINGS = 4
MAX_FACES = 3
NATIVE_PX = 192
"""Side of the pictures that the demo model paints."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureSet:
    """What a cache folder holds.

    Attributes:
        count: pictures.
        seed: of the first; sets with seeds ``count`` apart share no picture.
        size: side in pixels.
        crops: share of tight face crops out of wider scenes.
    """

    count: int
    seed: int = 0
    size: int = NATIVE_PX
    crops: float = 0.35


def draw_sample(seed: int, size: int, crops: float) -> tuple[Picture, list[str]]:
    """One training picture and its wordings, every other one thorough.

    Args:
        seed: decides everything.
        size: side in pixels.
        crops: share of tight crops, which carry the whole scene's caption plus `CLOSE_UP`.
    """
    random = np.random.default_rng([seed, 1])
    if random.random() >= crops:
        scene, view, suffix = sample_scene(seed), None, ""
    else:
        draw = random.random()
        framing = Framing.FULL if draw < 0.5 else Framing.HALF if draw < 0.75 else Framing.PORTRAIT
        scene = sample_scene(seed, framing=framing)
        view = _crop_view(scene, random)
        suffix = CLOSE_UP
    wordings = [
        describe_scene(scene, random, thorough=wording % 2 == 1) + suffix
        for wording in range(WORDINGS)
    ]
    return draw_scene(scene, view=view, size=size), wordings


def _crop_view(scene: Scene, random: np.random.Generator) -> View:
    """A view of 1.4 to 2.6 times a face, its face not quite in the middle."""
    index = int(random.integers(len(scene.people)))
    shift = random.random(2) * 0.16 - 0.08
    factor = 1.4 + 1.2 * random.random()
    return face_view(scene, index, factor, float(shift[0]), float(shift[1]))


def face_rows(picture: Picture) -> NDArray[np.float32]:
    """Boxes and landmarks of a picture, (MAX_FACES, 14) float32, NaN where there is no face."""
    rows = np.full((MAX_FACES, 14), np.nan, np.float32)
    for row, face in zip(rows, picture.faces, strict=False):
        row[:4], row[4:] = face.box, face.landmarks.ravel()
    return rows


def _render_part(folder: Path, wanted: PictureSet, part: int, parts: int) -> None:
    images = np.load(folder / "images.npy", mmap_mode="r+")
    faces = np.load(folder / "faces.npy", mmap_mode="r+")
    with (folder / f"captions.{part}.jsonl").open("w", encoding="utf-8") as lines:
        for index in range(part, wanted.count, parts):
            picture, words = draw_sample(wanted.seed + index, wanted.size, wanted.crops)
            images[index], faces[index] = picture.pixels, face_rows(picture)
            lines.write(json.dumps([index, words]) + "\n")


def _create(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    open_memmap(path, mode="w+", dtype=dtype, shape=shape)  # type: ignore[no-untyped-call]


def render_pictures(folder: Path, wanted: PictureSet, workers: int) -> None:
    """Render a set with ``workers`` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    count, size = wanted.count, wanted.size
    _create(folder / "images.npy", np.uint8, (count, size, size, 3))
    _create(folder / "faces.npy", np.float32, (count, MAX_FACES, 14))
    parts = [
        Process(target=_render_part, args=(folder, wanted, part, workers))
        for part in range(workers)
    ]
    for process in parts:
        process.start()
    for process in parts:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"A rendering process ended with code {process.exitcode}.")
    _gather_captions(folder, wanted.count, workers)


def _gather_captions(folder: Path, count: int, parts: int) -> None:
    """One captions.jsonl in the order of the pictures, in place of one file a process."""
    rows: list[list[str]] = [[] for _ in range(count)]
    for part in range(parts):
        path = folder / f"captions.{part}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            index, words = json.loads(line)
            rows[index] = words
        path.unlink()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")


def load_captions(folder: Path) -> list[list[str]]:
    """The wordings of every picture of a folder, WORDINGS each."""
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def main(arguments: list[str] | None = None) -> None:
    """Render and time a set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CACHE / "train")
    parser.add_argument("--count", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=NATIVE_PX)
    parser.add_argument("--crops", type=float, default=0.35)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    started_s = time.monotonic()
    wanted = PictureSet(
        count=options.count, seed=options.seed, size=options.size, crops=options.crops
    )
    render_pictures(options.out, wanted, options.workers)
    rate = options.count / (time.monotonic() - started_s)
    print(f"{options.count} pictures in {options.out}, {rate:.0f} a second")


if __name__ == "__main__":
    main()
