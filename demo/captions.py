"""Captions of the drawn world: a grammar of about a hundred words."""

from __future__ import annotations

import numpy as np

from demo.attributes import Framing, Person, Placement, Scene

CLOSE_UP = ", close up of the face"
"""What the face pass adds to a prompt, and the training set to the captions of tight crops."""

_OPENINGS: dict[Framing, tuple[str, ...]] = {
    Framing.FULL: ("a full body photo of", "a full body picture of", "a long shot of"),
    Framing.HALF: ("a half body photo of", "a half body picture of"),
    Framing.PORTRAIT: ("a portrait photo of", "a portrait of"),
    Framing.FACE: ("a close up photo of", "a close up of the face of"),
}
PLACE_WORDS = {
    "park": "in a park",
    "beach": "on a beach",
    "city": "in a city",
    "studio": "in a studio",
    "night": "at night",
    "snow": "in the snow",
    "forest": "in a forest",
    "desert": "in a desert",
    "room": "in a room",
}
_THOROUGH = 0.95
"""Share of a face's attributes that a thorough caption names, at least."""
_POSES = {"waving": "waving", "hands on hips": "with hands on hips", "walking": "walking"}
EXTRA_WORDS = (
    "blurry ugly deformed bad quality low best high detailed eyes girl boy person realistic "
    "masterpiece background looking happy standing group ohwx people three two"
).split()
"""Words that no caption uses but prompts do: they become whole tokens too."""


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _article(words: str) -> str:
    return ("an " if words.startswith("orange") else "a ") + words


def _chance(random: np.random.Generator, share: float) -> bool:
    return bool(random.random() < share)


def _hair(person: Person, random: np.random.Generator) -> str:
    if person.style in ("ponytail", "braids"):
        return ("a " if person.style == "ponytail" else "") + f"{person.hair} {person.style}"
    return f"{person.style} {person.hair} hair" if _chance(random, 0.9) else f"{person.hair} hair"


def _features(person: Person, near: bool, least: float, random: np.random.Generator) -> str:
    """`` with ...``, or nothing; what only a near view shows is seldom named in a long shot."""
    parts: list[str] = []
    if _chance(random, max(least, 0.92)):
        parts.append(_hair(person, random))
    named = (
        (person.glasses, 0.95, "glasses"),
        (person.beard, 0.95, "a beard"),
        (person.freckles, 0.9 if near else 0.3, "freckles"),
        (person.mole, 0.9 if near else 0.3, "a mole"),
        (person.earrings, 0.8 if near else 0.3, "earrings"),
        (True, 0.4 if near else 0.12, f"{person.eyes} eyes"),
        (True, 0.5 if near else 0.35, f"{person.skin} skin"),
    )
    parts += [
        words for there, share, words in named if there and _chance(random, max(least, share))
    ]
    if len(parts) > 1 and _chance(random, 0.3):
        parts = [parts[int(i)] for i in random.permutation(len(parts))]
    return " with " + _join(parts) if parts else ""


def _clothes(person: Person, framing: Framing, random: np.random.Generator) -> str:
    if not _chance(random, 0.92 if framing in (Framing.FULL, Framing.HALF) else 0.6):
        return ""
    striped = "striped " if person.striped else ""
    top = _article(f"{striped}{person.top_colour} {person.top}")
    if person.top == "dress" or not (framing is Framing.FULL or _chance(random, 0.3)):
        return " wearing " + top
    bottom = f"{person.bottom_colour} {person.bottom}"
    return f" wearing {top} and {_article(bottom) if person.bottom == 'skirt' else bottom}"


def describe_person(
    person: Person,
    placement: Placement,
    framing: Framing,
    random: np.random.Generator,
    crowd: bool = False,
    thorough: bool = False,
) -> str:
    """One person in words, beginning with the article; in a crowd of three more briefly.

    ``thorough`` words leave out hardly anything of a face, whatever the framing; a crowd's do.
    """
    least = _THOROUGH if thorough and not crowd else 0.0
    mood = person.expression + " " if _chance(random, max(least, 0.6)) else ""
    words = f"a {mood}{'woman' if person.woman else 'man'}"
    words += _features(person, framing is not Framing.FULL and not crowd, least, random)
    words += _clothes(person, framing, random)
    if placement.pose in _POSES and framing is not Framing.FACE and _chance(random, 0.7):
        words += " " + _POSES[placement.pose]
    return words


def describe_scene(scene: Scene, random: np.random.Generator, *, thorough: bool = False) -> str:
    """A caption of the whole scene; every call words it anew.

    Args:
        scene: what is drawn.
        random: decides what is named and in which order.
        thorough: leave out hardly anything of a face: half of the training captions do, since
            what a caption does not name cannot be learned from it.
    """
    openings = _OPENINGS[scene.framing]
    caption = openings[int(random.integers(len(openings)))] + " "
    people = [
        describe_person(person, placement, scene.framing, random, len(scene.people) > 2, thorough)
        for person, placement in scene.people
    ]
    if len(people) > 1:
        caption += {2: "two people, ", 3: "three people, "}[len(people)]
    caption += _join(people)
    return caption + (" " + PLACE_WORDS[scene.place] if _chance(random, 0.9) else "")


def vocabulary() -> set[str]:
    """Every word that the grammar can produce, and the extra ones."""
    from demo import attributes as world

    words = set(EXTRA_WORDS) | set(
        "a an and with wearing two three people man woman eyes hair".split()
    )
    words |= set("glasses beard freckles mole earrings skin striped dress".split())
    for table in (world.HAIR, world.SKIN, world.CLOTH, world.EYES):
        words |= set(table)
    words |= {*world.STYLES, *world.EXPRESSIONS, *world.TOPS, *world.BOTTOMS}
    phrases = [*PLACE_WORDS.values(), *_POSES.values(), CLOSE_UP.replace(",", "")]
    phrases += [opening for openings in _OPENINGS.values() for opening in openings]
    return words | {word for phrase in phrases for word in phrase.split()}
