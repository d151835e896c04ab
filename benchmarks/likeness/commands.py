"""The commands of ``python -m benchmarks.likeness``; each yields sections and data for JSON."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.likeness import detector, tables
from benchmarks.likeness.accuracy import accuracy_section
from benchmarks.likeness.compare import Bench, Results, match_people
from benchmarks.likeness.crops import cut_face
from benchmarks.likeness.generator import (
    attributes_section,
    generator_section,
    held_out_prompts,
    judge_drawings,
    judge_pictures,
    limits_section,
    write_generator_sheets,
)
from benchmarks.likeness.judge import Judge
from benchmarks.likeness.methods import METHODS
from benchmarks.likeness.metrics import Outcome
from benchmarks.likeness.prompts import Group, Prompt, make_prompts
from benchmarks.likeness.references import References, draw_looks, drawing_pool, looks_of
from benchmarks.likeness.sheets import Cell, write_sheet
from benchmarks.likeness.studio import Base, Studio, Timed, Tuning
from benchmarks.likeness.sweeps import make_tuning
from benchmarks.likeness.wording import prompts_apart
from benchmarks.results import Section
from closeup.faces import FaceOrder
from demo.latents import load_vae, round_trip
from demo.training import WEIGHTS

Found = Iterator[Section | dict[str, object]]
GROUPS = (Group.LONG, Group.LORA, Group.CROWD)
_TOLD_EVERY = 10
_WORST_PX = 224


def open_studio(options: argparse.Namespace) -> Studio:
    """Open the engines.

    Raises:
        SystemExit: the demo model is not exported.
    """
    if not (options.repository / "models.json").is_file():
        raise SystemExit(
            "the repository holds no model: run python -m demo.run --export-only, or name another "
            "one with --repository."
        )
    cache = None if options.no_cache else options.out / "bases"
    return Studio(options.repository, options.lora_dir, cache)


def benchmark_prompts(options: argparse.Namespace) -> list[Prompt]:
    """Return the prompts of all groups: as many long shots as asked for, the others in ratio."""
    counts = {
        Group.LONG: options.count,
        Group.LORA: max(1, options.count // 2),
        Group.CROWD: max(1, options.count * 3 // 10),
    }
    return [p for group, count in counts.items() for p in make_prompts(options.split, group, count)]


def run_command(options: argparse.Namespace) -> Found:
    """Compare all methods."""
    prompts = benchmark_prompts(options)
    with drawing_pool() as pool, open_studio(options) as studio:
        judge, bases = Judge(), studio.paint(prompts)
        print(f"{len(bases)} base pictures", flush=True)
        bench = Bench(studio, judge, bases, References(judge, pool))
        results: dict[str, Results] = {name: Results() for name in METHODS}
        for number, (_, _, added) in enumerate(bench.compare(METHODS), start=1):
            _add(results, added)
            if number % _TOLD_EVERY == 0:
                print(f"{number} of {len(bases)} pictures compared", flush=True)
    for group in GROUPS:
        yield tables.group_section(results, [group], f"Likeness, {group.value}")
    everything = tables.group_section(results, GROUPS, "Likeness, all pictures")
    yield dataclasses.replace(everything, notes=(*everything.notes, *_notes(bench, results)))
    yield tables.attribute_section(results, "Attributes right after each method, all pictures")
    yield {
        "margin": bench.margin,
        "results": {n: dataclasses.asdict(r) for n, r in results.items()},
    }


def _add(results: Mapping[str, Results], added: Mapping[str, Results]) -> None:
    for name, result in added.items():
        results[name].faces += result.faces
        results[name].pictures += result.pictures


def _notes(bench: Bench, results: Mapping[str, Results]) -> list[str]:
    behind = tables.behind(results)
    return [
        "Faces seen: people in whom the judge sees a face with two eyes; where it does not, no "
        "attribute is right and the cosine is 0. Attributes right: of those that the prompt names. "
        "Cosine: between the judge's embeddings of the face and of clean drawings of the same "
        "person. Improved: one of the two rose and "
        "the other did not fall; worsened: one fell and the other did not rise; mixed: one rose, "
        f"one fell. A change of the cosine of up to {bench.margin:.4f} counts as none: so much "
        "does it change when the same face is cut out 1 % further to the side.",
        "Seam: mean growth of the steps between neighbouring pixels, weighted with the mask's own "
        "step, in levels of 255. Beyond the faces: their boxes grown by half. Seconds: the whole "
        "pass, finding the faces included, over the faces repainted.",
        "Columns in which another pass is ahead of closeup: " + (", ".join(behind) or "none") + ".",
    ]


def judge_command(options: argparse.Namespace) -> Found:
    """Measure the judge on held-out drawings."""
    yield accuracy_section(Judge(), options.count)


def generator_command(options: argparse.Namespace) -> Found:
    """Measure the generator on held-out captions."""
    judge, prompts = Judge(), held_out_prompts(options.count)
    with open_studio(options) as studio:
        painted = judge_pictures(studio, judge, prompts)
    yield generator_section(painted)
    yield attributes_section(painted)
    vae = load_vae(WEIGHTS / "sd")
    yield limits_section(judge_drawings(judge, prompts, partial(round_trip, vae)))
    for path in write_generator_sheets(options.out, painted):
        print(f"written: {path.name} in {path.parent.name}/")


def detector_command(options: argparse.Namespace) -> Found:
    """Measure the detector, or propose truth."""
    ours_path = options.repository / "face_detector" / "1" / "model.onnx"
    with open_studio(options) as studio:
        bases, fingerprint = studio.paint(detector.detector_prompts()), studio.fingerprint
    if options.propose:
        paths = [path for path in (ours_path, options.yunet) if path.is_file()]
        proposing = [detector.detector_from(path, score=detector.PROPOSED_FROM) for path in paths]
        boxes = detector.propose(bases, proposing, options.out)
        target = options.out / "truth.json"
        detector.write_truth(target, fingerprint, boxes, "proposals, not checked yet")
        print(f"written: {target.name} and detector-*.png in {options.out.name}/; check it, then "
              f"move it to {detector.TRUTH.parent.name}/")  # fmt: skip
        return
    truth = detector.read_truth(detector.TRUTH, fingerprint)
    yunet = detector.detector_from(options.yunet) if options.yunet.is_file() else None
    yield detector.detector_section(bases, truth, detector.detector_from(ours_path), yunet)


def sweep_command(options: argparse.Namespace) -> Found:
    """Try several values of one parameter of closeup's face pass."""
    try:
        tunings = {text: make_tuning(options.parameter, text) for text in options.values}
    except ValueError as error:
        raise SystemExit(str(error)) from None
    results = {"no pass": Results()}
    with drawing_pool() as pool, open_studio(options) as studio:
        judge, bases = Judge(), studio.paint(benchmark_prompts(options))
        bench = Bench(studio, judge, bases, References(judge, pool))
        methods = {"no pass": METHODS["no pass"]}
        for _, _, added in bench.compare(methods):
            _add(results, added)
        for text, tuning in tunings.items():
            name = f"{options.parameter} {text}"
            results[name] = Results()
            try:
                for _, _, added in bench.compare({name: METHODS["closeup"]}, tuning):
                    _add(results, added)
            except ValueError as error:
                raise SystemExit(f"{name}: {error}") from None
            print(f"{name} done", flush=True)
    for group in (*GROUPS, None):
        chosen, title = ([group], group.value) if group else (GROUPS, "all pictures")
        yield tables.group_section(results, chosen, f"{options.parameter}: {title}")


def crowd_command(options: argparse.Namespace) -> Found:
    """Compare closeup's pass with one prompt for all faces and with one for each."""
    prompts = make_prompts(options.split, Group.CROWD, options.count)
    with drawing_pool() as pool, open_studio(options) as studio:
        judge = Judge()
        bench = Bench(studio, judge, studio.paint(prompts), References(judge, pool))
        suffix = studio.models.resolve(prompt=prompts[0].text).model.face_prompt_suffix

        def apart(prompt: Prompt) -> Tuning:
            words = tuple(part + suffix for part in prompts_apart(prompt.text))
            order = {"order": FaceOrder.LEFT_RIGHT}
            return Tuning(faces=order, request={"face_prompts": words})

        results = {name: Results() for name in ("no pass", "closeup", "closeup, a prompt a face")}
        for _, _, added in bench.compare({name: METHODS[name] for name in ("no pass", "closeup")}):
            _add(results, added)
        for _, _, added in bench.compare({"closeup, a prompt a face": METHODS["closeup"]}, apart):
            _add(results, added)
    section = tables.group_section(
        results, [Group.CROWD], "One prompt for all faces, and one for each"
    )
    margin = (
        f"A change of the cosine of up to {bench.margin:.4f} counts as none: measured as in "
        "likeness.md, on these pictures alone."
    )
    yield dataclasses.replace(section, notes=(*section.notes, margin))
    yield tables.attribute_section(results, "Attributes right, two or three people")


def worst_command(options: argparse.Namespace) -> Found:
    """Write a sheet of the faces that closeup did least good."""
    shown: list[tuple[tuple[float, ...], str, list[Cell]]] = []
    with drawing_pool() as pool, open_studio(options) as studio:
        judge, bases = Judge(), studio.paint(benchmark_prompts(options))
        bench = Bench(studio, judge, bases, References(judge, pool))
        for base, done, results in bench.compare({"closeup": METHODS["closeup"]}):
            shown += _ranked(judge, base, done["closeup"], results["closeup"])
    shown.sort(key=lambda item: item[0])
    worst = shown[: options.results]
    path: Path = options.out / "worst.png"
    write_sheet(path, [cells for _, _, cells in worst], _WORST_PX)
    for number, (_, text, _) in enumerate(worst, start=1):
        print(f"{number}: {text}")
    print(f"written: {path.name} in {path.parent.name}/: base picture, face before, after, drawn")
    yield from ()


def _ranked(
    judge: Judge, base: Base, timed: Timed, results: Results
) -> list[tuple[Any, str, list[Cell]]]:
    """Return for every person a rank (lowest is worst), a description, and a row of the sheet."""
    ranked = []
    matched: Sequence[int | None] = match_people(base)
    for face, index in zip(results.faces, matched, strict=True):
        person = base.prompt.people[face.person]
        words = f"seed {face.seed}, person {face.person}, {face.outcome.value}: {base.prompt.text}"
        if index is None or face.before is None or face.after is None:
            cells = [(base.picture, f"{face.seed}: no face")]
            ranked.append(((0.0, 0.0), words, cells))
            continue
        box, named = base.faces[index].box, len(person.truth)
        (seen,) = judge.look([cut_face(timed.result.pixels, box)])
        drawn = draw_looks(person.person or looks_of(person.truth, seen.values), 0)
        wrong = [name for name, right in face.after.right.items() if not right]
        cells = [
            (base.picture, f"{face.seed}.{face.person} {face.outcome.value}"),
            *(
                (cut_face(pixels, box), f"{side.count} of {named}, {side.cosine:.3f}")
                for pixels, side in (
                    (base.picture, face.before),
                    (timed.result.pixels, face.after),
                )
            ),
            (drawn, "drawn; wrong: " + (", ".join(wrong) or "none")),
        ]
        fell = face.outcome is Outcome.WORSENED
        gained = face.after.count - face.before.count
        rank = (float(not fell), gained + face.after.cosine - face.before.cosine)
        ranked.append((rank, words, cells))
    return ranked
