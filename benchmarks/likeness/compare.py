"""Every method on the same base pictures, judged face by face."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from benchmarks.likeness.crops import cut_face
from benchmarks.likeness.judge import Judge, Reading
from benchmarks.likeness.matching import match_faces
from benchmarks.likeness.metrics import (
    Outcome,
    box_area,
    changed_outside,
    outcome_of,
    seam_score,
)
from benchmarks.likeness.prompts import Character, Group, Prompt
from benchmarks.likeness.references import References
from benchmarks.likeness.studio import Base, Method, Studio, Timed, Tuning

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Box = tuple[float, float, float, float]
#: Bytes changed further from a face than its box grown by this share count as beyond it.
BOX_GROWN = 0.5
_NOISE_QUANTILE, _NOISE_SHIFT = 0.95, (0.01, 0.01)


@dataclass(frozen=True, kw_only=True, slots=True)
class Likeness:
    """How like its person a face is.

    Attributes:
        right: attribute -> whether it is as the prompt says, for those that it names.
        cosine: to the same person drawn cleanly.
        eyes_match: probability that the eyes are a pair.
        is_face: it is a face, with two eyes to be seen.
    """

    right: dict[str, bool]
    cosine: float
    eyes_match: float
    is_face: bool

    @property
    def count(self) -> int:
        """Attributes that are right."""
        return sum(self.right.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceResult:
    """One person of one prompt after one method.

    Attributes:
        seed: of the prompt.
        person: index in the prompt.
        group: of the prompt.
        before: in the base picture; None when no face was found for this person.
        after: the same face after the method.
        outcome: what became of it; unchanged when no face was found.
    """

    seed: int
    person: int
    group: Group
    before: Likeness | None
    after: Likeness | None
    outcome: Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureResult:
    """One picture after one method.

    Attributes:
        seed: of the prompt.
        group: of the prompt.
        faces: repainted.
        seam: `seam_score`; None when nothing was repainted.
        outside_mask: bytes changed where the method's own mask is 0.
        beyond_faces: bytes changed beyond the faces' boxes, grown by `BOX_GROWN`.
        wall_s: of the whole pass.
        cpu_s: likewise.
    """

    seed: int
    group: Group
    faces: int
    seam: float | None
    outside_mask: int
    beyond_faces: int
    wall_s: float
    cpu_s: float


@dataclass(slots=True)
class Results:
    """What one method came to."""

    faces: list[FaceResult] = field(default_factory=list)
    pictures: list[PictureResult] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A base picture and who is in it.

    Attributes:
        base: the picture.
        boxes: of each person's face in it; None where none was found.
        readings: of those faces in the base picture.
        before: their likeness.
    """

    base: Base
    boxes: tuple[Box | None, ...]
    readings: tuple[Reading | None, ...]
    before: tuple[Likeness | None, ...]


class Bench:
    """Judges methods on base pictures.

    Args:
        studio: paints.
        judge: looks.
        bases: the pictures.
        references: what faces are compared with.

    Attributes:
        margin: a change of the cosine of up to this is noise: the 95th percentile of what it
            changes when the same faces are cut out 1 % of the square further right and down
            (those that the judge takes for faces both times).
    """

    def __init__(
        self,
        studio: Studio,
        judge: Judge,
        bases: Sequence[Base],
        references: References,
    ) -> None:
        self.studio, self.judge = studio, judge
        self._references = references
        self.subjects = [self._subject(base) for base in bases]
        self.margin = self._margin()

    def compare(
        self,
        methods: Mapping[str, Method],
        tuning: Tuning | Callable[[Prompt], Tuning] | None = None,
    ) -> Iterator[tuple[Base, dict[str, Timed], dict[str, Results]]]:
        """Run all methods on each picture in turn; yields after every picture."""
        for subject in self.subjects:
            base = subject.base
            done: dict[str, Timed] = {}
            results: dict[str, Results] = {}
            for name, method in methods.items():
                change = tuning(base.prompt) if callable(tuning) else tuning
                timed = self.studio.repaint(method, base, change)
                readings = self._read(timed.result.pixels, subject.boxes)
                after = self._likenesses(base.prompt, readings)
                done[name] = timed
                results[name] = Results(
                    faces=self._faces(base.prompt, subject.before, after),
                    pictures=[picture_result(base, timed)],
                )
            yield base, done, results

    def _subject(self, base: Base) -> Subject:
        boxes = tuple(
            None if index is None else base.faces[index].box for index in match_people(base)
        )
        readings = self._read(base.picture, boxes)
        before = self._likenesses(base.prompt, readings)
        return Subject(base=base, boxes=boxes, readings=tuple(readings), before=tuple(before))

    def _read(
        self,
        pixels: Pixels,
        boxes: Sequence[Box | None],
        shift: tuple[float, float] = (0.0, 0.0),
    ) -> list[Reading | None]:
        """Look at the faces of a picture where they were found in the base picture."""
        crops = [cut_face(pixels, box, shift=shift) for box in boxes if box is not None]
        readings = iter(self.judge.look(crops))
        return [None if box is None else next(readings) for box in boxes]

    def _likenesses(
        self, prompt: Prompt, readings: Sequence[Reading | None]
    ) -> list[Likeness | None]:
        return [
            None
            if reading is None
            else likeness_of(reading, person, self._reference(person, reading))
            for person, reading in zip(prompt.people, readings, strict=True)
        ]

    def _reference(self, person: Character, reading: Reading) -> Floats:
        """The embedding to compare with; what is no face is compared with nothing."""
        if not reading.is_face:
            return np.zeros_like(reading.embedding)
        return self._references.embedding(person, reading)

    def _margin(self) -> float:
        changes = []
        for subject in self.subjects:
            moved = self._read(subject.base.picture, subject.boxes, _NOISE_SHIFT)
            people = subject.base.prompt.people
            for person, here, there in zip(people, subject.readings, moved, strict=True):
                if here and there and here.is_face and there.is_face:
                    reference = self._reference(person, here)
                    changes.append(abs(there.cosine(reference) - here.cosine(reference)))
        return float(np.quantile(changes, _NOISE_QUANTILE)) if changes else 0.0

    def _faces(
        self,
        prompt: Prompt,
        before: Sequence[Likeness | None],
        after: Sequence[Likeness | None],
    ) -> list[FaceResult]:
        results = []
        for person, (old, new) in enumerate(zip(before, after, strict=True)):
            outcome = Outcome.UNCHANGED
            if old is not None and new is not None:
                outcome = outcome_of((old.count, new.count), (old.cosine, new.cosine), self.margin)
            results.append(
                FaceResult(
                    seed=prompt.seed,
                    person=person,
                    group=prompt.group,
                    before=old,
                    after=new,
                    outcome=outcome,
                )
            )
        return results


def match_people(base: Base) -> list[int | None]:
    """Return for each person of the prompt the index of a face of the base picture."""
    height, width = base.picture.shape[:2]
    centers = [(face.center[0] / width, face.center[1] / height) for face in base.faces]
    return match_faces([person.place for person in base.prompt.people], centers)


def likeness_of(reading: Reading, person: Character, reference: Floats) -> Likeness:
    """Compare a reading with who it should be."""
    return Likeness(
        right=reading.right(person.truth),
        cosine=reading.cosine(reference),
        eyes_match=reading.eyes_match,
        is_face=reading.is_face,
    )


def picture_result(base: Base, timed: Timed) -> PictureResult:
    """Measure what a method did to the picture."""
    result = timed.result
    boxes = [face.box for face in base.faces]
    size = (base.picture.shape[0], base.picture.shape[1])
    return PictureResult(
        seed=base.prompt.seed,
        group=base.prompt.group,
        faces=result.faces,
        seam=seam_score(base.picture, result.pixels, result.alpha) if result.faces else None,
        outside_mask=changed_outside(base.picture, result.pixels, result.alpha > 0),
        beyond_faces=changed_outside(base.picture, result.pixels, box_area(size, boxes, BOX_GROWN)),
        wall_s=timed.wall_s,
        cpu_s=timed.cpu_s,
    )
