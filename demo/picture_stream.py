"""Pictures rendered by worker processes while a GPU trains on those that are ready."""

from __future__ import annotations

import os
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from demo.latents import encode_captions
from demo.pictures import MAX_FACES, WORDINGS, PictureSet, draw_sample, face_rows
from demo.tokenizer import load_tokenizer

_NICENESS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class _Files:
    """The growing arrays of a stream, memory-mapped."""

    images: NDArray[np.uint8]
    faces: NDArray[np.float32]
    tokens: NDArray[np.int16]
    done: NDArray[np.int64]

    @staticmethod
    def layout(wanted: PictureSet, workers: int) -> dict[str, tuple[type, tuple[int, ...]]]:
        count, size = wanted.count, wanted.size
        return {
            "images": (np.uint8, (count, size, size, 3)),
            "faces": (np.float32, (count, MAX_FACES, 14)),
            "tokens": (np.int16, (count, WORDINGS, 77)),
            "done": (np.int64, (workers,)),
        }

    @staticmethod
    def open(folder: Path) -> _Files:
        names = ("images", "faces", "tokens", "done")
        arrays: dict[str, Any] = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in names
        }
        return _Files(**arrays)

    @staticmethod
    def prepare(folder: Path, wanted: PictureSet, workers: int) -> None:
        """Lay the arrays out; those of the same set and number of workers are gone on with."""
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / "set.txt"
        if mark.exists() and mark.read_text(encoding="utf-8") == f"{wanted} {workers}":
            return
        mark.unlink(missing_ok=True)
        for name, (dtype, shape) in _Files.layout(wanted, workers).items():
            open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)  # type: ignore[no-untyped-call]
        mark.write_text(f"{wanted} {workers}", encoding="utf-8")


def _render(folder: Path, weights: Path, wanted: PictureSet, part: int, parts: int) -> None:
    """One worker: every ``parts``-th picture from ``part`` on, in order."""
    os.nice(_NICENESS)
    files, tokenizer = _Files.open(folder), load_tokenizer(weights)
    for index in range(part + int(files.done[part]) * parts, wanted.count, parts):
        picture, words = draw_sample(wanted.seed + index, wanted.size, wanted.crops)
        files.images[index] = picture.pixels
        files.faces[index] = face_rows(picture)
        files.tokens[index] = encode_captions(tokenizer, [words])[0]
        files.done[part] += 1


class PictureFolder:
    """A picture set that some process renders; picture ``i`` depends on the seed and ``i`` alone.

    Attributes:
        count: pictures when all is rendered.
        images: (N, S, S, 3) uint8 RGB; rows from `ready` on are not drawn yet.
        faces: (N, 3, 14) float32, boxes and landmarks in pixels, NaN where there is no face.
        tokens: (N, WORDINGS, 77) int16.
    """

    def __init__(self, folder: Path) -> None:
        self._files = _Files.open(folder)
        self.images, self.faces = self._files.images, self._files.faces
        self.tokens = self._files.tokens
        self.count = len(self.images)

    @property
    def ready(self) -> int:
        """Pictures that are drawn, counted from the first without a gap."""
        parts = len(self._files.done)
        # A worker has drawn its first n pictures; the next gap is at part + n * parts.
        gaps = [part + int(done) * parts for part, done in enumerate(self._files.done)]
        return min(self.count, *gaps)


class PictureStream(PictureFolder):
    """A picture set that this process' workers render.

    Start it before the process touches CUDA: the workers are forked. A folder that holds a part of
    the same set is gone on with.
    """

    def __init__(self, folder: Path, weights: Path, wanted: PictureSet, workers: int) -> None:
        _Files.prepare(folder, wanted, workers)
        super().__init__(folder)
        fork = get_context("fork")
        self._workers = [
            fork.Process(target=_render, args=(folder, weights, wanted, part, workers), daemon=True)
            for part in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    @property
    def ready(self) -> int:
        """Pictures that are drawn, counted from the first without a gap.

        Raises:
            RuntimeError: a worker has failed.
        """
        if any(worker.exitcode for worker in self._workers):
            raise RuntimeError("A rendering process has failed; its error is printed above.")
        return super().ready

    def stop(self) -> None:
        """End the workers; what is drawn stays."""
        for worker in self._workers:
            worker.terminate()
            worker.join()
