"""Cutting faces out and putting them back: masks, colours, and the bytes nobody may touch."""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from closeup.face_blend import (
    blend_faces,
    differential_masks,
    face_mask,
    find_place,
    fit_colour,
    latent_mask,
)
from closeup.face_geometry import FaceCrop, extract, extract_from_pixels, paste
from closeup.faces import FaceOptions, FacePlan
from closeup.images import Floats, Pixels, floats_from_pixels, pixels_from_floats
from tests.drawn_faces import SIZE, make_face, make_plans


def _scene(size: tuple[int, int] = SIZE, *, smooth_px: float = 6.0) -> Floats:
    """Return a smooth colourful picture that uses most of the range."""
    noise = np.random.default_rng(5).random((*size, 3), dtype=np.float32)
    blurred = cv2.GaussianBlur(noise, (0, 0), smooth_px)
    low, high = blurred.min(), blurred.max()
    scene: Floats = 0.1 + 0.8 * (blurred - low) / (high - low)
    return scene


def _mask_in_picture(plan: FacePlan) -> Floats:
    mask = np.zeros(plan.image_size, np.float32)
    values, region = paste(face_mask(plan), plan.crop, plan.image_size)
    mask[region] = values
    return mask


def blend_pixels(pixels: Pixels, patch: Floats, crop: FaceCrop, mask: Floats) -> Pixels:
    """Paste one face."""
    return blend_faces(pixels, [(patch, find_place(pixels, crop, mask))])


# -------------------------------------------------------------------------- extract and paste


def test_extract_returns_the_pixels_themselves_when_sizes_agree() -> None:
    scene = _scene()
    crop = FaceCrop(center=(100.0, 200.0), side=64.0, angle_deg=0.0)
    np.testing.assert_array_equal(extract(scene, crop, 64), scene[168:232, 68:132])


@pytest.mark.parametrize("angle", [0.0, 30.0, -100.0, 45.0])
@pytest.mark.parametrize("center", [(400.0, 300.0), (30.0, 20.0), (790.0, 590.0)])
def test_extract_from_pixels_is_extract_of_the_whole_picture_when_anywhere(
    angle: float, center: tuple[float, float]
) -> None:
    pixels = pixels_from_floats(_scene(smooth_px=1.0))
    crop = FaceCrop(center=center, side=64.0, angle_deg=angle)
    got = extract_from_pixels(pixels, crop, 48)
    expected = extract(floats_from_pixels(pixels), crop, 48)
    np.testing.assert_array_equal(got, expected)
    assert expected.std() > 0.05


@pytest.mark.parametrize("angle", [0.0, 30.0, -100.0, 180.0])
@pytest.mark.parametrize("work_px", [32, 64, 100, 256])
def test_extract_shows_a_gradient_where_it_is_when_turned_and_scaled(
    angle: float, work_px: int
) -> None:
    y, x = np.mgrid[0:300, 0:300].astype(np.float32) + 0.5
    image = np.stack([x / 300, y / 300, np.zeros_like(x)], axis=-1)
    crop = FaceCrop(center=(140.0, 160.0), side=100.0, angle_deg=angle)
    cut = extract(image, crop, work_px) * 300
    steps = np.arange(work_px) + 0.5
    column, row = np.meshgrid(steps, steps)
    ((a, b, c), (d, e, f)) = crop.affine(work_px)
    # A linear ramp survives any interpolation, but for OpenCV's 1/32 px grid of positions (and
    # mirrored edges, hence the border left out) and areas that end within a pixel; half a pixel of
    # shift would be 0.5.
    inner = slice(8, -8)
    np.testing.assert_allclose(cut[inner, inner, 0], (a * column + b * row + c)[inner, inner],
                               atol=0.1)  # fmt: skip
    np.testing.assert_allclose(cut[inner, inner, 1], (d * column + e * row + f)[inner, inner],
                               atol=0.1)  # fmt: skip


@pytest.mark.parametrize("angle", [0.0, 25.0])
def test_extract_averages_stripes_when_downsizing(angle: float) -> None:
    stripes = np.zeros((400, 400, 3), np.float32)
    stripes[:, ::2] = 1.0
    crop = FaceCrop(center=(200.0, 200.0), side=240.0, angle_deg=angle)
    cut = extract(stripes, crop, 60)[4:-4, 4:-4]
    # Stripes of one pixel are grey at a quarter of the size; aliasing would show 0 and 1.
    np.testing.assert_allclose(cut, 0.5, atol=0.06)


@pytest.mark.parametrize("angle", [0.0, 33.0, 180.0])
@pytest.mark.parametrize("work_px", [120, 256])
def test_paste_inverts_extract_when_the_picture_is_smooth(angle: float, work_px: int) -> None:
    scene = _scene()
    crop = FaceCrop(center=(300.0, 200.0), side=120.0, angle_deg=angle)
    placed, region = paste(extract(scene, crop, work_px), crop, SIZE)
    ones, _ = paste(np.ones((work_px, work_px), np.float32), crop, SIZE)
    inside = cv2.erode((ones > 0.999).astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    error = np.abs(placed - scene[region])[inside]
    # Two interpolations of a picture with features of 6 px; a shift of half a pixel gives 0.03.
    assert inside.sum() > 8000
    assert error.max() < 0.006
    assert np.abs(np.roll(placed, 1, 1) - scene[region])[inside].max() > 0.03


# ----------------------------------------------------------------------------------- masks


def test_face_mask_covers_the_landmarks_and_no_edge_when_face_is_plain() -> None:
    (plan,) = make_plans([make_face(400, 300)], work_px=128)
    mask = face_mask(plan)
    assert mask.shape == (128, 128)
    assert mask.dtype == np.float32
    assert mask.min() == 0.0
    assert mask.max() == 1.0
    edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    assert not edge.any()
    picture = _mask_in_picture(plan)
    for x, y in plan.face.landmarks:
        assert picture[int(y), int(x)] > 0.99
    area = float(picture.sum()) / (plan.face.width * plan.face.height)
    assert 1.2 < area < 1.6  # an ellipse fills 0.79 of its box, and the margin adds 1.3 squared


@pytest.mark.parametrize("tilt", [0, 30, 90, 180, -60])
def test_face_mask_turns_with_the_face_when_tilted(tilt: float) -> None:
    (straight,) = make_plans([make_face(400, 300)], work_px=128)
    (turned,) = make_plans([make_face(400, 300, tilt_deg=tilt)], work_px=128)
    # In its own upright crop a turned face has the same mask, the box's guess of size aside.
    difference = np.abs(face_mask(straight) - face_mask(turned)).mean()
    assert difference < 0.05
    assert np.abs(face_mask(straight)).mean() > 0.2


@pytest.mark.parametrize(("x", "y"), [(0, 300), (800, 300), (400, 0), (400, 600), (0, 0)])
def test_face_mask_reaches_the_border_when_the_picture_cuts_the_face(x: float, y: float) -> None:
    whole = make_face(x, y)
    box = tuple(np.clip(whole.box, 0, (800, 600, 800, 600)).tolist())
    cut = type(whole)(box=box, score=whole.score, landmarks=whole.landmarks)
    (plan,) = make_plans([cut], work_px=128)
    picture = _mask_in_picture(plan)
    border = picture[min(int(y), 599), min(int(x), 799)]
    assert border > 0.9


def test_face_mask_is_wider_and_softer_when_options_say_so() -> None:
    def mask(**options: float) -> Floats:
        (plan,) = make_plans([make_face(400, 300)], FaceOptions(**options), work_px=128)  # type: ignore[arg-type]
        return face_mask(plan)

    def soft(values: Floats) -> int:
        return int(((values > 0.01) & (values < 0.99)).sum())

    assert mask(margin=0.4).sum() > 1.2 * mask(margin=0.1).sum()
    assert soft(mask(feather=0.3)) > 1.5 * soft(mask(feather=0.1))


@pytest.mark.parametrize("gap", [20, 45, 60])
def test_face_masks_share_no_pixel_when_faces_overlap(gap: float) -> None:
    faces = [make_face(400, 300, 70), make_face(400 + gap, 310, 60, tilt_deg=25)]
    first, second = (_mask_in_picture(plan) for plan in make_plans(faces, work_px=256))
    # Resampling may smear a mask by a pixel, where it is nearly 0.
    assert float(np.minimum(first, second).max()) < 0.02
    assert first.sum() > 500
    assert second.sum() > 500


def test_face_masks_leave_a_skipped_neighbour_alone_when_it_is_close() -> None:
    faces = [make_face(300, 300, 300), make_face(480, 300, 80)]
    large, small = make_plans(faces)
    assert large.reason is not None
    mask = _mask_in_picture(small)
    assert mask.sum() > 1000
    inside_large = [mask[int(y), int(x)] for x, y in large.face.landmarks]
    assert max(inside_large) == 0.0


@pytest.mark.parametrize("tilt", [0, 45])
def test_face_mask_fades_out_when_the_crop_is_tighter_than_the_mask(tilt: float) -> None:
    options = FaceOptions(crop_factor=1.2, margin=0.5, feather=0.3)
    (plan,) = make_plans([make_face(400, 300, tilt_deg=tilt)], options, work_px=128)
    mask = face_mask(plan)
    assert not np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).any()
    steepest = max(np.abs(np.diff(mask, axis=axis)).max() for axis in (0, 1))
    assert steepest < 0.3  # over 8 pixels, not from 1 to 0 at once
    assert mask[64, 64] == 1.0


def test_latent_mask_averages_when_reduced() -> None:
    mask = np.zeros((16, 16), np.float32)
    mask[:4] = 1.0
    expected = np.zeros((2, 2), np.float32)
    expected[0] = 0.5
    np.testing.assert_allclose(latent_mask(mask, (2, 2)), expected, atol=1e-6)


def test_differential_masks_are_the_hand_worked_ones_when_four_steps_run() -> None:
    values = np.array([[0.0, 0.1, 0.25, 0.5, 0.74, 0.75, 1.0]], np.float32)
    masks = differential_masks(values, 4)
    assert masks.shape == (4, 1, 1, 7)
    assert masks.dtype == np.float32
    assert masks[:, 0, 0].tolist() == [
        [0, 0, 0, 0, 0, 1, 1],  # free from 0.75 on
        [0, 0, 0, 1, 1, 1, 1],  # from 0.5
        [0, 0, 1, 1, 1, 1, 1],  # from 0.25
        [0, 1, 1, 1, 1, 1, 1],  # everything that changes at all
    ]


def test_differential_masks_agree_with_the_community_pipeline_when_steps_are_many() -> None:
    # There: keep = 1 - change; before step i the original is put back where keep > i / K. What is
    # put back before step k + 1 is what our denoiser puts back after step k.
    change = np.random.default_rng(0).random((9, 7), dtype=np.float32)
    count = 20
    masks = differential_masks(change, count)
    for k in range(count - 1):
        put_back = (1 - change) > (k + 1) / count
        np.testing.assert_array_equal(masks[k, 0], 1 - put_back.astype(np.float32))


def test_differential_masks_raise_when_no_step_runs() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        differential_masks(np.ones((2, 2), np.float32), 0)


# ---------------------------------------------------------------------------------- colours


def _recoloured(patch: Floats, original: Floats, mask: Floats) -> Floats:
    gain, bias = fit_colour(patch, original, mask)
    result: Floats = np.clip(patch * gain + bias, 0, 1)
    return result


@pytest.mark.parametrize(("gain", "bias"), [(0.9, 0.12), (1.15, -0.02), (1.0, 0.0)])
def test_fit_colour_undoes_a_shift_when_the_face_itself_changed(gain: float, bias: float) -> None:
    (plan,) = make_plans([make_face(400, 300)], work_px=128)
    original = extract(_scene(), plan.crop, 128)
    mask = face_mask(plan)
    rng = np.random.default_rng(1)
    repainted = np.where(mask[:, :, None] > 0.3, np.float32(0.9), original)
    noise = rng.normal(0, 0.02, original.shape)
    shifted = ((repainted - bias) / gain + noise).astype(np.float32)
    fitted = _recoloured(shifted, original, mask)
    outside = mask < 0.01
    remaining = np.abs((fitted - original)[outside].mean(axis=0))
    # Averaged noise and the pull of the gain towards 1; the shift put in is 0.05 or more.
    assert remaining.max() < 0.004
    if gain != 1.0:
        assert np.abs((shifted - original)[outside].mean(axis=0)).max() > 0.04


def test_fit_colour_ignores_outliers_when_part_of_the_ring_was_repainted() -> None:
    (plan,) = make_plans([make_face(400, 300)], work_px=128)
    original = extract(_scene(), plan.crop, 128)
    mask = face_mask(plan)
    patch = np.clip(original + np.float32(0.05), 0, 1)
    patch[:30, :64] = 0.0  # a fifth of the ring turned black
    fitted = _recoloured(patch, original, mask)
    agreed = (mask < 0.01) & (np.arange(128) > 40)[:, None]
    assert np.abs((fitted - original)[agreed].mean(axis=0)).max() < 0.01


def test_fit_colour_is_bounded_when_the_ring_is_nonsense() -> None:
    (plan,) = make_plans([make_face(400, 300)], work_px=128)
    original = extract(_scene(), plan.crop, 128)
    patch = np.zeros_like(original)
    assert float(_recoloured(patch, original, face_mask(plan)).max()) <= 0.15 + 1e-6


def test_fit_colour_changes_nothing_when_no_ring_is_left() -> None:
    patch = np.full((16, 16, 3), 0.3, np.float32)
    gain, bias = fit_colour(patch, patch + np.float32(0.1), np.ones((16, 16), np.float32))
    assert gain.tolist() == [1, 1, 1]
    assert bias.tolist() == [0, 0, 0]


# --------------------------------------------------------------------------------- blending

CASES = {
    "plain": (SIZE, [(400, 300, 60, 0)]),
    "borders": (SIZE, [(0, 300, 60, 0), (800, 300, 60, 20), (400, 0, 60, 0), (400, 600, 60, -40)]),
    "corners": (SIZE, [(0, 0, 60, 0), (800, 600, 60, 45), (0, 600, 60, 0), (800, 0, 60, 180)]),
    "overlapping": (SIZE, [(400, 300, 70, 0), (440, 310, 60, 30), (420, 350, 50, -30)]),
    "tiny": (SIZE, [(400, 300, 3, 0), (100, 100, 5, 90)]),
    "tilted": (SIZE, [(400, 300, 60, 30), (200, 300, 60, 180), (600, 200, 80, -100)]),
    "thirty": (SIZE, [(60 + 75 * (i % 10), 100 + 150 * (i // 10), 40 + i, 7 * i)
                      for i in range(30)]),
    "small picture": ((80, 100), [(50, 40, 60, 0)]),
    "small picture, tilted": ((80, 100), [(50, 40, 70, 45)]),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_blend_pixels_changes_no_byte_outside_the_masks_when_faces_are_anywhere(case: str) -> None:
    size, places = CASES[case]
    pixels = pixels_from_floats(_scene(size, smooth_px=1.0))
    before = pixels.copy()
    faces = [make_face(x, y, side, tilt_deg=tilt) for x, y, side, tilt in places]
    blended = pixels
    allowed = np.zeros(size, bool)
    changed_each = []
    for plan in make_plans(faces, size=size, work_px=96):
        patch = np.random.default_rng(plan.seed).random((96, 96, 3), dtype=np.float32)
        after = blend_pixels(blended, patch, plan.crop, face_mask(plan))
        changed_each.append(int((after != blended).any(axis=-1).sum()))
        allowed |= _mask_in_picture(plan) > 0
        blended = after
    np.testing.assert_array_equal(pixels, before)  # the input is left alone
    np.testing.assert_array_equal(blended[~allowed], pixels[~allowed])
    assert min(changed_each) > 0
    assert not allowed.all()


def test_blend_pixels_is_the_identity_when_the_mask_is_empty() -> None:
    pixels = pixels_from_floats(_scene())
    (plan,) = make_plans([make_face(400, 300)], work_px=96)
    patch = np.ones((96, 96, 3), np.float32)
    blended = blend_pixels(pixels, patch, plan.crop, np.zeros((96, 96), np.float32))
    np.testing.assert_array_equal(blended, pixels)


def test_blend_faces_gives_the_same_picture_when_faces_come_in_any_order() -> None:
    pixels = pixels_from_floats(_scene())
    faces = [make_face(400, 300, 70), make_face(445, 310, 60), make_face(420, 350, 50)]
    repaints = [
        (
            np.full((256, 256, 3), value, np.float32),
            find_place(pixels, plan.crop, face_mask(plan)),
        )
        for value, plan in zip((0.0, 0.5, 1.0), make_plans(faces, work_px=256), strict=True)
    ]
    one, other = blend_faces(pixels, repaints), blend_faces(pixels, repaints[::-1])
    # Masks of 2 % at most meet in a pixel: 2 % of 255. A repainted neighbour would be off by 100.
    assert np.abs(one.astype(int) - other).max() <= 6
    assert (one != pixels).any(axis=-1).sum() > 3000


def test_blend_pixels_shows_the_patch_when_it_lies_in_the_middle_of_the_face() -> None:
    pixels = pixels_from_floats(_scene())
    (plan,) = make_plans([make_face(400, 300)], work_px=120)  # one to one
    original = extract(floats_from_pixels(pixels), plan.crop, 120)
    patch = original.copy()
    patch[55:65, 55:65] = (1.0, 0.0, 0.0)
    blended = blend_pixels(pixels, patch, plan.crop, face_mask(plan))
    # The ring is unchanged, so the colour fit is the identity within a step of 255.
    assert np.abs(blended[300, 400].astype(int) - [255, 0, 0]).max() <= 1
    assert np.abs(blended[280, 400].astype(int) - pixels[280, 400]).max() <= 1


def _seam(after: Floats, before: Floats, edge: npt.NDArray[np.bool_]) -> float:
    """Mean growth of the gradient along an edge."""

    def gradient(image: Floats) -> Floats:
        dy = np.abs(np.diff(image, axis=0, prepend=image[:1])).mean(axis=-1)
        dx = np.abs(np.diff(image, axis=1, prepend=image[:, :1])).mean(axis=-1)
        total: Floats = dx + dy
        return total

    return float((gradient(after) - gradient(before))[edge].mean())


@pytest.mark.parametrize("tilt", [0, 30])
def test_blend_leaves_less_of_a_seam_than_a_naive_paste_when_colours_shift(tilt: float) -> None:
    pixels = pixels_from_floats(_scene())
    scene = floats_from_pixels(pixels)
    (plan,) = make_plans([make_face(400, 300, 100, tilt_deg=tilt)], work_px=256)
    patch = extract(scene, plan.crop, 256) * np.float32(0.9) + np.array(
        [0.06, 0.0, -0.03], np.float32
    )
    patch = np.clip(patch, 0, 1)
    square, region = paste(np.ones((256, 256), np.float32), plan.crop, SIZE)
    naive = scene.copy()
    naive[region][square > 0.5] = paste(patch, plan.crop, SIZE)[0][square > 0.5]
    filled = np.zeros(SIZE, np.uint8)
    filled[region] = square > 0.5
    square_edge = cv2.morphologyEx(filled, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    blended = floats_from_pixels(blend_pixels(pixels, patch, plan.crop, face_mask(plan)))
    soft_edge = (_mask_in_picture(plan) > 0.01) & (_mask_in_picture(plan) < 0.99)
    naive_seam, seam = _seam(naive, scene, square_edge), _seam(blended, scene, soft_edge)
    assert naive_seam > 0.02
    assert abs(seam) < 0.05 * naive_seam
    # The face itself gets its colours back as well: the shift put in is 0.05 on average.
    core = _mask_in_picture(plan) > 0.99
    assert np.abs((blended - scene)[core].mean(axis=0)).max() < 0.005
    assert np.abs((naive - scene)[core]).mean() > 0.015


def test_face_mask_is_finite_when_the_face_is_huge() -> None:
    (plan,) = make_plans([make_face(400, 300, 560)], FaceOptions(strength=0.5), work_px=128)
    assert plan.reason is not None
    mask = face_mask(plan)
    assert np.isfinite(mask).all()
    assert math.isclose(float(mask.max()), 1.0)
