"""The graph with a `mask_image`: what is painted, and which faces are."""

from __future__ import annotations

import numpy as np

from tests.drawn_faces import make_face
from tests.toy_models import ToyModels, png, waves
from tests.toy_requests import FACES, FACTOR, FIELDS, SIDE, MakeToy


def test_inpainting_keeps_the_latents_outside_its_mask(toy: ToyModels) -> None:
    picture = waves(SIDE, SIDE).reshape(16, 8, 16, 8, 3).mean((1, 3)).astype(np.uint8)
    picture = picture.repeat(8, 0).repeat(8, 1)  # what the toy autoencoder reproduces
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[32:80, 40:96] = 255
    _, outcome, _ = toy.paint(
        **FIELDS, input_image=png(picture), mask_image=png(mask), denoising_strength=0.8
    )
    change = np.abs(outcome.pictures[0].astype(int) - picture)
    # Outside, the toy autoencoder's own loss: 1 % of contrast and its tiny variance.
    assert change[mask == 0].max() <= 4
    assert change[mask > 0].mean() > 20


def test_nothing_is_painted_when_the_mask_is_black(toy: ToyModels) -> None:
    picture = waves(SIDE, SIDE)
    for white in (slice(0, 0), slice(1, 8)):  # nowhere, and in no latent's corner
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[white, white] = 255
        run, outcome, _ = toy.paint(**FIELDS, input_image=png(picture), mask_image=png(mask))
        assert np.array_equal(outcome.pictures[0], picture)
        assert run.usage["denoiser_steps"] == 0
        (sentence,) = run.warnings
        assert sentence.startswith("mask_image has no white area")


def test_faces_outside_the_mask_are_left_alone(make_toy: MakeToy) -> None:
    toy = make_toy(faces=[make_face(40, 50, 20), make_face(100, 50, 20)])
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[32:80, 16:72] = 255
    inputs = {"input_image": png(waves(SIDE, SIDE)), "mask_image": png(mask)}
    _, outcome, _ = toy.paint(**FACES, **inputs)
    inside, outside = sorted(outcome.faces[0], key=lambda face: face["box"][0])
    assert inside["action"] == "repaint"
    assert (outside["action"], outside["reason"]) == ("skip", "It lies outside mask_image.")


def test_a_face_changes_inside_the_mask_alone_when_the_mask_cuts_it(make_toy: MakeToy) -> None:
    toy = make_toy(faces=[make_face(60, 60, 24)])
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[30:58, 30:90] = 255  # its forehead and eyes
    inputs = {"input_image": png(waves(SIDE, SIDE)), "mask_image": png(mask)}
    fields = {**FACES, "face_denoising_strength": 0.9, "denoising_strength": 0.5}
    _, outcome, _ = toy.paint(**fields, **inputs)
    assert outcome.faces[0][0]["action"] == "repaint"
    before, after = outcome.stages["super_resolution"][0], outcome.pictures[0]
    changed = (before != after).any(-1)
    allowed = mask.repeat(FACTOR, 0).repeat(FACTOR, 1) > 0
    assert not changed[~allowed].any()
    assert changed[allowed].mean() > 0.2
    # Next to the mask's edge hardly anything: no seam.
    edge = allowed & ~np.roll(allowed, -1, 0)
    assert np.abs(before.astype(int) - after)[edge].max() <= 8


def test_faces_outside_the_mask_neither_count_nor_measure_the_others(make_toy: MakeToy) -> None:
    toy = make_toy(faces=[make_face(40, 50, 5), make_face(100, 50, 60)])
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[32:80, 16:60] = 255
    inputs = {"input_image": png(waves(SIDE, SIDE)), "mask_image": png(mask)}
    _, outcome, _ = toy.paint(**FACES, **inputs, max_faces=1)
    actions = {face["box"][0] < 200: face["action"] for face in outcome.faces[0]}
    assert actions == {True: "repaint", False: "skip"}
