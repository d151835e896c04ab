"""How good the judge itself is, on drawings that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.likeness.crops import cut_face
from benchmarks.likeness.features import break_eye, remove_features, spoil_surroundings
from benchmarks.likeness.judge import Judge, Reading
from benchmarks.likeness.network import EYES_MATCH, FACE
from benchmarks.likeness.subjects import (
    HELD_OUT_SEED,
    draw_elsewhere,
    draw_face,
    marked_person,
    other_view,
    scene_around,
)
from benchmarks.likeness.wording import ATTRIBUTES, Values, values_of
from benchmarks.results import Section, Verdict
from demo.attributes import sample_scene

Pixels = npt.NDArray[np.uint8]

ACCURACY_AIM = 0.97


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A held-out drawing.

    Attributes:
        crop: (128, 128, 3) uint8.
        broken: the same with one eye spoiled.
        head: the same without a face.
        surrounded: the same face in a spoiled picture.
        again: the same person in another scene, with another expression.
        truth: what is to be seen in ``crop``.
    """

    crop: Pixels
    broken: Pixels
    head: Pixels
    surrounded: Pixels
    again: Pixels
    truth: Values


def held_out_example(number: int) -> Example:
    """Draw a held-out person, marked more often than chance would have it."""
    seed = HELD_OUT_SEED + 2 * number
    person = marked_person(np.random.default_rng([seed, 4]))
    (scene, index), (scene2, index2) = scene_around(person, seed), other_view(person, seed + 1)
    picture, second = draw_face(scene, index), draw_face(scene2, index2)
    face = next(face for face in picture.faces if face.person == index)
    face2 = next(face for face in second.faces if face.person == index2)
    random = np.random.default_rng([seed, 6])
    side = int(random.integers(2))
    broken = break_eye(picture.pixels, face.landmarks, side, random)
    head = remove_features(picture.pixels, face.landmarks, random)
    surrounded = spoil_surroundings(picture.pixels, face.landmarks, random)
    return Example(
        crop=cut_face(picture.pixels, face.box),
        broken=cut_face(broken, face.box),
        head=cut_face(head, face.box),
        surrounded=cut_face(surrounded, face.box),
        again=cut_face(second.pixels, face2.box),
        truth=values_of(scene.people[index][0]),
    )


def held_out_others(count: int) -> list[Pixels]:
    """Draw held-out squares that show no face."""
    random = np.random.default_rng(HELD_OUT_SEED)
    crops: list[Pixels] = []
    while len(crops) < count:
        seed = HELD_OUT_SEED + 5_000_000 + int(random.integers(2**20))
        picture = draw_elsewhere(sample_scene(seed), random)
        if not picture.faces:
            side = picture.pixels.shape[0]
            crops.append(cut_face(picture.pixels, (0, 0, side, side), factor=1.0))
    return crops


def accuracy_section(judge: Judge, count: int) -> Section:
    """Measure the judge on ``count`` held-out people; as many heads without a face."""
    examples = [held_out_example(number) for number in range(count)]
    readings = judge.look([example.crop for example in examples])
    rows = [attribute_row(name, examples, readings) for name in ATTRIBUTES]
    faces = [reading.is_face for reading in readings]
    blanks = [not r.is_face for r in judge.look(held_out_others(max(1, count // 4)))]
    heads = [not r.is_face for r in judge.look([example.head for example in examples])]
    insets = [r.is_face for r in judge.look([example.surrounded for example in examples])]
    rows.append(_row(FACE, [*faces, *insets, *blanks, *heads], [faces, insets, blanks, heads]))
    whole = [
        reading.eyes_match >= 0.5
        for reading, example in zip(readings, examples, strict=True)
        if example.truth["left eye"] == example.truth["right eye"]
    ]
    broken = [r.eyes_match < 0.5 for r in judge.look([example.broken for example in examples])]
    rows.append(_row(EYES_MATCH, [*whole, *broken], [whole, broken]))
    worst = min(rows, key=lambda row: row[1])
    return Section(
        title=f"The judge on {count} held-out people, clean drawings",
        columns=("attribute", "accuracy", "mean over its values", "examples"),
        rows=tuple((name, f"{a:.1%}", f"{b:.1%}", str(n)) for name, a, b, n in rows),
        verdicts=(
            Verdict(
                name=f"lowest accuracy ({worst[0]})",
                value=worst[1],
                limit=ACCURACY_AIM,
                at_least=True,
            ),
        ),
        notes=(identity_note(examples, readings, judge),),
    )


def attribute_row(
    name: str, examples: Sequence[Example], readings: Sequence[Reading]
) -> tuple[str, float, float, int]:
    """Return name, accuracy, mean accuracy over the values, and how many show the attribute."""
    by_value: dict[str, list[bool]] = {}
    for example, reading in zip(examples, readings, strict=True):
        if name in example.truth:
            value = example.truth[name]
            by_value.setdefault(value, []).append(reading.values[name] == value)
    return _row(name, [a for answers in by_value.values() for a in answers], [*by_value.values()])


def _row(
    name: str, answers: Sequence[bool], parts: Sequence[Sequence[bool]]
) -> tuple[str, float, float, int]:
    means = [sum(part) / len(part) for part in parts if part]
    return name, sum(answers) / len(answers), sum(means) / len(means), len(answers)


def identity_note(examples: Sequence[Example], readings: Sequence[Reading], judge: Judge) -> str:
    """Say how well embeddings tell people apart."""
    first = np.stack([reading.embedding for reading in readings])
    second = np.stack([r.embedding for r in judge.look([example.again for example in examples])])
    cosines = first @ second.T
    same = np.diag(cosines)
    others = cosines[~np.eye(len(cosines), dtype=bool)]
    # How often a person's other picture is nearer than a stranger's.
    above = float((same[:, None] > cosines).sum() / (len(same) * (len(same) - 1)))
    return (
        f"Embeddings: cosine of two pictures of one person {same.mean():.3f} (5 % below "
        f"{np.quantile(same, 0.05):.3f}), of two people {others.mean():.3f} (5 % above "
        f"{np.quantile(others, 0.95):.3f}); the same person is nearer than another in {above:.2%} "
        "of the comparisons."
    )
