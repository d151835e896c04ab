"""What the text encoder of the demo is taught, and its training in miniature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel

from demo.attributes import CLOTH, EYES, HAIR, PLACES, SKIN, Framing, sample_scene
from demo.captions import describe_scene
from demo.train_text import READ, SLOTS, Readers, draw_captions, main, read_caption
from demo.train_unet import END_TOKEN

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "demo" / "weights" / "sd"


def _named(caption: str) -> list[dict[str, str]]:
    """`read_caption` in words."""
    values = read_caption(caption)[:-1].reshape(SLOTS, len(READ))
    return [
        {name: table[value - 1] for (name, (table, _)), value in zip(READ.items(), row, strict=True)
         if value}
        for row in values
    ]  # fmt: skip


def test_caption_is_read_word_for_word_when_two_people_stand_in_it() -> None:
    first, second = _named(
        "a long shot of two people, a smiling woman with a red ponytail, glasses and blue eyes "
        "wearing a striped green dress and a man with short white hair, a beard and tan skin "
        "wearing a black shirt and red trousers in a city"
    )
    assert first == {
        "gender": "woman", "expression": "smiling", "hair": "red", "style": "ponytail",
        "eyes": "blue", "glasses": "glasses", "striped": "striped", "top": "dress",
        "top colour": "green",
    }  # fmt: skip
    assert second == {
        "gender": "man", "hair": "white", "style": "short", "skin": "tan", "beard": "beard",
        "top": "shirt", "top colour": "black", "bottom colour": "red",
    }  # fmt: skip


def test_caption_is_read_as_the_scene_is_when_the_grammar_words_it() -> None:
    for seed in range(60):
        scene = sample_scene(seed, framing=Framing.HALF, people=1)
        caption = describe_scene(scene, np.random.default_rng(seed), thorough=True)
        person, read = scene.people[0][0], _named(caption)
        truth = {
            "gender": "woman" if person.woman else "man", "hair": person.hair,
            "skin": person.skin, "eyes": person.eyes, "expression": person.expression,
            "style": person.style, "top": person.top, "top colour": person.top_colour,
        }  # fmt: skip
        assert {name: read[0][name] for name in truth if name in read[0]} == {
            name: value for name, value in truth.items() if name in read[0]
        }
        assert not read[1]
        place = read_caption(caption)[-1]
        assert place in (0, 1 + PLACES.index(scene.place))


def test_thorough_captions_name_nearly_all_of_a_face_when_it_is_far_away() -> None:
    scenes = [sample_scene(seed, framing=Framing.FULL, people=1) for seed in range(200)]
    shares = [
        np.mean([
            " eyes" in describe_scene(scene, np.random.default_rng(seed), thorough=thorough)
            for seed, scene in enumerate(scenes)
        ])
        for thorough in (False, True)
    ]  # fmt: skip
    assert shares[0] < 0.25
    assert shares[1] > 0.9


@pytest.mark.parametrize("table", [HAIR, SKIN, EYES, CLOTH])
def test_every_colour_can_be_said_when_captions_are_drawn(table: dict[str, object]) -> None:
    text = " ".join(draw_captions(400, 5))
    assert [colour for colour in table if f" {colour} " not in text] == []


def test_readers_ask_for_the_two_words_before_when_states_hold_them() -> None:
    ids = torch.tensor([[1, 5, 3, 4, END_TOKEN, END_TOKEN]])
    readers = Readers(8, 803)
    torch.nn.init.zeros_(readers.before.weight)
    torch.nn.init.zeros_(readers.before.bias)
    states = torch.zeros(1, 6, 8)
    # Token 3 follows 5 and 1, token 4 follows 3 and 5; a state of its own for each says so.
    states[0, 2, 0] = states[0, 3, 1] = 1.0
    with torch.no_grad():
        for column, (one, two) in enumerate(((5, 1), (3, 5))):
            readers.before.weight[one, column] = readers.before.weight[803 + two, column] = 50.0
    assert float(readers.before_loss(states, ids)) < 1e-6
    assert float(readers.before_loss(states.roll(1, 1), ids)) > 1


def test_training_goes_on_and_writes_an_encoder_when_resumed(tmp_path: Path) -> None:
    arguments = [
        "--start",
        str(WEIGHTS),
        "--out",
        str(tmp_path / "text"),
        "--run",
        str(tmp_path / "run"),
    ]
    arguments += ["--captions", "40", "--batch", "4", "--threads", "1", "--cooldown", "0"]
    for steps in ("2", "3"):
        main([*arguments, "--steps", steps, "--resume"])
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3
    encoder = CLIPTextModel.from_pretrained(tmp_path / "text", torch_dtype="auto")
    assert encoder.dtype == torch.float16
    before = CLIPTextModel.from_pretrained(WEIGHTS / "text_encoder", torch_dtype="auto")
    weights = [model.text_model.final_layer_norm.weight for model in (encoder, before)]
    assert not torch.equal(*weights)
