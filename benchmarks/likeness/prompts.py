"""The benchmark's prompts: seeded, held out, with what each says of every face."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from benchmarks.likeness.wording import Values, named_values, values_of
from demo.attributes import Framing, Person, Scene, sample_scene, with_person
from demo.captions import describe_scene

#: Scenes from here on; every split has a million seeds a group. See demo/README.md for the others.
FIRST_SEED = 910_000_000
_SEEDS_A_SPLIT, _SEEDS_A_GROUP = 10_000_000, 1_000_000
LORA_TAG = "<lora:1795721:1.0> "


class Split(str, Enum):
    """What may be tuned on, and what is reported."""

    TUNE = "tune"
    REPORT = "report"


class Group(str, Enum):
    """Kinds of prompts."""

    LONG = "long shots"
    LORA = "personal LoRA"
    CROWD = "two or three people"
    CAPTION = "held-out captions"


COUNTS = {Group.LONG: 100, Group.LORA: 50, Group.CROWD: 30}


@dataclass(frozen=True, kw_only=True, slots=True)
class Character:
    """One person of a prompt.

    Attributes:
        truth: what is judged of the face.
        place: where the scene has the head, x and y in shares of the sides.
        person: who it is, where the prompt leaves nothing open (a personal LoRA).
    """

    truth: Values
    place: tuple[float, float]
    person: Person | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt and its people.

    Attributes:
        group: kind of prompt.
        seed: of the scene, and of the picture's noise.
        text: for the request.
        framing: how much of a person it asks for.
        people: from left to right.
    """

    group: Group
    seed: int
    text: str
    framing: Framing
    people: tuple[Character, ...]


def make_prompts(split: Split, group: Group, count: int) -> list[Prompt]:
    """Return the first ``count`` prompts of a group, always the same ones."""
    first = FIRST_SEED + _SEEDS_A_SPLIT * list(Split).index(split)
    first += _SEEDS_A_GROUP * list(Group).index(group)
    make = {Group.LONG: _long_shot, Group.LORA: _personal, Group.CROWD: _crowd}[group]
    return [make(seed) for seed in range(first, first + count)]


def scene_prompt(scene: Scene, seed: int, group: Group) -> Prompt:
    """Word a scene; only what the words say of a face is judged.

    Raises:
        ValueError: the wording names another number of people than the scene holds.
    """
    text = describe_scene(scene, np.random.default_rng(seed))
    truths = named_values(text)
    if len(truths) != len(scene.people):
        raise ValueError(
            f"{len(truths)} people were read from the caption of seed {seed}, which has "
            f"{len(scene.people)}: wording.named_values does not fit demo.captions."
        )
    people = tuple(
        Character(truth=truth, place=(placement.x, placement.y))
        for truth, (_, placement) in zip(truths, scene.people, strict=True)
    )
    return Prompt(group=group, seed=seed, text=text, framing=scene.framing, people=people)


def _long_shot(seed: int) -> Prompt:
    return scene_prompt(sample_scene(seed, framing=Framing.FULL, people=1), seed, Group.LONG)


def _crowd(seed: int) -> Prompt:
    people = 2 + seed % 2
    return scene_prompt(sample_scene(seed, framing=Framing.FULL, people=people), seed, Group.CROWD)


def _personal(seed: int) -> Prompt:
    # Imported late: it brings torch, diffusers and peft.
    from demo.train_lora import OHWX, personal_caption

    scene = sample_scene(seed, framing=Framing.FULL, people=1)
    drawn, placement = scene.people[0]
    scene = with_person(scene, replace(OHWX, top_colour=drawn.top_colour))
    truth = values_of(OHWX)
    del truth["expression"]  # her captions leave it open
    her = Character(truth=truth, place=(placement.x, placement.y), person=OHWX)
    text = LORA_TAG + personal_caption(scene)
    return Prompt(group=Group.LORA, seed=seed, text=text, framing=scene.framing, people=(her,))
