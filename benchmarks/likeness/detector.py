"""The demo's face detector on generated pictures: against hand-checked truth, and the real YuNet.

``truth.json`` holds the faces of the pictures that the seeds below give with the committed weights,
checked by hand: `propose` draws what either detector finds, a person strikes out what is no face
and adds what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.likeness.generator import held_out_prompts
from benchmarks.likeness.prompts import Group, Prompt, Split, make_prompts
from benchmarks.likeness.sheets import in_rows, with_boxes, write_sheet
from benchmarks.likeness.studio import Base
from benchmarks.results import Section, Verdict
from closeup.detection import (
    OUTPUT_NAMES,
    Face,
    decode_detections,
    detection_long_sides,
    detector_input,
    merge_detections,
)
from closeup.engines import Engine, EngineOptions, open_engine
from demo.attributes import Framing

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]
Detector = Callable[[Pixels], list[Face]]

TRUTH = Path(__file__).resolve().parent / "truth.json"
SMALLEST_PX = 12.0
IOU = 0.5
AIM = 0.95
LONG_SHOTS, CROWDS, CLOSER = 40, 20, 20
PROPOSED_FROM = 0.3
_SHEET_PICTURES, _SHEET_COLUMNS, _SHEET_PX = 20, 5, 384


def detector_prompts() -> list[Prompt]:
    """Return the prompts of the pictures that are looked at."""
    closer = [p for p in held_out_prompts(4 * CLOSER) if p.framing is not Framing.FULL][:CLOSER]
    return [
        *make_prompts(Split.REPORT, Group.LONG, LONG_SHOTS),
        *make_prompts(Split.REPORT, Group.CROWD, CROWDS),
        *closer,
    ]


def detector_from(path: Path, *, score: float = 0.6) -> Detector:
    """Return a detector in YuNet's layout that looks as closeup's face pass does.

    Args:
        path: ONNX file with input ``input`` and the twelve outputs of `closeup.detection`.
        score: faces below are dropped.
    """
    engine: Engine = open_engine(path, options=EngineOptions())

    def detect(pixels: Pixels) -> list[Face]:
        height, width = pixels.shape[:2]
        looks = []
        for long_side in detection_long_sides(height, width):
            tensor, scale = detector_input(pixels, long_side=long_side)
            found = engine.run({"input": tensor})
            outputs = {name: found[name] for name in OUTPUT_NAMES}
            looks.append(
                decode_detections(outputs, scale=scale, size=(height, width), score_threshold=score)
            )
        return merge_detections(*looks)

    return detect


# --------------------------------------------------------------------------------------- truth


def propose(
    bases: Sequence[Base], detectors: Sequence[Detector], folder: Path
) -> dict[str, list[Box]]:
    """Draw sheets of what any detector finds, and return it by the prompts' seeds.

    Where several find the same face the box is the mean of theirs.
    """
    proposals, cells = {}, []
    for base in bases:
        looks = [detect(base.original) for detect in detectors]
        boxes = merge_boxes([face.box for look in looks for face in look])
        proposals[str(base.prompt.seed)] = boxes
        shown = [Face(box=box, score=1, landmarks=((0, 0),) * 5) for box in boxes]
        drawn = with_boxes(base.original, shown, (255, 0, 255), zoom=3)
        cells.append((drawn, f"{base.prompt.seed}: {len(boxes)}"))
    for first in range(0, len(cells), _SHEET_PICTURES):
        part = in_rows(cells[first : first + _SHEET_PICTURES], _SHEET_COLUMNS)
        write_sheet(folder / f"detector-{first // _SHEET_PICTURES + 1}.png", part, _SHEET_PX)
    return proposals


def merge_boxes(boxes: Sequence[Box]) -> list[Box]:
    """Join boxes that overlap by at least `IOU` into their mean, from left to right."""
    groups: list[list[Box]] = []
    for box in boxes:
        group = next((g for g in groups if overlap(g[0], box) >= IOU), None)
        if group is None:
            groups.append([box])
        else:
            group.append(box)
    merged = [tuple(round(float(v), 1) for v in np.mean(group, axis=0)) for group in groups]
    return sorted((box[0], box[1], box[2], box[3]) for box in merged)


def write_truth(path: Path, fingerprint: str, boxes: dict[str, list[Box]], note: str) -> None:
    """Write truth (or proposals to be checked)."""
    data = {"fingerprint": fingerprint, "note": note, "faces": boxes}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_truth(path: Path, fingerprint: str) -> dict[str, list[Box]]:
    """Return the hand-checked boxes by the prompts' seeds.

    Raises:
        SystemExit: they belong to other weights, or there are none.
    """
    if not path.exists():
        raise SystemExit(f"{path.name} is missing; run the command with --propose and check it.")
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["fingerprint"] != fingerprint:
        raise SystemExit(
            f"{path.name} was checked for other weights ({data['fingerprint'][:12]}, these are "
            f"{fingerprint[:12]}); run the command with --propose and check it again."
        )
    return {seed: [(a, b, c, d) for a, b, c, d in boxes] for seed, boxes in data["faces"].items()}


# -------------------------------------------------------------------------------------- figure


def overlap(one: Box, other: Box) -> float:
    """Return intersection over union of two boxes."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    if across <= 0 or down <= 0:
        return 0.0
    shared = across * down
    whole = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return float(shared / (whole - shared))


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """Faces found of those there, and how many detections were faces."""

    there: int
    found: int
    made: int
    true: int

    @property
    def recall(self) -> float:
        """Share of the faces that were found."""
        return self.found / self.there if self.there else 0.0

    @property
    def precision(self) -> float:
        """Share of the detections that are faces."""
        return self.true / self.made if self.made else 0.0


def count_matches(truth: Sequence[Box], found: Sequence[Box]) -> Count:
    """Match detections, best score first, to faces one to one at `IOU`.

    Faces smaller than `SMALLEST_PX` are neither asked for nor held against a detection, and
    detections of that size that match nothing are left out.
    """
    left = list(range(len(truth)))
    hits = true = made = 0
    for box in found:
        best = max(left, key=lambda index: overlap(truth[index], box), default=None)
        if best is None or overlap(truth[best], box) < IOU:
            made += _is_large(box)
            continue
        left.remove(best)
        if _is_large(truth[best]):
            hits, true, made = hits + 1, true + 1, made + 1
    return Count(there=sum(map(_is_large, truth)), found=hits, made=made, true=true)


def _is_large(box: Box) -> bool:
    return max(box[2] - box[0], box[3] - box[1]) >= SMALLEST_PX


def total(counts: Sequence[Count]) -> Count:
    """Add counts."""
    return Count(
        there=sum(count.there for count in counts),
        found=sum(count.found for count in counts),
        made=sum(count.made for count in counts),
        true=sum(count.true for count in counts),
    )


def detector_section(
    bases: Sequence[Base],
    truth: dict[str, list[Box]],
    ours: Detector,
    yunet: Detector | None,
) -> Section:
    """Return the table: both detectors against the truth, and ours against YuNet."""
    found = {"demo detector": [[face.box for face in ours(b.original)] for b in bases]}
    if yunet:
        found["YuNet"] = [[face.box for face in yunet(base.original)] for base in bases]
    checked = [truth[str(base.prompt.seed)] for base in bases]
    rows, verdicts = [], []
    for name, boxes in found.items():
        for group, chosen in _groups(bases):
            count = total([count_matches(checked[i], boxes[i]) for i in chosen])
            rows.append(_count_row(f"{name}, {group}", count))
            if name == "demo detector" and group == "all":
                verdicts = [
                    Verdict(name="recall", value=count.recall, limit=AIM, at_least=True),
                    Verdict(name="precision", value=count.precision, limit=AIM, at_least=True),
                ]
    if yunet:
        pairs = zip(found["YuNet"], found["demo detector"], strict=True)
        agreed = total([count_matches(theirs, mine) for theirs, mine in pairs])
        rows.append(_count_row("demo detector, YuNet taken for the truth", agreed))
    return Section(
        title=f"The detector on {len(bases)} generated pictures",
        columns=("detector, pictures", "faces", "recall", "detections", "precision"),
        rows=tuple(rows),
        verdicts=tuple(verdicts),
        notes=(
            f"IoU {IOU:g}, faces from {SMALLEST_PX:g} px up in the picture as generated, score "
            "0.6, both looks of the face pass. Truth: boxes that either detector proposed (the "
            "mean where both did), each looked at, missing faces added.",
        ),
    )


def _groups(bases: Sequence[Base]) -> list[tuple[str, list[int]]]:
    groups = [
        (group.value, [i for i, base in enumerate(bases) if base.prompt.group is group])
        for group in (Group.LONG, Group.CROWD, Group.CAPTION)
    ]
    return [*groups, ("all", list(range(len(bases))))]


def _count_row(name: str, count: Count) -> tuple[str, ...]:
    return (
        name,
        str(count.there),
        f"{count.recall:.3f}",
        str(count.made),
        f"{count.precision:.3f}",
    )
