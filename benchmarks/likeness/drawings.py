"""The judge's training set: drawn people in two views each, and squares without a face."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing import Process
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from benchmarks.likeness.crops import CROP_FACTOR, cut_face
from benchmarks.likeness.damage import damage
from benchmarks.likeness.features import break_eye, remove_features, spoil_surroundings
from benchmarks.likeness.network import EYES_MATCH, FACE, HEADS
from benchmarks.likeness.subjects import (
    DRAWN_PX,
    TRAINING_SEED,
    draw_elsewhere,
    draw_face,
    marked_person,
    other_view,
    scene_around,
)
from benchmarks.likeness.wording import NO, YES, values_of
from demo.attributes import sample_scene
from demo.world import Picture

Pixels = npt.NDArray[np.uint8]
UNKNOWN = -1
_HEAD_NAMES = tuple(HEADS)
#: Below this many pixels a crop does not tell whether its eyes are a pair.
_EYES_FROM_PX = 56.0
#: Below this many a face is neither asked for nor ruled out.
_FACE_FROM_PX = 40.0
_BROKEN_SHARE = 0.25
_SURROUNDED_SHARE = 0.35
#: What spoiled surroundings hide.
_AROUND = ("style", "earrings", "streak")
_ARRAYS: dict[str, tuple[tuple[int, ...], type]] = {
    "images": ((DRAWN_PX, DRAWN_PX, 3), np.uint8),
    "boxes": ((4,), np.float32),
    "landmarks": ((5, 2), np.float32),
    "labels": ((len(HEADS),), np.int8),
}


def labels_of(values: dict[str, str], *, face: bool, pair: bool) -> npt.NDArray[np.int8]:
    """Return a head's index of each value, `UNKNOWN` where ``values`` has none."""
    values = {**values, FACE: YES if face else NO}
    if face:
        values[EYES_MATCH] = YES if pair else NO
    return np.array(
        [
            HEADS[name].index(values[name]) if name in values else UNKNOWN
            for name in _HEAD_NAMES
        ],
        np.int8,
    )  # fmt: skip


def draw_pair(seed: int) -> tuple[Picture, Picture, int, int, tuple[dict[str, str], ...]]:
    """Draw a marked person twice.

    Returns:
        Both pictures, the person's index among each scene's people, and what is to be seen.
    """
    person = marked_person(np.random.default_rng([seed, 4]))
    first, second = scene_around(person, seed), other_view(person, seed + 1)
    pictures = [draw_face(scene, index) for scene, index in (first, second)]
    seen = tuple(values_of(scene.people[index][0]) for scene, index in (first, second))
    return pictures[0], pictures[1], first[1], second[1], seen


def _draw_people(folder: Path, people: int, part: int, parts: int) -> None:
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in _ARRAYS}
    for number in range(part, people, parts):
        first, second, *indices, seen = draw_pair(TRAINING_SEED + 2 * number)
        for view, (picture, index) in enumerate(zip((first, second), indices, strict=True)):
            row = 2 * number + view
            face = next((face for face in picture.faces if face.person == index), None)
            arrays["images"][row] = picture.pixels
            arrays["boxes"][row] = face.box if face else np.nan
            arrays["landmarks"][row] = face.landmarks if face else np.nan
            pair = seen[view]["left eye"] == seen[view]["right eye"]
            arrays["labels"][row] = labels_of(seen[view], face=True, pair=pair)


def _draw_others(folder: Path, count: int) -> None:
    images = np.load(folder / "others.npy", mmap_mode="r+")
    random = np.random.default_rng([TRAINING_SEED, 5])
    done = 0
    while done < count:
        seed = TRAINING_SEED + 100_000_000 // 2 + int(random.integers(2**24))
        picture = draw_elsewhere(sample_scene(seed), random)
        if not picture.faces:
            images[done] = picture.pixels
            done += 1


def draw_training_set(folder: Path, *, people: int, others: int, workers: int) -> None:
    """Draw ``people`` in two views each, and ``others`` squares without a face, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (shape, dtype) in _ARRAYS.items():
        _create(folder / f"{name}.npy", dtype, (2 * people, *shape))
    _create(folder / "others.npy", np.uint8, (others, DRAWN_PX, DRAWN_PX, 3))
    parts = [
        Process(target=_draw_people, args=(folder, people, part, workers))
        for part in range(workers)
    ]
    parts.append(Process(target=_draw_others, args=(folder, others)))
    for process in parts:
        process.start()
    for process in parts:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a drawing process ended with code {process.exitcode}.")


def _create(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    open_memmap(path, mode="w+", dtype=dtype, shape=shape)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Crops to learn from.

    Attributes:
        crops: (2 P + O, 128, 128, 3) uint8: P people's first views, their second ones, others.
        labels: (2 P + O, heads) int8.
        people: P.
    """

    crops: Pixels
    labels: npt.NDArray[np.int8]
    people: int


class TrainingSet:
    """What `draw_training_set` drew, cut and damaged anew at every look.

    Args:
        folder: of the drawings.
    """

    def __init__(self, folder: Path) -> None:
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self.others = np.load(folder / "others.npy", mmap_mode="r")
        self.boxes, self.landmarks, self.labels = (
            np.load(folder / f"{name}.npy") for name in ("boxes", "landmarks", "labels")
        )
        # Faces whose middle another person's scene hides have no box.
        seen = ~np.isnan(self.boxes[:, 0]).reshape(-1, 2)
        self.people = np.flatnonzero(seen.all(1))

    def draw(
        self, people: int, others: int, random: np.random.Generator, severity: float = 1.0
    ) -> Batch:
        """Draw a batch.

        Args:
            people: how many, twice each.
            others: squares without a face, two thirds of them heads.
            random: decides everything.
            severity: share of the crops that may be damaged, 0 to 1.
        """
        chosen = random.choice(self.people, people, replace=False)
        rows = [*(2 * chosen), *(2 * chosen + 1)]
        crops, labels = zip(*(self._face(int(row), random, severity) for row in rows), strict=True)
        none = labels_of({}, face=False, pair=False)
        heads = others * 2 // 3
        blanks = [self._head(random) for _ in range(heads)]
        blanks += [self._other(random) for _ in range(others - heads)]
        return Batch(
            crops=np.stack([*crops, *blanks]),
            labels=np.stack([*labels, *[none] * others]),
            people=people,
        )

    def _face(
        self, row: int, random: np.random.Generator, severity: float
    ) -> tuple[Pixels, npt.NDArray[np.int8]]:
        image, labels = self.images[row], self.labels[row].copy()
        if random.random() < _BROKEN_SHARE:
            side = int(random.integers(2))
            image = break_eye(image, self.landmarks[row].astype(np.float64), side, random)
            labels[_HEAD_NAMES.index(EYES_MATCH)] = 0
            labels[_HEAD_NAMES.index(("left eye", "right eye")[side])] = UNKNOWN
        if random.random() < _SURROUNDED_SHARE:
            image = spoil_surroundings(
                np.asarray(image), self.landmarks[row].astype(np.float64), random
            )
            labels[[_HEAD_NAMES.index(name) for name in _AROUND]] = UNKNOWN
        crop = self._cut(row, np.asarray(image), random)
        if random.random() >= severity:
            return crop, labels
        damaged = damage(crop, random)
        if damaged.resolution_px < _EYES_FROM_PX:
            labels[_HEAD_NAMES.index(EYES_MATCH)] = UNKNOWN
        if damaged.resolution_px < _FACE_FROM_PX:
            labels[_HEAD_NAMES.index(FACE)] = UNKNOWN
        return damaged.pixels, labels

    def _cut(self, row: int, image: Pixels, random: np.random.Generator) -> Pixels:
        """Cut the face out as a detector's boxes are: a little off, a little small or large."""
        x0, y0, x1, y1 = (float(value) for value in self.boxes[row])
        shift = (random.random(2) * 2 - 1) * 0.04
        factor = CROP_FACTOR * (0.88 + 0.28 * random.random())
        return cut_face(
            image, (x0, y0, x1, y1), factor=factor, shift=(float(shift[0]), float(shift[1]))
        )

    def _head(self, random: np.random.Generator) -> Pixels:
        """A head without a face."""
        row = int(random.integers(len(self.images)))
        landmarks = self.landmarks[row].astype(np.float64)
        image = remove_features(np.asarray(self.images[row]), landmarks, random)
        if random.random() < _SURROUNDED_SHARE:
            image = spoil_surroundings(image, landmarks, random)
        crop = self._cut(row, image, random)
        return damage(crop, random).pixels if random.random() < 0.5 else crop

    def _other(self, random: np.random.Generator) -> Pixels:
        """A square of a scene, one colour, or noise."""
        draw = random.random()
        if draw < 0.75:
            image = np.asarray(self.others[int(random.integers(len(self.others)))])
            crop = cut_face(image, (0, 0, DRAWN_PX, DRAWN_PX), factor=1.0)
        else:
            colour = random.integers(0, 256, 3)
            spread = 0.0 if draw < 0.9 else 60 * random.random()
            values = colour + random.standard_normal((128, 128, 3)) * spread
            crop = np.clip(values, 0, 255).astype(np.uint8)
        return damage(crop, random).pixels
