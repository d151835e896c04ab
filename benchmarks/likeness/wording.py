"""What is to be seen of a face: of a drawn person everything, of a prompt what it names. Pure."""

from __future__ import annotations

import re

from demo.attributes import EXPRESSIONS, EYES, HAIR, SKIN, STYLES, Person

Values = dict[str, str]

NO, YES = "no", "yes"
_MARK = (NO, YES)
MARKS = ("glasses", "beard", "freckles", "mole", "earrings", "streak")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "gender": ("man", "woman"),
    "hair": tuple(HAIR),
    "style": STYLES,
    "skin": tuple(SKIN),
    "left eye": tuple(EYES),
    "right eye": tuple(EYES),
    "expression": EXPRESSIONS,
    **dict.fromkeys(MARKS, _MARK),
}
"""Attribute -> its values. Eyes are named by their side in the picture."""

_PERSON = re.compile(rf"\ba (?:({'|'.join(EXPRESSIONS)}) )?(woman|man)\b")
_COLOURS = "|".join(HAIR)
_STYLED_HAIR = re.compile(rf"\b({'|'.join(STYLES)}) ({_COLOURS}) hair\b")
_TIED_HAIR = re.compile(rf"\b({_COLOURS}) (ponytail|braids)\b")
_HAIR = re.compile(rf"\b({_COLOURS}) hair\b")
_SKIN = re.compile(rf"\b({'|'.join(SKIN)}) skin\b")
_EYES = re.compile(rf"\b({'|'.join(EYES)}) eyes\b")
_NAMED_MARKS = re.compile(r"\b(glasses|beard|freckles|mole|earrings)\b")


def values_of(person: Person) -> Values:
    """Return what a clean drawing of a person shows; what it hides is left out.

    A beard covers the mole, and a white streak is not to be seen in white hair.
    """
    values = {
        "gender": "woman" if person.woman else "man",
        "hair": person.hair,
        "style": person.style,
        "skin": person.skin,
        "left eye": person.eyes,
        "right eye": person.other_eye or person.eyes,
        "expression": person.expression,
    }
    values |= {mark: YES if getattr(person, mark) else NO for mark in MARKS}
    if person.beard:
        del values["mole"]
    if person.hair == "white":
        del values["streak"]
    return values


def named_values(prompt: str) -> list[Values]:
    """Return what a prompt in the demo's grammar says of each person's face.

    Args:
        prompt: as `demo.captions` words it; what another grammar says is not found.

    Returns:
        One entry a person, in the order of the words, which is from left to right in the
        picture. Attributes that are not named are left out, and so is a mole under a beard.
    """
    people = list(_PERSON.finditer(prompt))
    ends = [match.start() for match in people[1:]] + [len(prompt)]
    return [
        _named(match, prompt[match.end() : end]) for match, end in zip(people, ends, strict=True)
    ]


def prompts_apart(prompt: str) -> list[str]:
    """Return a prompt of their own for each person of a prompt, from left to right.

    Args:
        prompt: as `demo.captions` words it.
    """
    people = list(_PERSON.finditer(prompt))
    opening = re.sub(r"(two|three) people, $", "", prompt[: people[0].start()])
    ends = [match.start() for match in people[1:]] + [len(prompt)]
    return [
        opening + re.sub(r"(,| and) $", "", prompt[match.start() : end])
        for match, end in zip(people, ends, strict=True)
    ]


def _named(person: re.Match[str], words: str) -> Values:
    values = {"gender": person[2]}
    if person[1]:
        values["expression"] = person[1]
    if styled := _STYLED_HAIR.search(words):
        values |= {"style": styled[1], "hair": styled[2]}
    elif tied := _TIED_HAIR.search(words):
        values |= {"style": tied[2], "hair": tied[1]}
    elif hair := _HAIR.search(words):
        values["hair"] = hair[1]
    if skin := _SKIN.search(words):
        values["skin"] = skin[1]
    if eyes := _EYES.search(words):
        values |= {"left eye": eyes[1], "right eye": eyes[1]}
    values |= dict.fromkeys(_NAMED_MARKS.findall(words), YES)
    if "beard" in values:
        values.pop("mole", None)
    return values
