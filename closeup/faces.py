"""Which faces are repainted, how, and why the others are not.

:func:`plan_faces` decides; ``closeup.face_geometry`` cuts, ``closeup.face_blend`` puts back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from closeup.detection import Face
from closeup.face_geometry import FaceCrop, FaceShape, face_crop, face_shape

#: Side of the crop as a multiple of the face's, where neither request nor model says otherwise.
DEFAULT_CROP_FACTOR = 2.0
#: The strength curve, as observed of the service, and the range that we clamp it to.
STRENGTH_RANGE = (0.45, 0.65)
#: A face that the model painted with so many latents a side, or fewer, is lost: nothing of it is
#: worth keeping. From so many on it is not.
LOST_LATENTS, KEPT_LATENTS = 4.0, 8.0
#: A face whose middle lies in a larger face, with less than this share of its area, is taken for
#: a second detection of the same face.
DUPLICATE_AREA = 0.4
#: A face of which a request's mask leaves less than this share of the box is left alone.
LEAST_OPEN = 0.1
# Faces are told apart, for their seeds, by the cell of a grid over the picture they lie in.
_SEED_GRID = 32


class FaceOrder(str, Enum):
    """In which order faces are numbered, and so which go first when ``max_faces`` cuts."""

    AREA = "area"
    LEFT_RIGHT = "left_right"
    CENTER = "center"
    SCORE = "score"


class FaceAction(str, Enum):
    """What is done with a face."""

    REPAINT = "repaint"
    SKIP = "skip"


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceOptions:
    """What a request may say about the face pass. Lengths are fractions of the face.

    Attributes:
        max_faces: the most faces to repaint, at least 0; None repaints all.
        min_face_ratio: faces whose side is below this fraction of the largest face's are left
            alone; 0 to 1.
        crop_factor: side of the square that is repainted, as a multiple of the face's, 1.2 to 4;
            None takes the model's own.
        strength: how much is repainted, 0 to 1; None chooses by the face's size.
        feather: width of the mask's soft edge, 0 to 0.5.
        margin: how far beyond the face's box the mask reaches (hair, ears, chin), 0 to 1.
        upright: turn tilted faces upright for the model.
        order: the order of the faces.
    """

    max_faces: int | None = None
    min_face_ratio: float = 0.0
    crop_factor: float | None = None
    strength: float | None = None
    feather: float = 0.3
    margin: float = 0.3
    upright: bool = True
    order: FaceOrder = FaceOrder.AREA

    def __post_init__(self) -> None:
        _check_range("max_faces", self.max_faces, 0, 1000)
        _check_range("min_face_ratio", self.min_face_ratio, 0.0, 1.0)
        _check_range("crop_factor", self.crop_factor, 1.2, 4.0)
        _check_range("strength", self.strength, 0.0, 1.0)
        _check_range("feather", self.feather, 0.0, 0.5)
        _check_range("margin", self.margin, 0.0, 1.0)


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name} is {value}, expected {low} to {high}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceDefaults:
    """What the model says about the face pass, where the request is silent.

    Attributes:
        crop_factor: side of the square that is repainted, as a multiple of the face's.
        lost_strength: strength for faces of `LOST_LATENTS` latents a side or fewer; it goes over
            to the size's own until `KEPT_LATENTS`. None, or less than that, changes nothing: a
            model that was not trained on close-ups paints a second figure when it may.
        latent_px: pixels that a latent stands for, a side.
    """

    crop_factor: float = DEFAULT_CROP_FACTOR
    lost_strength: float | None = None
    latent_px: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class FacePlan:
    """What happens to one face.

    Attributes:
        index: its place in the order asked for, from 0.
        face: as detected.
        action: repaint or skip.
        reason: one sentence that says why it is skipped; None for a repaint.
        strength: share of the denoising that is redone, 0 to 1.
        seed: of its noise, 0 to 2^32 - 1.
        crop: the square to repaint.
        shape: the outline of its mask.
        neighbours: the outlines of all other faces, whose pixels are theirs.
        feather_px: width of the mask's soft edge, px of the picture.
        image_size: (height, width) of the picture, px.
        work_px: side of the square that the model paints, px.
    """

    index: int
    face: Face
    action: FaceAction
    reason: str | None
    strength: float
    seed: int
    crop: FaceCrop
    shape: FaceShape
    neighbours: tuple[FaceShape, ...]
    feather_px: float
    image_size: tuple[int, int]
    work_px: int


def plan_faces(
    faces: Sequence[Face],
    *,
    image_size: tuple[int, int],
    work_px: int,
    options: FaceOptions,
    seed: int,
    defaults: FaceDefaults | None = None,
    enlarged: float = 1.0,
    open_share: Callable[[Face], float] | None = None,
    count_steps: Callable[[FacePlan], int] | None = None,
) -> list[FacePlan]:
    """Decide what happens to each face of a picture.

    Neither the order nor a face's seed, crop and strength depends on the order of detection, and
    the last three do not depend on which other faces there are.

    Args:
        faces: as detected, in the coordinates of the picture to repaint.
        image_size: (height, width) of that picture, px.
        work_px: side of the square that the model paints, px (its native size).
        options: the request's wishes.
        seed: the picture's seed.
        defaults: the model's own, used where the request is silent; None takes `FaceDefaults`'s.
        enlarged: how much super-resolution has enlarged each side. A face is skipped when the
            model painted its crop with as many pixels as a repaint would have, so what counts
            is its size before.
        open_share: says how much of a face's box the request lets be repainted, 0 to 1; None
            lets all. What is left alone for it is neither the largest face nor one of
            ``max_faces``.
        count_steps: says how many steps a face's strength leaves of the schedule; None leaves
            enough.

    Returns:
        One plan a face, in the order asked for.
    """
    defaults = defaults or FaceDefaults()
    ordered = sorted(faces, key=lambda face: _order_key(face, options.order, image_size))
    duplicates = {i for i, face in enumerate(ordered) if _is_duplicate(face, ordered)}
    shapes = [face_shape(face, image_size, margin=options.margin) for face in ordered]
    plans = []
    for i, face in enumerate(ordered):
        others = (s for j, s in enumerate(shapes) if j != i and j not in duplicates)
        plan = FacePlan(
            index=i,
            face=face,
            action=FaceAction.REPAINT,
            reason=None,
            strength=_strength(face, image_size, options, defaults, enlarged),
            seed=face_seed(seed, face, image_size),
            crop=face_crop(
                face,
                image_size,
                crop_factor=options.crop_factor or defaults.crop_factor,
                upright=options.upright,
            ),
            shape=shapes[i],
            neighbours=() if i in duplicates else tuple(others),
            feather_px=options.feather * face.side,
            image_size=image_size,
            work_px=work_px,
        )
        plans.append(plan)
    reasons: dict[int, str] = {}
    for plan in plans:
        if plan.index in duplicates:
            reasons[plan.index] = (
                "It lies inside a larger face and is taken for a second detection of it."
            )
        elif open_share and open_share(plan.face) < LEAST_OPEN:
            reasons[plan.index] = "It lies outside mask_image."
    largest = max((p.face.side for p in plans if p.index not in reasons), default=0.0)
    for plan in plans:
        reason = reasons.get(plan.index) or _skip_reason(plan, largest, options, enlarged)
        if not reason and count_steps and not count_steps(plan):
            reason = "Its strength times face_steps is below one step."
        if reason:
            reasons[plan.index] = reason
    return _with_actions(plans, reasons, options)


def _with_actions(
    plans: Sequence[FacePlan], reasons: Mapping[int, str], options: FaceOptions
) -> list[FacePlan]:
    """Skip the faces with a reason, and those past ``max_faces``."""
    decided = []
    repainted = 0
    for plan in plans:
        reason = reasons.get(plan.index)
        if reason is None and options.max_faces is not None and repainted >= options.max_faces:
            reason = f"{repainted} faces before it reach the limit max_faces={options.max_faces}."
        if reason is None:
            repainted += 1
            decided.append(plan)
        else:
            decided.append(replace(plan, action=FaceAction.SKIP, reason=reason))
    return decided


def _skip_reason(
    plan: FacePlan, largest: float, options: FaceOptions, enlarged: float
) -> str | None:
    if plan.strength == 0:
        return "Strength 0 changes nothing."
    ratio = plan.face.side / largest
    if ratio < options.min_face_ratio:
        return (
            f"Its side is {ratio:.2f} of the largest face's, "
            f"below min_face_ratio={options.min_face_ratio:g}."
        )
    if plan.crop.side / enlarged >= plan.work_px:
        side = round(plan.crop.side / enlarged)
        return (
            f"The model has painted its crop with {side}x{side} px already, and would again with "
            f"{plan.work_px}x{plan.work_px}: repainting would add no detail."
        )
    return None


def _order_key(face: Face, order: FaceOrder, image_size: tuple[int, int]) -> tuple[float, ...]:
    x, y = face.center
    area = face.width * face.height
    if order is FaceOrder.AREA:
        first = -area
    elif order is FaceOrder.LEFT_RIGHT:
        first = x
    elif order is FaceOrder.CENTER:
        first = (x - image_size[1] / 2) ** 2 + (y - image_size[0] / 2) ** 2
    else:
        first = -face.score
    # The rest only breaks ties, so that the order never depends on that of detection.
    return (first, x, y, -area, -face.score)


def _is_duplicate(face: Face, faces: Sequence[Face]) -> bool:
    x, y = face.center
    area = face.width * face.height
    return any(
        other.box[0] < x < other.box[2]
        and other.box[1] < y < other.box[3]
        and area < DUPLICATE_AREA * other.width * other.height
        for other in faces
    )


def _strength(
    face: Face,
    image_size: tuple[int, int],
    options: FaceOptions,
    defaults: FaceDefaults,
    enlarged: float,
) -> float:
    latents = face.side / enlarged / defaults.latent_px
    own = face_strength(face, image_size, options.strength)
    if options.strength is not None or defaults.lost_strength is None:
        return own
    share = (KEPT_LATENTS - latents) / (KEPT_LATENTS - LOST_LATENTS)
    return own + min(max(share, 0.0), 1.0) * max(0.0, defaults.lost_strength - own)


def face_strength(face: Face, image_size: tuple[int, int], given: float | None) -> float:
    """Return how much of a face is repainted: less, the larger it is.

    ``0.4 + 0.2 (1 - min(1, (r - 0.03) / 0.10))`` with r the share of the picture that its box
    takes, clamped to 0.45-0.65; below r = 0.03 the curve goes on rising until the clamp.

    Args:
        face: as detected.
        image_size: (height, width) of the picture, px.
        given: the request's own strength, which wins.
    """
    if given is not None:
        return given
    share = face.width * face.height / (image_size[0] * image_size[1])
    curve = 0.4 + 0.2 * (1.0 - min(1.0, (share - 0.03) / 0.10))
    return min(max(curve, STRENGTH_RANGE[0]), STRENGTH_RANGE[1])


def face_seed(seed: int, face: Face, image_size: tuple[int, int]) -> int:
    """Return the seed of a face's noise, from the picture's seed and the face's place alone.

    The place is the cell of a 32x32 grid that holds the middle of its box, so that neither small
    differences in detection (mostly) nor other faces change it. Two faces in one cell share it.

    Returns:
        0 to 2^32 - 1.
    """
    column = int(face.center[0] / image_size[1] * _SEED_GRID)
    row = int(face.center[1] / image_size[0] * _SEED_GRID)
    digest = hashlib.sha256(f"face {seed} {column} {row}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def face_report(plan: FacePlan, prompt: int | None) -> dict[str, Any]:
    """Return what ``info`` says of one face: plain numbers and strings, px of the picture.

    Args:
        plan: of the face.
        prompt: which of the face prompts it was repainted with, from 0; None for a skipped one.
    """
    return {
        "index": plan.index,
        "box": [round(value, 1) for value in plan.face.box],
        "score": round(plan.face.score, 4),
        "landmarks": [[round(x, 1), round(y, 1)] for x, y in plan.face.landmarks],
        "action": plan.action.value,
        "reason": plan.reason,
        "strength": round(plan.strength, 4),
        "seed": plan.seed,
        "prompt": prompt,
        "crop": {
            "center": [round(value, 1) for value in plan.crop.center],
            "side": round(plan.crop.side, 1),
            "angle_deg": round(plan.crop.angle_deg, 1),
            "work_px": plan.work_px,
        },
    }
