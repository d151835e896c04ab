"""Drawn people to train the judge on, to measure it with, and to compare with.

Seeds: the judge learns from 700,000,000 on, is measured from 900,000,000 on (held out, as in
demo/README.md), and draws the people of prompts from 800,000,000 on.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from benchmarks.likeness.crops import cut_face
from benchmarks.likeness.wording import YES, Values
from demo.attributes import (
    EXPRESSIONS,
    EYES,
    STYLES,
    Framing,
    Person,
    Scene,
    sample_person,
    sample_scene,
    with_person,
)
from demo.canvas import View
from demo.world import Picture, draw_scene, face_view

Pixels = npt.NDArray[np.uint8]

TRAINING_SEED, REFERENCE_SEED, HELD_OUT_SEED = 700_000_000, 800_000_000, 900_000_000
#: A drawing shows this many times the face's longer side, so that crops can be shifted in it.
DRAWN_FACTOR = 2.65
DRAWN_PX = 160
_FRAMINGS = ((0.5, Framing.FULL), (0.75, Framing.HALF), (0.9, Framing.PORTRAIT))


def marked_person(random: np.random.Generator) -> Person:
    """Draw a person whose rare marks are not rare, those of a personal LoRA among them."""
    person = sample_person(random)
    draws = random.random(7)
    eyes = tuple(EYES)
    return replace(
        person,
        glasses=bool(draws[0] < 0.4),
        beard=not person.woman and bool(draws[1] < 0.5),
        freckles=bool(draws[2] < 0.35),
        mole=bool(draws[3] < 0.35),
        earrings=bool(draws[4] < (0.45 if person.woman else 0.1)),
        streak=bool(draws[5] < 0.2),
        other_eye=eyes[int(random.integers(len(eyes)))] if draws[6] < 0.2 else "",
        style=person.style if random.random() < 0.6 else _any_style(person, random),
    )


def _any_style(person: Person, random: np.random.Generator) -> str:
    styles = [style for style in STYLES if person.woman or style != "braids"]
    return styles[int(random.integers(len(styles)))]


def scene_around(person: Person, seed: int, *, alone: bool = False) -> tuple[Scene, int]:
    """Put a person into a drawn scene.

    Args:
        person: who.
        seed: of everything else.
        alone: without neighbours; else one scene in six has one.

    Returns:
        The scene, in which pose, place and neighbours are drawn by ``seed`` alone, and the
        person's index in it.
    """
    random = np.random.default_rng([seed, 2])
    draw = random.random()
    framing = next((kind for limit, kind in _FRAMINGS if draw < limit), Framing.FACE)
    people = 1 if random.random() < 0.8 or alone or framing is Framing.FACE else 2
    scene = sample_scene(seed, framing=framing, people=people)
    index = int(random.integers(people))
    return with_person(scene, person, index), index


def other_view(person: Person, seed: int) -> tuple[Scene, int]:
    """Put the same face into another scene, with another expression and other clothes."""
    random = np.random.default_rng([seed, 3])
    clothes = sample_person(random)
    names = ("top", "bottom", "top_colour", "bottom_colour", "striped")
    dressed = replace(person, **{name: getattr(clothes, name) for name in names})
    expression = EXPRESSIONS[int(random.integers(len(EXPRESSIONS)))]
    return scene_around(replace(dressed, expression=expression), seed)


def draw_face(scene: Scene, index: int, *, size: int = DRAWN_PX) -> Picture:
    """Draw the square around a person's face, `DRAWN_FACTOR` times its longer side."""
    return draw_scene(scene, view=face_view(scene, index, DRAWN_FACTOR), size=size)


def clean_crop(person: Person, seed: int) -> Pixels:
    """Draw a person alone in a scene and cut the face out, as the judge sees it at its best."""
    scene, index = scene_around(person, seed, alone=True)
    picture = draw_face(scene, index)
    return cut_face(picture.pixels, picture.faces[0].box)


def draw_elsewhere(scene: Scene, random: np.random.Generator, *, size: int = DRAWN_PX) -> Picture:
    """Draw a square of a scene that may show anything: sky, trees, clothes, legs, faces too."""
    side = 0.06 + 0.4 * random.random()
    x, y = random.random(2) * (1 - side)
    return draw_scene(scene, view=View(x=float(x), y=float(y), side=side), size=size)


def described_person(values: Values, random: np.random.Generator) -> Person:
    """Draw a person who looks as ``values`` say and, for the rest, like anyone.

    Glasses and a beard are nearly always named, so nobody unnamed has them; streak and eyes of
    two colours come from ``values`` alone.
    """
    anyone = sample_person(random)
    woman = values["gender"] == "woman" if "gender" in values else anyone.woman
    style = anyone.style if woman or anyone.style != "braids" else "short"
    eyes = values.get("left eye", anyone.eyes)
    right = values.get("right eye", eyes)
    return replace(
        anyone,
        woman=woman,
        hair=values.get("hair", anyone.hair),
        style=values.get("style", style),
        skin=values.get("skin", anyone.skin),
        eyes=eyes,
        other_eye=right if right != eyes else "",
        expression=values.get("expression", anyone.expression),
        glasses=values.get("glasses") == YES,
        beard=values.get("beard") == YES,
        streak=values.get("streak") == YES,
        freckles=_marked(values, "freckles", anyone.freckles),
        mole=_marked(values, "mole", anyone.mole),
        earrings=_marked(values, "earrings", anyone.earrings),
    )


def _marked(values: Values, mark: str, otherwise: bool) -> bool:
    return values[mark] == YES if mark in values else otherwise
