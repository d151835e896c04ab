"""Who is in a scene and how it is framed: every attribute of the drawn world, and its sampling."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from demo.canvas import Colour

HAIR: dict[str, Colour] = {
    "black": (38, 32, 36),
    "brown": (110, 66, 36),
    "blonde": (232, 196, 104),
    "red": (188, 66, 28),
    "white": (226, 226, 230),
    "blue": (60, 110, 214),
}
SKIN: dict[str, Colour] = {
    "pale": (252, 222, 202),
    "tan": (232, 184, 144),
    "brown": (176, 118, 80),
    "dark": (112, 72, 50),
}
CLOTH: dict[str, Colour] = {
    "red": (206, 40, 46),
    "blue": (44, 92, 204),
    "green": (50, 152, 76),
    "yellow": (240, 200, 50),
    "purple": (132, 62, 176),
    "white": (240, 240, 242),
    "black": (44, 44, 50),
    "orange": (240, 130, 40),
}
EYES: dict[str, Colour] = {
    "brown": (104, 62, 30),
    "blue": (48, 120, 210),
    "green": (58, 150, 84),
}
STYLES = ("short", "long", "bun", "curly", "ponytail", "braids")
PLACES = ("park", "beach", "city", "studio", "night", "snow", "forest", "desert", "room")
EXPRESSIONS = ("smiling", "serious", "surprised")
TOPS = ("shirt", "sweater", "jacket")
BOTTOMS = ("trousers", "shorts", "skirt")
POSES = ("standing", "waving", "hands on hips", "walking")


class Framing(str, Enum):
    """How much of a person the picture shows."""

    FULL = "full"
    HALF = "half"
    PORTRAIT = "portrait"
    FACE = "face"


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """One person: what a caption may name, then what it never names.

    Attributes:
        woman: else a man.
        hair: key of HAIR.
        style: of STYLES.
        skin: key of SKIN.
        eyes: key of EYES.
        expression: of EXPRESSIONS.
        glasses: worn.
        beard: men only.
        freckles: on nose and cheeks.
        mole: on a cheek.
        earrings: worn.
        top: of TOPS, or "dress".
        bottom: of BOTTOMS, or "" with a dress.
        top_colour: key of CLOTH.
        bottom_colour: key of CLOTH.
        striped: the top has stripes.
        build: unnamed proportions in -1 to 1: jaw, eye distance, nose, brows, mouth, parting.
        streak: a white streak in the hair (the mark of a personal LoRA).
        other_eye: key of EYES of the second eye when the eyes differ, else "".
    """

    woman: bool
    hair: str
    style: str
    skin: str
    eyes: str
    expression: str
    glasses: bool = False
    beard: bool = False
    freckles: bool = False
    mole: bool = False
    earrings: bool = False
    top: str = "shirt"
    bottom: str = "trousers"
    top_colour: str = "blue"
    bottom_colour: str = "black"
    striped: bool = False
    build: tuple[float, float, float, float, float, float] = (0, 0, 0, 0, 0, 0)
    streak: bool = False
    other_eye: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where and how a person stands.

    Attributes:
        x: the head's centre in scene units.
        y: likewise.
        unit: half a head's height in scene units.
        tilt: of the head in radians.
        yaw: of the face, -0.14 to 0.14 of a unit.
        gaze: of the eyes, likewise.
        pose: of POSES.
        mirror: the pose's arm is the other one.
        stride: -1 to 1, of the feet.
        hem: length of a dress or skirt, 0 to 1.
    """

    x: float
    y: float
    unit: float
    tilt: float = 0.0
    yaw: float = 0.0
    gaze: float = 0.0
    pose: str = "standing"
    mirror: bool = False
    stride: float = 0.0
    hem: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Everything that a picture is drawn from.

    Attributes:
        people: one to three, each with a placement, from the back to the front.
        framing: of the whole scene.
        place: of PLACES.
        horizon: share of the height.
        zoom: size of things in the background.
        blur: of the background, share of the scene's side.
        background_seed: of the background's details.
    """

    people: tuple[tuple[Person, Placement], ...]
    framing: Framing
    place: str
    horizon: float
    zoom: float
    blur: float
    background_seed: int


def _pick(random: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(random.integers(len(names)))]


def _bell(random: np.random.Generator, width: float) -> float:
    """A value in -width to width, most often near 0, from exact arithmetic only."""
    return (random.random() + random.random() - 1) * width


def _sample_style(random: np.random.Generator, woman: bool) -> str:
    shares = (0.1, 0.32, 0.16, 0.16, 0.14, 0.12) if woman else (0.5, 0.14, 0.08, 0.24, 0.04, 0.0)
    draw, total = random.random(), 0.0
    for style, share in zip(STYLES, shares, strict=True):
        total += share
        if draw < total:
            return style
    return STYLES[0]


def sample_person(random: np.random.Generator) -> Person:
    """Draw one person's attributes."""
    woman = random.random() < 0.55
    style = _sample_style(random, woman)
    draw = random.random()
    expression = EXPRESSIONS[0 if draw < 0.5 else 1 if draw < 0.85 else 2]
    dress = woman and random.random() < 0.5
    top = "dress" if dress else _pick(random, ("shirt", *TOPS))
    bottom = "trousers" if random.random() < 0.6 else _pick(random, BOTTOMS if woman else TOPS_MEN)
    jaw, apart, nose, brows, mouth, parting = (random.random() * 2 - 1 for _ in range(6))
    return Person(
        woman=woman,
        hair=_pick(random, tuple(HAIR)),
        style=style,
        skin=_pick(random, tuple(SKIN)),
        eyes=_pick(random, tuple(EYES)),
        expression=expression,
        glasses=random.random() < 0.33,
        beard=not woman and random.random() < 0.4,
        freckles=random.random() < 0.12,
        mole=random.random() < 0.1,
        earrings=woman and random.random() < 0.3,
        top=top,
        bottom="" if dress else bottom,
        top_colour=_pick(random, tuple(CLOTH)),
        bottom_colour=_pick(random, tuple(CLOTH)),
        striped=random.random() < 0.12,
        build=(jaw, apart, nose, brows, mouth, parting),
    )


TOPS_MEN = ("trousers", "shorts")
_UNITS: dict[Framing, tuple[float, float]] = {
    Framing.FULL: (0.052, 0.072),
    Framing.HALF: (0.098, 0.128),
    Framing.PORTRAIT: (0.165, 0.225),
    Framing.FACE: (0.24, 0.38),
}


def _uniform(random: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * random.random()


def _place_head(random: np.random.Generator, framing: Framing) -> tuple[float, float, float]:
    """The head's centre and unit for one person alone."""
    unit = _uniform(random, *_UNITS[framing])
    if framing is Framing.FULL:
        x, y = _uniform(random, 0.36, 0.64), 0.5 - 5.15 * unit + _uniform(random, -0.02, 0.03)
    elif framing is Framing.HALF:
        x, y = _uniform(random, 0.4, 0.6), _uniform(random, 0.22, 0.28)
    elif framing is Framing.PORTRAIT:
        x, y = _uniform(random, 0.43, 0.57), _uniform(random, 0.37, 0.45)
    else:
        x, y = _uniform(random, 0.45, 0.55), _uniform(random, 0.44, 0.54)
    return x, y, unit


def _sample_placement(
    random: np.random.Generator, framing: Framing, index: int, people: int
) -> Placement:
    x, y, unit = _place_head(random, framing)
    if people > 1:
        unit *= 0.92 if framing is Framing.FULL else 0.78
        spread = 0.8 if people == 3 else {Framing.FULL: 0.56}.get(framing, 0.62)
        x = 0.5 + spread * ((index + 0.5) / people - 0.5) + _uniform(random, -0.03, 0.03)
        if framing is Framing.FULL:
            y = 0.5 - 5.15 * unit + _uniform(random, -0.01, 0.03)
    draw = random.random()
    pose = POSES[0 if draw < 0.5 else 1 if draw < 0.7 else 2 if draw < 0.85 else 3]
    if people > 1 and framing is not Framing.FULL:
        pose = "standing"
    return Placement(
        x=x,
        y=y,
        unit=unit,
        tilt=_bell(random, 0.17),
        yaw=_uniform(random, -0.14, 0.14),
        gaze=_uniform(random, -0.04, 0.04),
        pose=pose,
        mirror=random.random() < 0.5,
        stride=_uniform(random, -1, 1),
        hem=random.random(),
    )


def _sample_framing(random: np.random.Generator) -> Framing:
    draw = random.random()
    limits = ((0.36, Framing.FULL), (0.53, Framing.HALF), (0.74, Framing.PORTRAIT))
    return next((framing for limit, framing in limits if draw < limit), Framing.FACE)


def _sample_backdrop(random: np.random.Generator, framing: Framing) -> tuple[float, float, float]:
    """Horizon, zoom and blur that suit a framing."""
    if framing is Framing.FULL:
        return _uniform(random, 0.5, 0.62), 1.0, 0.0
    if framing is Framing.HALF:
        return _uniform(random, 0.55, 0.68), 1.3, 0.005
    if framing is Framing.PORTRAIT:
        return _uniform(random, 0.62, 0.8), 1.7, 0.012
    zoom = (1.6, 2.6, 4.0)[int(random.integers(3))]
    return _uniform(random, 0.6, 1.1), zoom, (0.0, 0.015, 0.02)[int(random.integers(3))]


def sample_scene(seed: int, *, framing: Framing | None = None, people: int | None = None) -> Scene:
    """Draw a scene from a seed.

    Args:
        seed: equal seeds (and arguments) give equal scenes.
        framing: fixed, or drawn when None.
        people: 1 to 3, or drawn when None (one in 86 of 100 scenes; a close-up shows one).

    Raises:
        ValueError: ``people`` is not 1, 2 or 3.
    """
    random = np.random.default_rng(seed)
    drawn = _sample_framing(random)
    framing = framing or drawn
    draw = random.random()
    if people is None:
        people = 1 if draw < 0.86 or framing is Framing.FACE else 2 if draw < 0.96 else 3
    if people not in (1, 2, 3):
        raise ValueError(f"people is {people}; a scene holds 1, 2 or 3.")
    if framing is not Framing.FULL:
        people = min(people, 2)
    group = tuple(
        (sample_person(random), _sample_placement(random, framing, index, people))
        for index in range(people)
    )
    horizon, zoom, blur = _sample_backdrop(random, framing)
    return Scene(
        people=group,
        framing=framing,
        place=_pick(random, PLACES),
        horizon=horizon,
        zoom=zoom,
        blur=blur,
        background_seed=int(random.integers(2**31)),
    )


def with_person(scene: Scene, person: Person, index: int = 0) -> Scene:
    """The same scene with another person in place ``index``."""
    people = list(scene.people)
    people[index] = (person, people[index][1])
    return replace(scene, people=tuple(people))
