"""The face passes that are compared: the others' arithmetic, and all of them on one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.likeness.__main__ import main
from benchmarks.likeness.methods import (
    METHODS,
    blurred,
    grown_box_mask,
    grown_square,
    hard_latent_mask,
    laid_over,
    padded_square,
    webui_strength,
)
from benchmarks.likeness.metrics import changed_outside
from benchmarks.likeness.prompts import Group, Split, make_prompts
from benchmarks.likeness.studio import Base, Studio, Tuning
from closeup.detection import Face
from tests.paths import DEMO_LORAS

Box = tuple[float, float, float, float]


def _face(box: Box, score: float = 0.9) -> Face:
    x0, y0, x1, y1 = box
    shares = ((0.3, 0.4), (0.7, 0.4), (0.5, 0.6), (0.35, 0.8), (0.65, 0.8))
    a, b, c, d, e = ((x0 + u * (x1 - x0), y0 + v * (y1 - y0)) for u, v in shares)
    return Face(box=box, score=score, landmarks=(a, b, c, d, e))


# ----------------------------------------------------------------------------------- ADetailer


def test_box_mask_grows_by_half_the_kernel_when_dilated() -> None:
    mask = grown_box_mask(_face((20.7, 30.2, 39.9, 59.0)), (100, 100))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    # Drawn from 20 to 39 and from 30 to 59; a kernel of 4 has its anchor at 2.
    assert (columns[0], columns[-1]) == (20 - 1, 39 + 2)
    assert (rows[0], rows[-1]) == (30 - 1, 59 + 2)
    assert set(np.unique(mask)) == {0, 255}


def test_blur_reaches_ten_pixels_each_way_when_it_is_four() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[:, 50:] = 255
    row = blurred(mask, 4)[50].astype(int)
    # Kernel 2 * int(2.5 * 4 + 0.5) + 1 = 21; its outermost weights are too small for a byte.
    assert (row[:40] == 0).all()
    assert (row[60:] == 255).all()
    assert row[42] > 0
    assert row[57] < 255
    assert row[49] + row[50] == pytest.approx(255, abs=2)  # symmetric, two roundings


def test_area_is_the_padded_mask_made_square_when_there_is_room() -> None:
    mask = np.zeros((300, 300), np.uint8)
    mask[100:150, 100:130] = 255  # 30 wide, 50 high
    assert padded_square(mask, 32) == (58, 68, 172, 182)  # 114 a side


def test_area_moves_inward_when_it_would_leave_the_picture() -> None:
    mask = np.zeros((300, 300), np.uint8)
    mask[100:180, 0:20] = 255  # x from 0 to 52, y from 68 to 212: 144 high
    assert padded_square(mask, 32) == (0, 68, 144, 212)
    mask = np.zeros((100, 300), np.uint8)
    mask[20:80, 100:200] = 255  # 164 wide in a picture 100 high
    assert padded_square(mask, 32) == (68, 0, 232, 100)


def test_latent_mask_is_hard_when_the_mask_is_soft() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    latent = hard_latent_mask(blurred(mask, 4), (0, 0, 64, 64), 8)
    assert latent.shape == (1, 1, 8, 8)
    assert np.array_equal(latent[0, 0], np.tile([0, 0, 0, 0, 1, 1, 1, 1], (8, 1)))


@pytest.mark.parametrize(("steps", "run"), [(20, 9), (28, 12), (25, 11), (1, 1)])
def test_steps_are_one_more_than_the_share_when_counted_as_webui_does(steps: int, run: int) -> None:
    assert int(steps * webui_strength(0.4, steps)) == run


def test_patch_lies_only_under_its_share_when_laid_over() -> None:
    picture = np.full((40, 40, 3), 100, np.uint8)
    share = np.zeros((40, 40), np.float32)
    share[10:20, 10:20] = 1.0
    share[20, 10:20] = 0.5
    laid = laid_over(picture, np.ones((64, 64, 3), np.float32), (5, 5, 35, 35), share)
    assert (laid[10:20, 10:20] == 255).all()
    assert abs(laid[20, 10:20] - 177.5).max() <= 0.5  # half way between 100 and 255
    assert changed_outside(picture, laid, share > 0) == 0


# -------------------------------------------------------------------------------------- Astria


def test_square_is_the_longer_side_grown_when_there_is_room() -> None:
    assert grown_square(_face((100, 100, 140, 150)), (300, 300)) == (75, 80, 165, 170)


def test_square_stays_inside_when_the_face_is_in_a_corner() -> None:
    assert grown_square(_face((0, 0, 40, 50)), (300, 300)) == (0, 0, 90, 90)
    assert grown_square(_face((0, 0, 40, 50)), (60, 300)) == (0, 0, 60, 60)


# ----------------------------------------------------------------------------------------- all


@pytest.fixture(scope="module")
def painted(demo_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Studio, Base]:
    """A studio and a picture of two people, their faces where the picture's heads would be."""
    cache = tmp_path_factory.mktemp("bases")
    studio = Studio(demo_repository, DEMO_LORAS, cache)
    prompt = make_prompts(Split.TUNE, Group.CROWD, 1)[0]
    base = studio.paint([prompt])[0]
    again = studio.paint([prompt])[0]  # from the cache
    assert np.array_equal(base.picture, again.picture)
    assert len(list(cache.rglob("*.npz"))) == 1
    return studio, base


def test_base_is_enlarged_and_has_no_pass_when_painted(painted: tuple[Studio, Base]) -> None:
    _, base = painted
    assert base.enlarged in (2, 4)
    assert base.picture.std() > 10  # no blank
    assert np.array_equal(painted[0].repaint(METHODS["no pass"], base).result.pixels, base.picture)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "no pass"])
def test_bytes_change_only_under_the_mask_when_a_method_repaints(
    painted: tuple[Studio, Base], name: str
) -> None:
    studio, base = painted
    if not base.faces:
        pytest.skip("the committed weights give no face that the detector finds here")
    timed = studio.repaint(METHODS[name], base)
    result = timed.result
    assert result.faces == (1 if "Astria" in name else len(base.faces))
    assert changed_outside(base.picture, result.pixels, result.alpha > 0) == 0
    # And under it nearly every pixel is another: some channel changes where the mask is full.
    changed = (base.picture != result.pixels).any(-1)
    assert changed[result.alpha > 0.99].mean() > 0.8
    assert timed.wall_s > 0


def test_nothing_changes_when_the_pass_is_tuned_to_strength_zero(
    painted: tuple[Studio, Base],
) -> None:
    studio, base = painted
    timed = studio.repaint(METHODS["closeup"], base, Tuning(faces={"strength": 0.0}))
    assert np.array_equal(timed.result.pixels, base.picture)
    assert not timed.result.alpha.any()


def test_command_says_what_to_do_when_no_model_is_exported(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="python -m demo.run --export-only"):
        main(["--repository", str(tmp_path), "--no-write", "run"])


def test_command_refuses_when_a_sweep_has_a_wrong_value(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="steps: invalid literal"):
        main(["--repository", str(tmp_path), "sweep", "--parameter", "face_steps", "many"])
