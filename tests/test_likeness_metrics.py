"""The likeness benchmark's arithmetic: wording, matching, metrics, tables, detector counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.likeness.compare import (
    FaceResult,
    Likeness,
    PictureResult,
    Results,
)
from benchmarks.likeness.crops import cut_face
from benchmarks.likeness.detector import (
    Count,
    count_matches,
    merge_boxes,
    overlap,
    read_truth,
    total,
    write_truth,
)
from benchmarks.likeness.matching import match_faces
from benchmarks.likeness.metrics import (
    Outcome,
    box_area,
    changed_outside,
    outcome_of,
    seam_score,
)
from benchmarks.likeness.prompts import COUNTS, Group, Split, make_prompts
from benchmarks.likeness.sweeps import make_tuning
from benchmarks.likeness.tables import (
    attribute_section,
    attribute_share,
    behind,
    group_section,
    mean_cosine,
    method_row,
)
from benchmarks.likeness.wording import ATTRIBUTES, named_values, prompts_apart, values_of
from demo.attributes import Framing, Person, sample_scene
from demo.captions import describe_scene

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# ------------------------------------------------------------------------------------- wording


def test_prompt_gives_every_person_in_order_when_it_names_several() -> None:
    prompt = (
        "a long shot of two people, a surprised man with braids, a beard and dark skin wearing a "
        "black shirt and a woman with a mole, long white hair, green eyes and glasses in a park"
    )
    assert named_values(prompt) == [
        {"gender": "man", "expression": "surprised", "skin": "dark", "beard": "yes"},
        {
            "gender": "woman", "style": "long", "hair": "white", "left eye": "green",
            "right eye": "green", "glasses": "yes", "mole": "yes",
        },
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a red ponytail", {"style": "ponytail", "hair": "red"}),
        ("blue braids", {"style": "braids", "hair": "blue"}),
        ("brown hair", {"hair": "brown"}),
        ("a beard and a mole", {"beard": "yes"}),  # which the beard covers
    ],
)
def test_prompt_gives_hair_and_marks_when_worded_either_way(
    words: str, expected: dict[str, str]
) -> None:
    named = named_values(f"a portrait of a man with {words} wearing a black shirt")
    assert named == [{"gender": "man", **expected}]


def test_captions_are_read_back_when_the_grammar_words_drawn_people() -> None:
    named = 0
    for seed in range(300):
        scene = sample_scene(seed)
        read = named_values(describe_scene(scene, np.random.default_rng(seed)))
        assert len(read) == len(scene.people)
        for values, (person, _) in zip(read, scene.people, strict=True):
            named += len(values)
            truth = values_of(person)
            assert values.items() <= truth.items()
    assert named > 3 * 300  # gender, hair colour and style at least, most of the time


def test_people_get_prompts_of_their_own_when_a_prompt_names_several() -> None:
    assert prompts_apart(
        "a long shot of three people, a smiling woman with red braids, a man and a woman with "
        "glasses and a beard wearing a green dress at night"
    ) == [
        "a long shot of a smiling woman with red braids",
        "a long shot of a man",
        "a long shot of a woman with glasses and a beard wearing a green dress at night",
    ]
    for prompt in make_prompts(Split.REPORT, Group.CROWD, 20):
        apart = [named_values(words) for words in prompts_apart(prompt.text)]
        assert apart == [[person.truth] for person in prompt.people]


def test_drawing_hides_a_mole_and_a_streak_when_beard_or_white_hair_cover_them() -> None:
    person = Person(
        woman=False, hair="white", style="short", skin="pale", eyes="blue", expression="serious",
        beard=True, mole=True, streak=True, other_eye="green",
    )  # fmt: skip
    values = values_of(person)
    assert set(ATTRIBUTES) - set(values) == {"mole", "streak"}
    assert (values["left eye"], values["right eye"]) == ("blue", "green")


def test_prompts_never_share_a_seed_when_split_or_group_differ() -> None:
    seeds = [
        prompt.seed
        for split in Split
        for group in (Group.LONG, Group.CROWD)
        for prompt in make_prompts(split, group, COUNTS[group])
    ]
    assert len(set(seeds)) == len(seeds) == 2 * 130
    assert min(seeds) >= 910_000_000  # beyond the demo's training seeds


def test_prompts_are_the_same_long_shots_when_made_again() -> None:
    first, again = (make_prompts(Split.REPORT, Group.LONG, count) for count in (5, 3))
    assert first[:3] == again
    assert all(prompt.framing is Framing.FULL and len(prompt.people) == 1 for prompt in first)
    crowds = make_prompts(Split.REPORT, Group.CROWD, 4)
    assert {len(prompt.people) for prompt in crowds} == {2, 3}
    for prompt in crowds:
        places = [person.place[0] for person in prompt.people]
        assert places == sorted(places)  # from left to right


# -------------------------------------------------------------------------------- matching, crops


def test_faces_go_to_the_nearest_person_when_there_are_as_many() -> None:
    assert match_faces([(0.2, 0.2), (0.8, 0.2)], [(0.75, 0.25), (0.3, 0.2)]) == [1, 0]


def test_each_face_goes_to_one_person_when_both_are_nearest_to_it() -> None:
    # Greedily both would take face 0.
    assert match_faces([(0.5, 0.2), (0.6, 0.2)], [(0.55, 0.2), (0.8, 0.2)]) == [0, 1]


def test_a_person_has_no_face_when_there_are_too_few_or_too_far() -> None:
    assert match_faces([(0.2, 0.2), (0.8, 0.2)], [(0.7, 0.2)]) == [None, 0]
    assert match_faces([(0.2, 0.2)], [(0.2, 0.9)]) == [None]
    assert match_faces([(0.2, 0.2), (0.8, 0.2)], []) == [None, None]


def test_crop_is_the_picture_itself_when_it_fits() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    assert np.array_equal(cut_face(pixels, (32, 40, 96, 88), factor=2.0), pixels)


def test_crop_goes_on_with_the_border_when_the_face_is_at_the_edge() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 0] = 200
    crop = cut_face(pixels, (0, 16, 32, 48), factor=2.0, size=64)  # from -16 to 48
    assert (crop[:, :16] == 200).all()
    assert (crop[:, 18:] == 0).all()


def test_crop_averages_when_it_shrinks() -> None:
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[::2] = 200  # finer than the crop can show
    crop = cut_face(pixels, (64, 64, 192, 192), factor=2.0, size=64)
    assert abs(crop.astype(int) - 100).max() <= 1  # rounding


def test_crop_refuses_when_the_box_is_empty() -> None:
    with pytest.raises(ValueError, match="is empty"):
        cut_face(np.zeros((8, 8, 3), np.uint8), (4, 4, 4, 4))


# --------------------------------------------------------------------------------------- metrics


def _pasted(ramp_px: int) -> tuple[Pixels, Pixels, Floats]:
    """Grey 100 before; 120 where a mask is, which rises over ``ramp_px`` columns from column 16."""
    steps = (np.arange(64) - 15) / ramp_px
    alpha = np.broadcast_to(np.clip(steps, 0, 1), (32, 64)).astype(np.float32)
    before = np.full((32, 64, 3), 100, np.uint8)
    after = np.rint(100 + 20 * alpha[..., None] * np.ones(3)).astype(np.uint8)
    return before, after, alpha


def test_seam_is_the_step_when_a_rectangle_is_pasted() -> None:
    assert seam_score(*_pasted(1)) == pytest.approx(20.0)


def test_seam_is_the_slope_when_the_paste_is_blended() -> None:
    assert seam_score(*_pasted(10)) == pytest.approx(2.0)  # 20 levels over 10 columns
    assert seam_score(*_pasted(10)) < seam_score(*_pasted(1))


def test_seam_is_zero_when_nothing_changes_or_there_is_no_edge() -> None:
    before, after, alpha = _pasted(1)
    assert seam_score(before, before, alpha) == 0.0
    assert seam_score(before, after, np.ones_like(alpha)) == 0.0


def test_seam_is_negative_when_an_edge_was_there_before() -> None:
    before, after, alpha = _pasted(1)
    assert seam_score(after, before, alpha) == pytest.approx(-20.0)


def test_bytes_outside_count_each_channel_when_they_differ() -> None:
    before = np.zeros((4, 4, 3), np.uint8)
    after = before.copy()
    after[0, 0] = (1, 0, 2)  # outside
    after[3, 3] = 9  # inside
    inside = np.zeros((4, 4), bool)
    inside[3, 3] = True
    assert changed_outside(before, after, inside) == 2


def test_area_of_boxes_grows_and_stays_inside_when_at_the_border() -> None:
    inside = box_area((20, 20), [(0, 8, 4, 12)], 0.5)
    rows, columns = np.nonzero(inside)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (7, 12, 0, 4)
    assert not box_area((20, 20), [], 0.5).any()


@pytest.mark.parametrize(
    ("right", "cosine", "outcome"),
    [
        ((3, 4), (0.5, 0.5), Outcome.IMPROVED),
        ((3, 3), (0.5, 0.6), Outcome.IMPROVED),
        ((3, 3), (0.5, 0.52), Outcome.UNCHANGED),  # within the margin
        ((3, 2), (0.5, 0.6), Outcome.MIXED),
        ((3, 4), (0.5, 0.4), Outcome.MIXED),
        ((3, 2), (0.5, 0.49), Outcome.WORSENED),
        ((3, 3), (0.5, 0.4), Outcome.WORSENED),
    ],
)
def test_outcome_weighs_both_measures_when_either_changes(
    right: tuple[int, int], cosine: tuple[float, float], outcome: Outcome
) -> None:
    assert outcome_of(right, cosine, 0.03) is outcome


# ---------------------------------------------------------------------------------------- tables


def _likeness(cosine: float, *answers: bool) -> Likeness:
    right = dict(zip(("hair", "skin", "style"), answers, strict=False))
    return Likeness(right=right, cosine=cosine, eyes_match=1.0, is_face=True)


def _results(cosine: float, answers: tuple[bool, ...], outcome: Outcome, seam: float) -> Results:
    face = FaceResult(
        seed=1, person=0, group=Group.LONG, before=_likeness(0.5, True, False),
        after=_likeness(cosine, *answers), outcome=outcome,
    )  # fmt: skip
    missed = FaceResult(
        seed=2, person=0, group=Group.LONG, before=None, after=None, outcome=Outcome.UNCHANGED
    )
    picture = PictureResult(
        seed=1, group=Group.LONG, faces=2, seam=seam, outside_mask=0, beyond_faces=3000,
        wall_s=1.0, cpu_s=2.0,
    )  # fmt: skip
    return Results(faces=[face, missed], pictures=[picture])


def _all_results() -> dict[str, Results]:
    nothing = _results(0.5, (True, False), Outcome.UNCHANGED, 0.0)
    nothing.pictures.clear()
    return {
        "no pass": nothing,
        "closeup": _results(0.9, (True, True), Outcome.IMPROVED, 1.0),
        "other": _results(0.4, (False, False), Outcome.WORSENED, 0.5),
    }


def test_row_counts_missed_people_as_unchanged_when_a_face_is_not_found() -> None:
    results = _all_results()["closeup"]
    assert attribute_share(results.faces, after=False) == 0.5
    assert attribute_share(results.faces, after=True) == 1.0
    assert mean_cosine(results.faces, after=True) == 0.9
    assert method_row("closeup", results) == (
        "closeup", "50.0%", "100.0%", "0.900", "50.0%", "0.0%", "0.0%",
        "1.00", "0", "1.5", "0.50", "1.00",
    )  # fmt: skip


def test_table_misses_its_aims_when_a_face_is_not_found() -> None:
    section = group_section(_all_results(), [Group.LONG], "t")
    assert [verdict.met for verdict in section.verdicts] == [False, True]
    assert section.rows[0][4:] == ("-",) * 8  # no pass repaints nothing
    assert "2 people; no face was found for 1" in section.notes[0]
    # Wilson's interval of one of one: from 1 / (1 + 1.96 ** 2).
    told = (
        "Of the 1 faces found, closeup improved 100.0% (95 % interval 20.7% to 100.0%) and "
        "worsened 0.0% (95 % interval 0.0% to 79.3%)."
    )
    assert section.notes[0].endswith(told)
    assert group_section(_all_results(), [Group.CROWD], "t").rows[1][1] == "0.0%"


def test_only_the_columns_where_another_is_ahead_are_named_when_compared() -> None:
    assert behind(_all_results()) == ["seam (other)"]


def test_attributes_have_a_row_each_when_methods_differ() -> None:
    section = attribute_section(_all_results(), "t")
    assert section.columns == ("attribute", "named", "no pass", "closeup", "other")
    assert section.rows[1] == ("skin", "1", "0%", "100%", "0%")


# -------------------------------------------------------------------------------------- detector


def test_overlap_is_a_third_when_boxes_share_half() -> None:
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 2, 2), (2, 0, 3, 2)) == 0.0


def test_detections_match_one_face_each_when_two_lie_on_it() -> None:
    face = (10.0, 10.0, 30.0, 30.0)
    count = count_matches([face], [face, (11.0, 10.0, 31.0, 30.0), (60.0, 60.0, 80.0, 80.0)])
    assert count == Count(there=1, found=1, made=3, true=1)
    assert count.recall == 1.0
    assert count.precision == pytest.approx(1 / 3)
    assert total([count, count]).made == 6


def test_small_faces_count_neither_way_when_found_or_missed() -> None:
    small, large = (0.0, 0.0, 8.0, 11.0), (20.0, 20.0, 32.0, 32.0)
    assert count_matches([small, large], [small]) == Count(there=1, found=0, made=0, true=0)
    # Just 12 px count.
    assert count_matches([large], [large]) == Count(there=1, found=1, made=1, true=1)


def test_proposals_are_means_when_two_detectors_agree() -> None:
    boxes = merge_boxes([(30, 0, 40, 10), (0, 0, 10, 10), (0, 2, 10, 12)])
    assert boxes == [(0, 1, 10, 11), (30, 0, 40, 10)]


def test_truth_is_refused_when_it_was_checked_for_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "truth.json"
    with pytest.raises(SystemExit, match="missing"):
        read_truth(path, "a")
    write_truth(path, "a", {"7": [(0.0, 1.0, 2.0, 3.0)]}, "checked")
    assert read_truth(path, "a") == {"7": [(0.0, 1.0, 2.0, 3.0)]}
    with pytest.raises(SystemExit, match="other weights"):
        read_truth(path, "b")
    assert json.loads(path.read_text())["note"] == "checked"


# ---------------------------------------------------------------------------------------- sweeps


def test_tuning_sets_one_field_when_a_value_is_given() -> None:
    assert make_tuning("face_crop_factor", "1.8").faces == {"crop_factor": 1.8}
    assert make_tuning("face_steps", "12").request == {"face_steps": 12}
    assert make_tuning("upright", "off").faces == {"upright": False}
    default = make_tuning("face_steps", "default")
    assert not default.faces
    assert not default.request


@pytest.mark.parametrize(("parameter", "text"), [("face_steps", "many"), ("upright", "false")])
def test_tuning_is_refused_with_its_name_when_the_value_is_wrong(parameter: str, text: str) -> None:
    with pytest.raises(ValueError, match=parameter):
        make_tuning(parameter, text)
