"""The graph's face prompts: one for each face with `[SEP]`, their words, their report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from closeup.run import Array
from tests.toy_models import Outputs, ToyModels
from tests.toy_requests import FACES, FIELDS, GRID, MakeToy


def test_face_prompt_keeps_the_models_suffix_when_the_prompt_is_cut(toy: ToyModels) -> None:
    read: list[Any] = []

    def keep_ids(inputs: Mapping[str, Array], outputs: Outputs) -> Outputs:
        read.append(inputs["input_ids"])
        return outputs

    toy.faults["toy_text_encoder"] = keep_ids
    suffix = [5, 6, 7]  # write_toy_repository's
    for words in (4, 72, 73, 90):
        run, _, _ = toy.paint(**{**FIELDS, "prompt": "word4 " * words}, inpaint_faces=True)
        _, prompt, face = read[-1].tolist()
        kept = min(words, 75 - len(suffix))
        assert face[: kept + 5] == [1, *[4] * kept, *suffix, 2]
        assert prompt[1:76].count(4) == min(words, 75)
        assert len(run.warnings) == (words > 75)


def _fingerprints(toy: ToyModels, **fields: Any) -> list[bytes]:
    """What the middles of three faces were repainted to, from left to right."""
    run, outcome, _ = toy.paint(**FACES, face_denoising_strength=0.9, **fields)
    assert all(sentence.startswith("face_prompt holds") for sentence in run.warnings)
    reports = sorted(outcome.faces[0], key=lambda report: float(report["box"][0]))
    middles = [np.add(report["box"][:2], report["box"][2:]) / 2 for report in reports]
    return [
        outcome.pictures[0][int(y) - 4 : int(y) + 4, int(x) - 4 : int(x) + 4].tobytes()
        for x, y in middles
    ]


def test_faces_take_their_own_prompt_from_left_to_right_when_several_are_given(
    make_toy: MakeToy,
) -> None:
    toy = make_toy(faces=GRID[:15:5])
    one, two, usual = (
        _fingerprints(toy, **fields)
        for fields in ({"face_prompt": "word9"}, {"face_prompt": "word3 word20"}, {})
    )
    assert len({*one, *two, *usual}) == 9
    mixed = _fingerprints(toy, face_prompt="word9 [SEP] word3 word20 [SEP] word9")
    assert mixed == [one[0], two[1], one[2]]
    # The last one serves those that follow; an empty one is the usual prompt.
    assert _fingerprints(toy, face_prompt="word9[SEP]word3 word20") == [one[0], two[1], two[2]]
    assert _fingerprints(toy, face_prompt=" [SEP] word9") == [usual[0], one[1], one[2]]
    # The order asked for wins: by area the same faces come in another order or in this one.
    ordered = _fingerprints(toy, face_prompt="word9[SEP]word9[SEP]word9", face_order="area")
    assert ordered == one


def test_many_face_prompts_are_encoded_in_calls_that_every_engine_takes(make_toy: MakeToy) -> None:
    toy = make_toy(faces=GRID[:15:5])
    rows: list[int] = []

    def count_rows(inputs: Mapping[str, Array], outputs: Outputs) -> Outputs:
        rows.append(len(inputs["input_ids"]))
        return outputs

    toy.faults["toy_text_encoder"] = count_rows
    few = _fingerprints(toy, face_prompt="word9[SEP]word3[SEP]word5")
    rows.clear()
    unused = [" ".join(["word8"] * count) for count in range(1, 21)]
    many = _fingerprints(toy, face_prompt="[SEP]".join(["word9", "word3", "word5"] + unused))
    assert rows == [12, 12, 1]
    assert many == few


def test_client_learns_which_prompt_a_face_got_and_which_were_not_used(make_toy: MakeToy) -> None:
    toy = make_toy(faces=GRID[:10:5])
    run, outcome, _ = toy.paint(**FACES, face_prompt="word9[SEP]word3[SEP]word5")
    by_place = sorted(outcome.faces[0], key=lambda face: float(face["box"][0]))
    assert [face["prompt"] for face in by_place] == [0, 1]
    assert run.warnings == [
        "face_prompt holds 3 prompts, of which 2 were used: no picture has more faces that were "
        "repainted."
    ]
    run, outcome, _ = toy.paint(**FACES, face_prompt="word9", max_faces=1)
    assert sorted(str(face["prompt"]) for face in outcome.faces[0]) == ["0", "None"]
    assert run.warnings == []


def test_the_picture_under_the_faces_stays_when_face_prompts_are_longer_than_its_own(
    make_toy: MakeToy,
) -> None:
    toy = make_toy(faces=GRID[:2])
    fields = {**FACES, "use_lpw": True, "prompt": "word5 " * 70}
    pictures = [
        toy.paint(**{**fields, "inpaint_faces": faces, "super_resolution": True}, **more)[1]
        for faces, more in (
            (False, {}),
            (True, {}),
            (True, {"face_prompt": "word9 " * 80}),
            (True, {"face_prompt": "word9"}),
        )
    ]
    bases = [outcome.stages["generated"][0] for outcome in pictures]
    for base in bases[1:]:
        assert np.array_equal(base, bases[0])
    assert not np.array_equal(pictures[2].pictures[0], pictures[3].pictures[0])
