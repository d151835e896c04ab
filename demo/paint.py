"""Paint long shots with the generator, so that the detector learns what is no face in them.

``python -m demo.paint --count 800 --out demo/cache/painted --sheet out/false_alarms.png``

A caption tells how many people a picture shows. As many of the present detector's findings, the
best ones, are taken for their faces; whatever else it found (feet, bushes) becomes background. A
picture with too few findings, or with a "face" where a standing person has no head, is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import EulerAncestralDiscreteScheduler
from numpy.typing import NDArray

from closeup.detection import Face
from demo.attributes import Framing, sample_scene
from demo.captions import PLACE_WORDS, describe_scene
from demo.evaluate import find_faces
from demo.pictures import MAX_FACES
from demo.sample import lay_out, load_pipeline, sample_pictures
from demo.training import CACHE, WEIGHTS
from export.detector import load_face_detector

SEED = 600_000_000
#: Findings of at least this score are faces, or false alarms if there are more than people.
_SCORE = 0.6
#: Standing figures have their heads above this share of the height (`demo.attributes`).
_LOWEST_HEAD = 0.45
_BATCH = 8
_CELL_PX = 96
_Painted = list[tuple[NDArray[np.uint8], int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """What the detector's findings in a picture are.

    Attributes:
        faces: as many as there are people.
        alarms: false ones.
    """

    faces: tuple[Face, ...]
    alarms: tuple[Face, ...]


def label_faces(found: Sequence[Face], people: int, height: int) -> Labels | None:
    """Tell faces from false alarms by the number of people.

    Args:
        found: by the detector, of score `_SCORE` and above, in any order.
        people: that the caption names.
        height: of the picture, px.

    Returns:
        None where the picture does not tell: too few findings, or the best are too low.
    """
    best = sorted(found, key=lambda face: -face.score)
    faces = best[:people]
    if len(faces) < people or any(f.center[1] > _LOWEST_HEAD * height for f in faces):
        return None
    return Labels(faces=tuple(faces), alarms=tuple(best[people:]))


def _rows(faces: Sequence[Face]) -> NDArray[np.float32]:
    """Boxes and landmarks (MAX_FACES, 14) float32, NaN where there is no face."""
    rows = np.full((MAX_FACES, 14), np.nan, np.float32)
    rows[: len(faces)] = [[*face.box, *np.ravel(face.landmarks)] for face in faces]
    return rows


def _cut_out(picture: NDArray[np.uint8], face: Face) -> NDArray[np.uint8]:
    """A square around a finding, twice its size, for the eye."""
    side = (2 * _CELL_PX, 2 * _CELL_PX)
    patch = cv2.getRectSubPix(picture, (int(2 * face.side) + 1,) * 2, face.center)
    return np.asarray(cv2.resize(patch, side, interpolation=cv2.INTER_CUBIC), np.uint8)


def _paint_scenes(pipeline: Any, seeds: range, place: str | None, defaults: Any) -> _Painted:
    """Long shots of the scenes of ``seeds``, which also seed the noise, and their people."""
    scenes = [sample_scene(seed, framing=Framing.FULL) for seed in seeds]
    if place:
        scenes = [replace(scene, place=place) for scene in scenes]
    captions = [
        describe_scene(scene, np.random.default_rng(seed))
        for scene, seed in zip(scenes, seeds, strict=True)
    ]
    pictures = sample_pictures(
        pipeline, captions, steps=defaults["steps"], guidance=defaults["cfg_scale"], seed=seeds[0]
    )
    return list(zip(pictures, (len(scene.people) for scene in scenes), strict=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CACHE / "painted")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--count", type=int, default=800, help="pictures to paint")
    parser.add_argument("--seed", type=int, default=SEED, help="of the first scene and noise")
    parser.add_argument("--place", choices=sorted(PLACE_WORDS), help="of all pictures")
    parser.add_argument("--sheet", type=Path, help="PNG of the false alarms, to be looked at")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Paint, label, write; print how many pictures gave how many false alarms."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    pipeline = load_pipeline(options.weights / "sd", options.device)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    facts = json.loads((options.weights / "sd" / "closeup.json").read_text(encoding="utf-8"))
    detector = load_face_detector(options.weights / "face_detector.safetensors")
    pictures, rows, patches = [], [], []
    started_s, end = time.monotonic(), options.seed + options.count
    for first in range(options.seed, end, _BATCH):
        seeds = range(first, min(first + _BATCH, end))
        for picture, people in _paint_scenes(pipeline, seeds, options.place, facts["defaults"]):
            labels = label_faces(find_faces(detector, picture, score=_SCORE), people, len(picture))
            if labels:
                pictures.append(picture)
                rows.append(_rows(labels.faces))
                patches += [_cut_out(picture, face) for face in labels.alarms]
        done = seeds[-1] + 1 - options.seed
        print(f"{done} painted, {done / (time.monotonic() - started_s):.1f}/s", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    np.save(options.out / "images.npy", np.stack(pictures))
    np.save(options.out / "faces.npy", np.stack(rows))
    if options.sheet and patches:
        sheet = lay_out(np.stack(patches), 12, zoom=1.0)
        cv2.imwrite(str(options.sheet), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    print(f"{len(pictures)} pictures kept, {len(patches)} false alarms in them")


if __name__ == "__main__":
    main()
