"""The judge: its weights on held-out drawings, its drawings, and what happens to them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.likeness.accuracy import Example, held_out_example, held_out_others
from benchmarks.likeness.compare import Likeness, likeness_of
from benchmarks.likeness.crops import CROP_PX
from benchmarks.likeness.damage import damage
from benchmarks.likeness.drawings import UNKNOWN, draw_pair, labels_of
from benchmarks.likeness.features import break_eye, remove_features, spoil_surroundings
from benchmarks.likeness.generator import held_out_prompts, judge_drawings, limits_section
from benchmarks.likeness.judge import WEIGHTS, Judge, mean_embedding
from benchmarks.likeness.network import HEADS
from benchmarks.likeness.prompts import Character
from benchmarks.likeness.references import (
    DRAWINGS,
    References,
    draw_looks,
    drawing_pool,
    looks_of,
)
from benchmarks.likeness.subjects import clean_crop, described_person
from benchmarks.likeness.train_judge import attribute_loss, pair_loss
from benchmarks.likeness.wording import ATTRIBUTES, values_of
from demo.attributes import Framing

PEOPLE = 24
SEEN = {
    "gender": "woman",
    "hair": "red",
    "style": "long",
    "skin": "tan",
    "left eye": "green",
    "right eye": "green",
    "expression": "smiling",
}


@pytest.fixture(scope="module")
def judge() -> Judge:
    """The committed judge."""
    return Judge()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Held-out people, from a part of the seeds that the printed accuracy does not use."""
    return [held_out_example(100_000 + number) for number in range(PEOPLE)]


def test_weights_are_small_when_committed() -> None:
    assert WEIGHTS.stat().st_size <= 1_000_000


def test_attributes_are_right_when_held_out_people_are_drawn_cleanly(
    judge: Judge, examples: list[Example]
) -> None:
    readings = judge.look([example.crop for example in examples])
    answers = [
        reading.right(example.truth)[name]
        for reading, example in zip(readings, examples, strict=True)
        for name in example.truth
    ]
    # Its lowest accuracy is 97 %; of 24 people's 300 answers 95 % leaves room for chance.
    assert len(answers) > 12 * PEOPLE
    assert sum(answers) / len(answers) >= 0.95


def test_few_attributes_are_right_when_the_truth_is_another_person(
    judge: Judge, examples: list[Example]
) -> None:
    readings = judge.look([example.crop for example in examples])
    moved = [*readings[1:], readings[0]]
    names = ("hair", "style", "skin", "left eye")
    right = [
        reading.right(example.truth)[name]
        for reading, example in zip(moved, examples, strict=True)
        for name in names
    ]
    # Guesses are right in one of 6, 6, 4 and 3: a quarter.
    assert sum(right) / len(right) < 0.45


def test_nothing_is_right_when_there_is_no_face(judge: Judge, examples: list[Example]) -> None:
    blanks = [np.full((CROP_PX, CROP_PX, 3), level, np.uint8) for level in (0, 90, 255)]
    noise = np.random.default_rng(0).integers(0, 256, (CROP_PX, CROP_PX, 3)).astype(np.uint8)
    readings = judge.look([*blanks, noise, *held_out_others(8)])
    taken = [reading.is_face for reading in readings]
    assert not any(taken[:4])
    assert sum(taken) <= 1  # a tree may have a face, rarely
    assert not any(readings[0].right(examples[0].truth).values())
    assert readings[0].cosine(readings[0].embedding) == 0.0


def test_a_face_is_one_when_its_surroundings_are_spoiled(
    judge: Judge, examples: list[Example]
) -> None:
    surrounded = judge.look([example.surrounded for example in examples])
    assert np.mean([reading.is_face for reading in surrounded]) >= 0.9


def test_a_head_is_no_face_when_its_features_are_gone(
    judge: Judge, examples: list[Example]
) -> None:
    faces = judge.look([example.crop for example in examples])
    heads = judge.look([example.head for example in examples])
    assert np.mean([reading.is_face for reading in faces]) >= 0.95
    assert np.mean([reading.is_face for reading in heads]) <= 0.1


def test_the_same_person_is_nearest_when_drawn_in_another_scene(
    judge: Judge, examples: list[Example]
) -> None:
    first = judge.look([example.crop for example in examples])
    again = judge.look([example.again for example in examples])
    cosines = np.array([[one.cosine(two.embedding) for two in again] for one in first])
    assert np.allclose([np.linalg.norm(one.embedding) for one in first], 1, atol=1e-5)
    nearest = cosines.argmax(1) == np.arange(PEOPLE)
    assert nearest.mean() >= 0.8  # by chance one of 24


def test_eyes_are_no_pair_when_one_is_spoiled(judge: Judge, examples: list[Example]) -> None:
    pairs = [e for e in examples if e.truth["left eye"] == e.truth["right eye"]]
    whole = judge.look([example.crop for example in pairs])
    broken = judge.look([example.broken for example in pairs])
    assert len(pairs) >= PEOPLE / 2
    assert np.mean([reading.eyes_match >= 0.5 for reading in whole]) >= 0.85
    assert np.mean([reading.eyes_match < 0.5 for reading in broken]) >= 0.85


def test_judge_refuses_when_a_crop_has_another_size(judge: Judge) -> None:
    with pytest.raises(ValueError, match=r"\(64, 64, 3\)"):
        judge.look([np.zeros((64, 64, 3), np.uint8)])
    assert judge.look([]) == []


def test_likeness_counts_only_what_is_asked_when_a_person_is_given(
    judge: Judge, examples: list[Example]
) -> None:
    reading = judge.look([examples[0].crop])[0]
    truth = {"hair": reading.values["hair"], "glasses": "perhaps"}
    likeness = likeness_of(reading, Character(truth=truth, place=(0.5, 0.5)), reading.embedding)
    assert likeness == Likeness(
        right={"hair": True, "glasses": False}, cosine=likeness.cosine,
        eyes_match=reading.eyes_match, is_face=True,
    )  # fmt: skip
    assert likeness.count == 1
    assert likeness.cosine == pytest.approx(1.0, abs=1e-5)


def test_mean_embedding_lies_between_when_two_people_are_given(
    judge: Judge, examples: list[Example]
) -> None:
    one, two = judge.look([examples[0].crop, examples[1].crop])
    middle = mean_embedding([one, two])
    assert np.linalg.norm(middle) == pytest.approx(1.0, abs=1e-5)
    assert one.cosine(middle) == pytest.approx(two.cosine(middle), abs=1e-5)


# ----------------------------------------------------------------------------------- references


def test_open_choices_are_no_unlikeness_when_a_face_is_compared(
    judge: Judge, examples: list[Example]
) -> None:
    references = References(judge)
    some = examples[:8]
    readings = judge.look([example.crop for example in some])
    people = [Character(truth={"hair": e.truth["hair"]}, place=(0.5, 0.5)) for e in some]
    others = [*people[1:], people[0]]
    own, wrong = (
        [r.cosine(references.embedding(p, r)) for r, p in zip(readings, asked, strict=True)]
        for asked in (people, others)
    )
    # A clean face is as like as two drawings of one person are, its choices whatever they be.
    assert np.median(own) >= 0.85
    changed = [e.truth["hair"] != p.truth["hair"] for e, p in zip(some, others, strict=True)]
    assert sum(changed) >= 5
    assert np.median(np.array(wrong)[changed]) < np.median(own) - 0.2


def test_the_same_person_is_compared_with_when_a_prompt_leaves_nothing_open(
    judge: Judge, examples: list[Example]
) -> None:
    references = References(judge)
    person = described_person({"hair": "blue"}, np.random.default_rng(0))
    her = Character(truth=values_of(person), place=(0.5, 0.5), person=person)
    first, second = judge.look([examples[0].crop, examples[1].crop])
    assert references.embedding(her, first) is references.embedding(her, second)
    assert np.linalg.norm(references.embedding(her, first)) == pytest.approx(1.0, abs=1e-5)


def test_references_are_the_same_drawings_when_all_cores_draw_them() -> None:
    looks = looks_of({"hair": "blue"}, {**dict.fromkeys(ATTRIBUTES, "no"), **SEEN})
    assert looks["hair"] == "blue"
    assert looks["skin"] == SEEN["skin"]
    tasks = [(looks, number) for number in range(DRAWINGS)]
    with drawing_pool() as pool:
        there = pool.starmap(draw_looks, tasks)
    here = [draw_looks(*task) for task in tasks]
    np.testing.assert_array_equal(np.stack(there), np.stack(here))
    assert not np.array_equal(here[0], here[1])


# ------------------------------------------------------------------------------------- drawings


def test_described_people_show_what_was_said_when_drawn_at_random() -> None:
    values = {
        "gender": "man",
        "hair": "red",
        "left eye": "green",
        "right eye": "blue",
        "mole": "yes",
    }
    people = [described_person(values, np.random.default_rng(seed)) for seed in range(40)]
    for person in people:
        assert values.items() <= values_of(person).items()
        assert not person.glasses
        assert not person.beard
    assert len({person.skin for person in people}) == 4  # what is not said is anyone's
    assert not any(person.style == "braids" for person in people)  # as in the drawn world


def test_clean_crop_is_the_same_when_drawn_again() -> None:
    person = described_person({"hair": "blue"}, np.random.default_rng(0))
    first, again = clean_crop(person, 3), clean_crop(person, 3)
    assert first.shape == (CROP_PX, CROP_PX, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, clean_crop(replace(person, hair="red"), 3))


def test_both_views_show_one_face_when_a_pair_is_drawn() -> None:
    for seed in range(0, 20, 2):
        pictures, seen = (lambda pair: (pair[:2], pair[4]))(draw_pair(seed))
        assert all(picture.faces for picture in pictures)
        kept = set(seen[0]) & set(seen[1]) - {"expression"}
        assert {name: seen[0][name] for name in kept} == {name: seen[1][name] for name in kept}
        assert not np.array_equal(pictures[0].pixels, pictures[1].pixels)


def test_labels_are_unknown_when_the_drawing_hides_them() -> None:
    labels = dict(zip(HEADS, labels_of({"hair": "red"}, face=True, pair=False), strict=True))
    assert labels["hair"] == ATTRIBUTES["hair"].index("red")
    assert (labels["face"], labels["eyes match"], labels["mole"]) == (1, 0, UNKNOWN)
    blank = dict(zip(HEADS, labels_of({}, face=False, pair=False), strict=True))
    assert blank["face"] == 0
    assert {blank[name] for name in HEADS if name != "face"} == {UNKNOWN}


def test_damage_is_the_same_when_the_stream_is() -> None:
    crop = held_out_example(100_000).crop
    kept = 0
    for seed in range(30):
        first, again = (damage(crop, np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(first.pixels, again.pixels)
        assert first.pixels.shape == crop.shape
        assert first.pixels.dtype == np.uint8
        assert 20 <= first.resolution_px <= CROP_PX
        # Still the same picture: what is damaged stays nearer to it than a grey square is.
        error = np.abs(first.pixels.astype(int) - crop).mean()
        kept += error == 0
        assert error < np.abs(crop.astype(int) - int(crop.mean())).mean()
    assert 1 <= kept <= 15  # one in five is left as it is


def test_only_one_eye_changes_when_it_is_spoiled() -> None:
    crop = np.random.default_rng(1).integers(0, 256, (100, 100, 3)).astype(np.uint8)
    landmarks = np.array([[35.0, 50], [65, 50], [50, 60], [40, 75], [60, 75]])
    for seed in range(12):
        broken = break_eye(crop, landmarks, 1, np.random.default_rng(seed))
        rows, columns = np.nonzero((broken != crop).any(-1))
        assert len(rows) > 100
        # The ellipse ends at 1.15 times 0.36 and 0.3 of the distance of 30 px between the eyes.
        assert abs(columns - 64.5).max() <= 13
        assert abs(rows - 49.5).max() <= 11


def test_only_the_middle_changes_when_features_are_removed() -> None:
    crop = held_out_example(100_000).crop
    landmarks = np.array([[50.0, 60], [78, 60], [64, 72], [54, 84], [74, 84]])
    changed = []
    for seed in range(24):
        head = remove_features(crop, landmarks, np.random.default_rng(seed))
        rows, columns = np.nonzero((head != crop).any(-1))
        assert len(rows) > 300  # an eye's cover
        # Within 1.15 times the distance of 28 px between the eyes, or, made coarse, everywhere.
        far = max(abs(columns - 63.5).max(), abs(rows - 71.5).max())
        assert far <= 32 or far > 55
        changed.append(far <= 32)
    assert 16 <= sum(changed) < 24


def test_only_the_middle_keeps_its_detail_when_surroundings_are_spoiled() -> None:
    # Stripes of 2 px: wherever the picture is made coarse they are grey.
    pixels = np.zeros((160, 160, 3), np.uint8)
    pixels[:, ::4] = pixels[:, 1::4] = 255
    landmarks = np.array([[60.0, 70], [100, 70], [80, 90], [65, 105], [95, 105]])
    rows, columns = np.mgrid[:160, :160] + 0.5
    for seed in range(8):
        spoiled = spoil_surroundings(pixels, landmarks, np.random.default_rng(seed))
        # The middle moves by up to 0.15 times the 40 px between the eyes, and the face ends
        # between 1 and 2.1 times that from it.
        away = np.hypot(columns - 80, rows - 88)
        assert spoiled[away < 34].std() > 90
        assert spoiled[away > 92].std() < 50


def test_drawings_keep_their_attributes_when_nothing_happens_on_the_way(judge: Judge) -> None:
    prompts = held_out_prompts(16)
    kept = judge_drawings(judge, prompts, lambda pixels: pixels)
    gone = judge_drawings(judge, prompts, np.zeros_like)
    near = [framing for framing in Framing if framing is not Framing.FULL]
    named = sum(kept[framing].named for framing in near)
    assert named > 30
    assert sum(kept[framing].right for framing in near) >= 0.95 * named
    assert sum(gone[framing].right for framing in near) == 0
    everything = sum(len(person.truth) for prompt in prompts for person in prompt.people)
    assert sum(drawn.named for drawn in kept.values()) == everything
    faces = sum(kept[framing].faces for framing in near)
    assert faces >= 8
    # The world's eyes are pairs; the judge is right on 97.5 % of held-out ones.
    assert sum(kept[framing].pairs for framing in near) >= faces - 1
    assert limits_section(gone).rows[-1][:3] == ("half and closer", "0.0%", str(named))


# --------------------------------------------------------------------------------------- losses


def test_attribute_loss_leaves_out_heads_when_labels_are_unknown() -> None:
    logits = {"a": torch.tensor([[9.0, -9.0], [9.0, -9.0]]), "b": torch.tensor([[0.0, 0.0]] * 2)}
    labels = torch.tensor([[0, 1], [UNKNOWN, 1]])
    loss, right = attribute_loss(logits, labels)
    assert right == pytest.approx(1 / 3)  # one of one in a, none of two in b (a tie goes to 0)
    # Smoothing of 0.02 costs 0.01 * 18 in a; b is undecided, log 2; the mean of both.
    assert float(loss) == pytest.approx((0.18 + np.log(2)) / 2, abs=1e-3)


def test_pair_loss_is_low_when_each_view_is_nearest_its_own() -> None:
    basis = torch.eye(4)
    paired = torch.cat([basis, basis, torch.ones(1, 4) / 2])
    mixed = torch.cat([basis, basis.roll(1, 0), torch.ones(1, 4) / 2])
    assert float(pair_loss(paired, 4)) < 0.01
    assert float(pair_loss(mixed, 4)) > 5
