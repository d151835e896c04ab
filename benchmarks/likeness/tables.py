"""Results to tables. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from benchmarks.likeness.compare import FaceResult, Likeness, Results
from benchmarks.likeness.metrics import Outcome
from benchmarks.likeness.prompts import Group
from benchmarks.results import Section, Verdict

IMPROVED_AIM, WORSENED_AIM = 0.95, 0.01
NO_PASS, OURS = "no pass", "closeup"
_Z_95 = 1.96
COLUMNS = (
    "method", "faces seen", "attributes right", "cosine", "improved", "mixed", "worsened", "seam",
    "bytes outside its mask", "kB beyond the faces", "s a face", "CPU s a face",
)  # fmt: skip


def attribute_share(faces: Sequence[FaceResult], *, after: bool) -> float:
    """Return the share of named attributes that are right, over people whose face was found."""
    judged = [side for side in _sides(faces, after) if side is not None]
    named = sum(len(side.right) for side in judged)
    return sum(side.count for side in judged) / named if named else 0.0


def seen_share(faces: Sequence[FaceResult], *, after: bool) -> float:
    """Return the share of people in whom the judge sees a face."""
    seen = sum(side is not None and side.is_face for side in _sides(faces, after))
    return seen / len(faces) if faces else 0.0


def mean_cosine(faces: Sequence[FaceResult], *, after: bool) -> float:
    """Return the mean cosine to the person drawn cleanly, over people whose face was found."""
    cosines = [side.cosine for side in _sides(faces, after) if side is not None]
    return statistics.fmean(cosines) if cosines else 0.0


def outcome_share(faces: Sequence[FaceResult], outcome: Outcome) -> float:
    """Return the share of people, found or not, whose face came to ``outcome``."""
    return sum(face.outcome is outcome for face in faces) / len(faces) if faces else 0.0


def share_with_interval(faces: Sequence[FaceResult], outcome: Outcome) -> str:
    """Return `outcome_share` in words, with its 95 % interval: another draw of the noise moves it.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    share = outcome_share(faces, outcome)
    if not faces:
        return "none"
    spread = _Z_95**2 / len(faces)
    middle = share + spread / 2
    reach = math.sqrt(share * (1 - share) * spread + spread**2 / 4)
    low, high = ((middle + sign * reach) / (1 + spread) for sign in (-1, 1))
    return f"{share:.1%} (95 % interval {max(0.0, low):.1%} to {min(1.0, high):.1%})"


def _sides(faces: Sequence[FaceResult], after: bool) -> list[Likeness | None]:
    return [face.after if after else face.before for face in faces]


def group_section(results: Mapping[str, Results], groups: Sequence[Group], title: str) -> Section:
    """Return the table of some groups, all methods below each other, verdicts for ours."""
    parts = {name: _of_groups(result, groups) for name, result in results.items()}
    people = parts[NO_PASS].faces
    missed = sum(face.before is None for face in people)
    verdicts: tuple[Verdict, ...] = ()
    note = (
        f"{len(parts[NO_PASS].pictures)} pictures, {len(people)} people; no face was found "
        f"for {missed} of them, who count as unchanged."
    )
    if OURS in parts:
        found = [face for face in parts[OURS].faces if face.before is not None]
        note += (
            f" Of the {len(found)} faces found, closeup improved "
            f"{share_with_interval(found, Outcome.IMPROVED)} and worsened "
            f"{share_with_interval(found, Outcome.WORSENED)}."
        )
        verdicts = (
            Verdict(
                name="share of faces improved by closeup",
                value=outcome_share(parts[OURS].faces, Outcome.IMPROVED),
                limit=IMPROVED_AIM,
                at_least=True,
            ),
            Verdict(
                name="share of faces worsened by closeup",
                value=outcome_share(parts[OURS].faces, Outcome.WORSENED),
                limit=WORSENED_AIM,
            ),
        )
    return Section(
        title=title,
        columns=COLUMNS,
        rows=tuple(method_row(name, part) for name, part in parts.items()),
        verdicts=verdicts,
        notes=(note,),
    )


def _of_groups(result: Results, groups: Sequence[Group]) -> Results:
    return Results(
        faces=[face for face in result.faces if face.group in groups],
        pictures=[picture for picture in result.pictures if picture.group in groups],
    )


def method_row(name: str, result: Results) -> tuple[str, ...]:
    """Return one line of the table."""
    repainted = [picture for picture in result.pictures if picture.faces]
    faces = sum(picture.faces for picture in repainted)
    shares = [
        f"{outcome_share(result.faces, outcome):.1%}"
        for outcome in (Outcome.IMPROVED, Outcome.MIXED, Outcome.WORSENED)
    ]
    first = [
        name,
        f"{seen_share(result.faces, after=True):.1%}",
        f"{attribute_share(result.faces, after=True):.1%}",
        f"{mean_cosine(result.faces, after=True):.3f}",
    ]
    if not faces:
        return (*first, *["-"] * (len(COLUMNS) - len(first)))
    seams = [picture.seam for picture in repainted if picture.seam is not None]
    return (
        *first,
        *shares,
        f"{statistics.fmean(seams):.2f}",
        str(sum(picture.outside_mask for picture in repainted)),
        f"{sum(picture.beyond_faces for picture in repainted) / faces / 1000:.1f}",
        f"{sum(picture.wall_s for picture in repainted) / faces:.2f}",
        f"{sum(picture.cpu_s for picture in repainted) / faces:.2f}",
    )


def attribute_section(results: Mapping[str, Results], title: str) -> Section:
    """Return the share of right answers attribute by attribute, every method a column."""
    sides: dict[str, list[Likeness]] = {
        name: [face.after for face in result.faces if face.after]
        for name, result in results.items()
    }
    named: dict[str, int] = {}
    for likeness in sides[NO_PASS]:
        for attribute in likeness.right:
            named[attribute] = named.get(attribute, 0) + 1
    rows = tuple(
        (attribute, str(count), *(_right_share(side, attribute) for side in sides.values()))
        for attribute, count in sorted(named.items(), key=lambda item: -item[1])
    )
    return Section(title=title, columns=("attribute", "named", *sides), rows=rows)


def _right_share(side: Sequence[Likeness], attribute: str) -> str:
    answers = [likeness.right[attribute] for likeness in side if attribute in likeness.right]
    return f"{sum(answers) / len(answers):.0%}"


def behind(results: Mapping[str, Results]) -> list[str]:
    """Return the columns in which another face pass is ahead of closeup, with its name."""
    measures: dict[str, Callable[[Results], float]] = {
        "faces seen": lambda r: seen_share(r.faces, after=True),
        "attributes right": lambda r: attribute_share(r.faces, after=True),
        "cosine": lambda r: mean_cosine(r.faces, after=True),
        "improved": lambda r: outcome_share(r.faces, Outcome.IMPROVED),
        "worsened": lambda r: -outcome_share(r.faces, Outcome.WORSENED),
        "seam": lambda r: -_mean([p.seam for p in r.pictures if p.seam is not None]),
        "bytes outside its mask": lambda r: -sum(p.outside_mask for p in r.pictures),
        "bytes beyond the faces": lambda r: (
            -_mean([p.beyond_faces / p.faces for p in r.pictures if p.faces])
        ),
        "seconds a face": lambda r: -_mean([p.wall_s / p.faces for p in r.pictures if p.faces]),
    }
    return [
        f"{column} ({name})"
        for column, measure in measures.items()
        for name, result in results.items()
        if name not in (NO_PASS, OURS) and measure(result) > measure(results[OURS])
    ]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
