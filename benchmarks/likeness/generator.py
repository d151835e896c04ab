"""The generator's own figure: are the attributes of a caption in the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.likeness.compare import Likeness, likeness_of, match_people
from benchmarks.likeness.crops import cut_face
from benchmarks.likeness.judge import Judge
from benchmarks.likeness.prompts import Character, Group, Prompt, scene_prompt
from benchmarks.likeness.sheets import in_rows, write_sheet
from benchmarks.likeness.studio import Base, Studio
from benchmarks.results import Section, Verdict
from closeup.detection import scale_faces
from demo.attributes import Framing, sample_scene
from demo.pictures import NATIVE_PX
from demo.sample import HELD_OUT_SEED
from demo.world import draw_scene

Pixels = npt.NDArray[np.uint8]

RIGHT_AIM = 0.9
#: From this probability on the judge takes two eyes for a pair.
PAIR_FROM = 0.5
_SHEET_PICTURES, _SHEET_COLUMNS, _SHEET_PX = 50, 10, 192


@dataclass(frozen=True, kw_only=True, slots=True)
class Painted:
    """A picture and how its people came out.

    Attributes:
        base: the picture.
        people: of the prompt, from left to right; None where no face was found.
    """

    base: Base
    people: tuple[tuple[Character, Likeness | None], ...]

    @property
    def score(self) -> tuple[int, int]:
        """Attributes right and attributes named; a face that is not there has none right."""
        right = sum(likeness.count for _, likeness in self.people if likeness)
        return right, sum(len(person.truth) for person, _ in self.people)


@dataclass(kw_only=True, slots=True)
class Drawn:
    """What the judge sees in the drawings of one framing.

    Attributes:
        right: attributes right.
        named: attributes named by the captions.
        faces: faces looked at.
        pairs: faces whose eyes are a pair.
    """

    right: int = 0
    named: int = 0
    faces: int = 0
    pairs: int = 0

    def __add__(self, other: Drawn) -> Drawn:
        return Drawn(
            right=self.right + other.right,
            named=self.named + other.named,
            faces=self.faces + other.faces,
            pairs=self.pairs + other.pairs,
        )


def held_out_prompts(count: int) -> list[Prompt]:
    """Return the captions of `demo.sample.held_out_captions`, with what they name."""
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + count)
    return [scene_prompt(sample_scene(seed), seed, Group.CAPTION) for seed in seeds]


def judge_pictures(studio: Studio, judge: Judge, prompts: Sequence[Prompt]) -> list[Painted]:
    """Paint the prompts without a face pass and judge the pictures as generated."""
    painted = []
    for base in studio.paint(prompts):
        faces = scale_faces(base.faces, 1 / base.enlarged)
        likenesses: list[tuple[Character, Likeness | None]] = []
        for person, index in zip(base.prompt.people, match_people(base), strict=True):
            likeness = None
            if index is not None:
                reading = judge.look([cut_face(base.original, faces[index].box)])[0]
                likeness = likeness_of(reading, person, reading.embedding)
            likenesses.append((person, likeness))
        painted.append(Painted(base=base, people=tuple(likenesses)))
    return painted


def judge_drawings(
    judge: Judge, prompts: Sequence[Prompt], pass_through: Callable[[Pixels], Pixels]
) -> dict[Framing, Drawn]:
    """Judge what would be left of the prompts' scenes if the generator drew them like the world.

    Args:
        judge: says what is seen.
        prompts: of `held_out_prompts`.
        pass_through: (N, S, S, 3) uint8 through the autoencoder and back.
    """
    drawn = [draw_scene(sample_scene(prompt.seed), size=NATIVE_PX) for prompt in prompts]
    decoded = pass_through(np.stack([picture.pixels for picture in drawn]))
    counts = {framing: Drawn() for framing in Framing}
    for prompt, picture, pixels in zip(prompts, drawn, decoded, strict=True):
        count = counts[prompt.framing]
        count.named += sum(len(person.truth) for person in prompt.people)
        for face in picture.faces:
            reading = judge.look([cut_face(pixels, face.box)])[0]
            count.right += sum(reading.right(prompt.people[face.person].truth).values())
            count.faces += 1
            count.pairs += reading.eyes_match >= PAIR_FROM
    return counts


def limits_section(counts: Mapping[Framing, Drawn]) -> Section:
    """Return the table of what the autoencoder leaves of drawings."""
    near = [counts[framing] for framing in Framing if framing is not Framing.FULL]
    rows = [*((framing.value, counts[framing]) for framing in Framing),
            ("half and closer", sum(near, Drawn()))]  # fmt: skip
    return Section(
        title="The same scenes drawn, and passed through the autoencoder",
        columns=("framing", "attributes right", "named", "eyes a pair", "faces"),
        rows=tuple(
            (
                name,
                f"{count.right / count.named:.1%}",
                str(count.named),
                f"{count.pairs / count.faces:.1%}" if count.faces else "-",
                str(count.faces),
            )
            for name, count in rows
            if count.named
        ),
        notes=("A generator that drew like the world could have no more right.",),
    )


def generator_section(painted: Sequence[Painted]) -> Section:
    """Return the table by framing; the aim is for half-body pictures and closer ones."""
    near = [one for one in painted if one.base.prompt.framing is not Framing.FULL]
    rows = [
        _row(framing.value, [one for one in painted if one.base.prompt.framing is framing])
        for framing in Framing
    ]
    rows.append(_row("half and closer", near))
    rows.append(_row("all", painted))
    return Section(
        title=f"The generator: {len(painted)} held-out captions, no face pass",
        columns=("framing", "pictures", "people", "no face", "attributes right", "eyes a pair"),
        rows=tuple(rows),
        verdicts=(
            Verdict(
                name="attributes right, half-body and closer",
                value=right_share(near),
                limit=RIGHT_AIM,
                at_least=True,
            ),
        ),
        notes=(
            "Attributes that the caption names, judged on the picture as generated; where no face "
            "was found for a person none is right. Eyes: of the faces found.",
        ),
    )


def attributes_section(painted: Sequence[Painted]) -> Section:
    """Return the share of right answers by attribute, long shots and the others apart."""
    named: dict[str, dict[bool, list[bool]]] = {}
    for one in painted:
        near = one.base.prompt.framing is not Framing.FULL
        for person, likeness in one.people:
            for attribute in person.truth:
                right = likeness is not None and likeness.right[attribute]
                named.setdefault(attribute, {True: [], False: []})[near].append(right)
    rows = tuple(
        (attribute, *(cell for near in (True, False) for cell in _share_cells(answers[near])))
        for attribute, answers in sorted(named.items())
    )
    return Section(
        title="The generator, by attribute",
        columns=("attribute", "half and closer", "named", "long shots", "named"),
        rows=rows,
    )


def _share_cells(answers: Sequence[bool]) -> tuple[str, str]:
    return (f"{sum(answers) / len(answers):.0%}" if answers else "-", str(len(answers)))


def right_share(painted: Sequence[Painted]) -> float:
    """Return the share of named attributes that are right."""
    named = sum(one.score[1] for one in painted)
    return sum(one.score[0] for one in painted) / named if named else 0.0


def _row(name: str, painted: Sequence[Painted]) -> tuple[str, ...]:
    people = [likeness for one in painted for _, likeness in one.people]
    found = [likeness for likeness in people if likeness is not None]
    pairs = sum(likeness.eyes_match >= PAIR_FROM for likeness in found)
    return (
        name,
        str(len(painted)),
        str(len(people)),
        str(len(people) - len(found)),
        f"{right_share(painted):.1%}",
        f"{pairs / len(found):.1%}" if found else "-",
    )


def write_generator_sheets(folder: Path, painted: Sequence[Painted]) -> list[Path]:
    """Write every picture, fifty a sheet, with its number and attributes right below it."""
    paths = []
    for first in range(0, len(painted), _SHEET_PICTURES):
        cells = []
        for number, one in enumerate(painted[first : first + _SHEET_PICTURES], start=first):
            right, named = one.score
            cells.append((one.base.original, f"{number}: {right} of {named}"))
        path = folder / f"generator-{first // _SHEET_PICTURES + 1}.png"
        write_sheet(path, in_rows(cells, _SHEET_COLUMNS), _SHEET_PX)
        paths.append(path)
    return paths
