"""Which faces are repainted: order, limits, strength, seeds, and where the crops lie."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from closeup.detection import Face
from closeup.face_geometry import face_angle_deg, face_crop
from closeup.faces import (
    FaceAction,
    FaceDefaults,
    FaceOptions,
    FaceOrder,
    FacePlan,
    face_report,
    face_seed,
    face_strength,
    plan_faces,
)
from tests.drawn_faces import SIZE, make_face, make_plans


def _repainted(plans: list[FacePlan]) -> list[int]:
    return [plan.index for plan in plans if plan.action is FaceAction.REPAINT]


def _corners(plan: FacePlan) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    unit = np.array([[0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]])
    return np.asarray(unit @ plan.crop.affine(1).T)


# ------------------------------------------------------------------------------- selection


def test_plan_faces_is_empty_when_there_is_no_face() -> None:
    assert make_plans([]) == []


def test_plan_faces_repaints_every_face_when_there_are_thirty() -> None:
    faces = [make_face(60 + 75 * (i % 10), 100 + 150 * (i // 10), 40 + i) for i in range(30)]
    plans = make_plans(faces)
    assert _repainted(plans) == list(range(30))
    assert len({plan.seed for plan in plans}) == 30
    sides = [plan.face.side for plan in plans]
    assert sides == sorted(sides, reverse=True)


@pytest.mark.parametrize("order", list(FaceOrder))
def test_plan_faces_gives_one_order_when_detection_order_differs(order: FaceOrder) -> None:
    rng = np.random.default_rng(0)
    faces = [make_face(100 + 100 * i, 300, 60, score=0.9) for i in range(6)]  # ties everywhere
    expected = make_plans(faces, FaceOptions(order=order))
    for _ in range(5):
        shuffled = [faces[i] for i in rng.permutation(6)]
        assert make_plans(shuffled, FaceOptions(order=order)) == expected


def test_plan_faces_orders_as_asked_when_faces_differ() -> None:
    faces = [
        make_face(700, 300, 80, score=0.7),
        make_face(100, 300, 50, score=0.8),
        make_face(390, 310, 60, score=0.95),
    ]

    def xs(order: FaceOrder) -> list[float]:
        return [round(p.face.center[0]) for p in make_plans(faces, FaceOptions(order=order))]

    assert xs(FaceOrder.AREA) == [700, 390, 100]
    assert xs(FaceOrder.LEFT_RIGHT) == [100, 390, 700]
    assert xs(FaceOrder.CENTER) == [390, 100, 700]
    assert xs(FaceOrder.SCORE) == [390, 100, 700]


def test_plan_faces_skips_the_rest_when_max_faces_is_reached() -> None:
    faces = [make_face(100 + 100 * i, 300, 50 + i) for i in range(4)]
    plans = make_plans(faces, FaceOptions(max_faces=2))
    assert _repainted(plans) == [0, 1]
    assert "max_faces=2" in str(plans[3].reason)
    assert _repainted(make_plans(faces, FaceOptions(max_faces=0))) == []


def test_plan_faces_counts_only_repaints_when_a_large_face_is_skipped() -> None:
    faces = [make_face(300, 300, 300), make_face(600, 100, 60), make_face(700, 400, 50)]
    plans = make_plans(faces, FaceOptions(max_faces=1))
    assert _repainted(plans) == [1]
    assert "would add no detail" in str(plans[0].reason)


def test_plan_faces_skips_when_too_small_beside_the_largest() -> None:
    faces = [make_face(200, 300, 100), make_face(500, 300, 50.5), make_face(600, 300, 49.5)]
    plans = make_plans(faces, FaceOptions(min_face_ratio=0.5))
    assert _repainted(plans) == [0, 1]
    assert "min_face_ratio=0.5" in str(plans[2].reason)


@pytest.mark.parametrize(("side", "action"), [(127, "repaint"), (128, "skip"), (250, "skip")])
def test_plan_faces_skips_when_the_crop_has_the_models_pixels(side: int, action: str) -> None:
    (plan,) = make_plans([make_face(400, 300, side)], work_px=256)
    assert plan.action.value == action
    assert (plan.reason is None) == (action == "repaint")


def test_plan_faces_skips_when_strength_is_zero() -> None:
    (plan,) = make_plans([make_face(400, 300)], FaceOptions(strength=0.0))
    assert plan.action is FaceAction.SKIP
    assert "Strength 0" in str(plan.reason)


def test_plan_faces_skips_a_second_detection_when_it_lies_in_a_larger_face() -> None:
    faces = [make_face(300, 300, 120), make_face(310, 320, 40)]
    plans = make_plans(faces)
    assert _repainted(plans) == [0]
    assert "second detection" in str(plans[1].reason)
    assert plans[0].neighbours == ()


@pytest.mark.parametrize(
    "bad",
    [{"max_faces": -1}, {"crop_factor": 1.0}, {"strength": 1.1}, {"feather": 0.6}, {"margin": -1.0},
     {"min_face_ratio": math.nan}],
)  # fmt: skip
def test_face_options_raise_when_out_of_range(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
        FaceOptions(**bad)  # type: ignore[arg-type]


# ------------------------------------------------------------------------- strength and seed


@pytest.mark.parametrize(
    ("share", "strength"),
    [(0.0001, 0.65), (0.005, 0.65), (0.01, 0.64), (0.03, 0.6), (0.08, 0.5), (0.105, 0.45),
     (0.13, 0.45), (0.9, 0.45)],
)  # fmt: skip
def test_face_strength_follows_the_curve_when_faces_grow(share: float, strength: float) -> None:
    side = math.sqrt(share * 1_000_000)
    face = Face(box=(0, 0, side, side), score=1.0, landmarks=((0.0, 0.0),) * 5)
    assert face_strength(face, (1000, 1000), None) == pytest.approx(strength, abs=1e-9)
    assert face_strength(face, (1000, 1000), 0.3) == 0.3


@pytest.mark.parametrize(
    ("side_px", "strength"),
    # Of 24 to 64 px a side before enlarging by 4: 3 to 8 latents. 0.65 is the curve's here.
    [(96, 0.85), (128, 0.85), (192, 0.75), (256, 0.65)],
)
def test_lost_faces_are_repainted_more_when_the_model_says_so(
    side_px: float, strength: float
) -> None:
    def planned(**options: float) -> float:
        (plan,) = plan_faces(
            [make_face(2000, 2000, side_px)],
            image_size=(4000, 4000),
            work_px=512,
            options=FaceOptions(**options),  # type: ignore[arg-type]
            seed=7,
            defaults=FaceDefaults(lost_strength=0.85),
            enlarged=4.0,
        )
        return plan.strength

    assert planned() == pytest.approx(strength, abs=1e-9)
    assert planned(strength=0.3) == 0.3


def test_plan_faces_keeps_seed_strength_and_crop_when_a_face_is_added() -> None:
    faces = [make_face(200, 300), make_face(500, 200, 50)]
    before = {plan.face: plan for plan in make_plans(faces)}
    after = {plan.face: plan for plan in make_plans([make_face(650, 450, 90), *faces])}
    for face in faces:
        assert before[face].seed == after[face].seed
        assert before[face].strength == after[face].strength
        assert before[face].crop == after[face].crop


def test_face_seed_stays_when_the_box_moves_a_little_and_size_changes() -> None:
    face = make_face(212.5, 309.4)  # the middle of a cell: 800/32 = 25 by 600/32 = 18.75 px
    assert face_seed(7, face, SIZE) == face_seed(7, make_face(214, 311, 63), SIZE)
    assert face_seed(7, face, SIZE) != face_seed(8, face, SIZE)
    assert face_seed(7, face, SIZE) != face_seed(7, make_face(245, 309.4), SIZE)
    enlarged = make_face(425, 618.8, 120)
    assert face_seed(7, face, SIZE) == face_seed(7, enlarged, (1200, 1600))


def test_face_seed_is_this_number_when_computed_anywhere() -> None:
    # sha256("face 7 8 16"), first four bytes: pinned, since seeds are a promise between versions.
    assert face_seed(7, make_face(212.5, 309.4), SIZE) == 0xCB4236AA


# ------------------------------------------------------------------------------------ crops


@pytest.mark.parametrize(
    ("x", "y", "corner"),
    [(10, 300, (0, 240)), (790, 300, (680, 240)), (400, 5, (340, 0)), (400, 595, (340, 480)),
     (0, 0, (0, 0)), (800, 0, (680, 0)), (0, 600, (0, 480)), (800, 600, (680, 480))],
)  # fmt: skip
def test_plan_faces_moves_the_crop_inward_when_a_face_is_at_a_border(
    x: float, y: float, corner: tuple[int, int]
) -> None:
    (plan,) = make_plans([make_face(x, y)])
    assert plan.crop.side == 120
    assert _corners(plan)[0].tolist() == list(corner)


def test_plan_faces_takes_the_crop_factor_of_the_request_when_it_has_one() -> None:
    def side(options: FaceOptions) -> float:
        (plan,) = plan_faces(
            [make_face(400, 300)],
            image_size=SIZE,
            work_px=512,
            options=options,
            seed=7,
            defaults=FaceDefaults(crop_factor=1.5),
        )
        return plan.crop.side

    assert side(FaceOptions()) == 90
    assert side(FaceOptions(crop_factor=3.0)) == 180


def test_plan_faces_shrinks_the_crop_when_the_picture_is_smaller() -> None:
    (plan,) = make_plans([make_face(50, 40, 60)], size=(80, 100))
    assert plan.crop.side == 80
    assert _corners(plan).min() >= 0


@pytest.mark.parametrize("side", [0.5, 1.0, 3.0])
def test_plan_faces_gives_a_crop_of_some_pixels_when_a_face_is_tiny(side: float) -> None:
    (plan,) = make_plans([make_face(400, 300, side)])
    assert plan.crop.side == 8


@pytest.mark.parametrize("tilt", [-170, -90, -30, -9, 9, 30, 45, 90, 180])
@pytest.mark.parametrize("place", [(400, 300), (70, 60), (740, 545), (400, 45)])
def test_plan_faces_turns_the_crop_inside_the_picture_when_a_face_is_tilted(
    tilt: float, place: tuple[float, float]
) -> None:
    (plan,) = make_plans([make_face(*place, tilt_deg=tilt)])
    assert math.cos(math.radians(plan.crop.angle_deg - tilt)) == pytest.approx(1, abs=1e-9)
    corners = _corners(plan)
    assert corners.min() >= -1e-6
    assert (corners[:, 0] <= 800 + 1e-6).all()
    assert (corners[:, 1] <= 600 + 1e-6).all()
    # The eyes come out level: the map's inverse takes both to one row.
    inverse = np.linalg.inv(np.vstack([plan.crop.affine(512), [0, 0, 1]]))
    right, left = (inverse @ [*point, 1] for point in plan.face.landmarks[:2])
    assert right[1] == pytest.approx(left[1], abs=1e-6)
    assert left[0] > right[0]


@pytest.mark.parametrize("tilt", [-7.5, 0.0, 7.5])
def test_plan_faces_leaves_the_crop_straight_when_tilt_is_small(tilt: float) -> None:
    (plan,) = make_plans([make_face(400, 300, tilt_deg=tilt)])
    assert plan.crop.angle_deg == 0.0


@pytest.mark.parametrize("place", [(0, 0), (795, 595), (5, 590)])
def test_plan_faces_leaves_the_crop_straight_when_turning_would_lose_the_face(
    place: tuple[float, float],
) -> None:
    (plan,) = make_plans([make_face(*place, tilt_deg=45)])
    assert plan.crop.angle_deg == 0.0
    corners = _corners(plan)
    assert corners[0, 0] <= place[0] <= corners[2, 0]
    assert corners[0, 1] <= place[1] <= corners[2, 1]


def test_face_crop_stays_straight_when_upright_is_off() -> None:
    face = make_face(400, 300, tilt_deg=40)
    assert face_crop(face, SIZE, crop_factor=2, upright=False).angle_deg == 0.0


def test_face_angle_uses_the_mouth_when_a_profile_hides_an_eye() -> None:
    points = ((100.0, 100.0), (101.0, 103.0), (90.0, 110.0), (99.0, 130.0), (100.0, 130.0))
    profile = Face(box=(70, 80, 130, 140), score=0.8, landmarks=points)
    assert abs(face_angle_deg(profile)) < 5  # the line through the eyes says 72
    nowhere = Face(box=(70, 80, 130, 140), score=0.8, landmarks=((100.0, 100.0),) * 5)
    assert face_angle_deg(nowhere) == 0.0


def test_plan_faces_keeps_the_face_in_the_crop_when_huge_and_tilted() -> None:
    face = make_face(50, 50, 90, tilt_deg=45)
    (plan,) = make_plans([face], size=(100, 100))
    assert plan.crop.side == pytest.approx(100, abs=15)
    assert plan.crop.side <= 100


def test_face_report_is_json_when_written() -> None:
    plans = make_plans([make_face(400, 300, tilt_deg=30), make_face(100, 100, 300)])
    reports = json.loads(json.dumps([face_report(plan, None) for plan in plans]))
    assert [report["action"] for report in reports] == ["skip", "repaint"]
    assert reports[1]["reason"] is None
    assert reports[1]["crop"]["angle_deg"] == 30.0
    assert reports[1]["seed"] == plans[1].seed
    assert len(reports[1]["landmarks"]) == 5
