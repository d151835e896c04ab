"""The drawn world: the same bytes for the same seed, truthful boxes, captions of known words."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from demo.attributes import Framing, sample_scene
from demo.canvas import View
from demo.captions import CLOSE_UP, describe_scene, vocabulary
from demo.pictures import PictureSet, draw_sample, load_captions, render_pictures
from demo.world import draw_scene, face_view

ROOT = Path(__file__).resolve().parents[1]
YUNET = ROOT.parent / "shared" / "data" / "yunet" / "yunet_n_dynamic.onnx"
_HASH = """
import hashlib
from demo.pictures import draw_sample
drawn = [draw_sample(seed, 64, 0.35) for seed in range(24)]
print(hashlib.sha256(b"".join(p.pixels.tobytes() for p, _ in drawn)).hexdigest())
"""


def test_draw_scene_gives_the_same_bytes_when_drawn_in_another_process() -> None:
    here = b"".join(draw_sample(seed, 64, 0.35)[0].pixels.tobytes() for seed in range(24))
    there = subprocess.run(
        [sys.executable, "-c", _HASH], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == hashlib.sha256(here).hexdigest()


def test_draw_scene_differs_when_the_seed_does() -> None:
    first, second = (draw_scene(sample_scene(seed), size=64).pixels for seed in (1, 2))
    assert np.abs(first.astype(int) - second.astype(int)).mean() > 5


@pytest.mark.parametrize("framing", list(Framing))
def test_faces_lie_inside_the_picture_and_hold_their_landmarks_when_drawn(
    framing: Framing,
) -> None:
    found = 0
    for seed in range(12):
        for face in draw_scene(sample_scene(seed, framing=framing), size=64).faces:
            x0, y0, x1, y1 = face.box
            assert 0 <= x0 < x1 <= 64
            assert 0 <= y0 < y1 <= 64
            assert (face.landmarks > [x0 - 1e-6, y0 - 1e-6]).all()
            assert (face.landmarks < [x1 + 1e-6, y1 + 1e-6]).all()
            left_eye, right_eye, nose, left_mouth, right_mouth = face.landmarks
            assert left_eye[0] < nose[0] < right_eye[0]
            assert left_mouth[0] < right_mouth[0]
            assert max(left_eye[1], right_eye[1]) < nose[1] < left_mouth[1]
            found += 1
    assert found >= 12


def test_landmarks_sit_on_dark_pupils_when_a_face_is_large() -> None:
    """The pupils are the darkest thing in the eyes: a shift of half an eye would miss them."""
    dark = 0
    for seed in range(10):
        picture = draw_scene(sample_scene(seed, framing=Framing.FACE), size=128)
        for x, y in picture.faces[0].landmarks[:2]:
            patch = picture.pixels[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4]
            dark += int(patch.max(2).min() < 90)
    assert dark >= 18


def test_faces_number_as_the_people_when_several_stand_in_a_full_view() -> None:
    for people in (1, 2, 3):
        scene = sample_scene(7, framing=Framing.FULL, people=people)
        assert len(draw_scene(scene, size=64).faces) == people


def test_face_view_holds_the_face_in_the_wanted_size_when_it_crops_a_long_shot() -> None:
    for seed in range(8):
        scene = sample_scene(seed, framing=Framing.FULL, people=1)
        view = face_view(scene, 0, 2.0)
        assert 0 <= view.x <= 1 - view.side
        assert 0 <= view.y <= 1 - view.side
        (face,) = draw_scene(scene, view=view, size=64).faces
        longer = max(face.box[2] - face.box[0], face.box[3] - face.box[1])
        # Half of 64 px, to the pixel; the whole scene's view would give about 8.
        assert longer == pytest.approx(32, abs=0.5)


def test_draw_scene_agrees_with_a_crop_of_itself_when_a_view_is_given() -> None:
    """The view is a magnifying glass: enlarging changes edges only."""
    scene = sample_scene(3, framing=Framing.PORTRAIT, people=1)
    large = draw_scene(scene, size=128).pixels[32:96, 32:96].astype(int)
    viewed = draw_scene(scene, view=View(x=0.25, y=0.25, side=0.5), size=64).pixels.astype(int)
    # Blur radii round differently; a shift by one pixel gives several times this mean.
    assert np.abs(large - viewed).mean() < 1.0
    assert np.abs(large[1:] - viewed[:-1]).mean() > 1.5


def test_sample_scene_refuses_when_a_crowd_is_asked_for() -> None:
    with pytest.raises(ValueError, match="people is 4"):
        sample_scene(0, people=4)


def test_captions_use_only_the_grammars_words_when_scenes_are_described() -> None:
    words = vocabulary()
    assert 80 <= len(words) <= 130
    for seed in range(400):
        caption = describe_scene(sample_scene(seed), np.random.default_rng(seed)) + CLOSE_UP
        assert set(caption.replace(",", "").split()) <= words
        assert len(caption.replace(",", " ,").split()) <= 75  # 77 tokens with start and end


def test_captions_name_what_is_drawn_when_they_name_it() -> None:
    for seed in range(100):
        scene = sample_scene(seed, people=1)
        person = scene.people[0][0]
        caption = describe_scene(scene, np.random.default_rng(0))
        assert (" woman" in caption) == person.woman
        assert "glasses" not in caption or person.glasses
        assert "beard" not in caption or person.beard
        assert " hair" not in caption or f"{person.hair} hair" in caption


def test_crops_carry_the_scenes_caption_and_the_suffix_when_every_sample_is_a_crop() -> None:
    drawn = [draw_sample(seed, 32, 1.0) for seed in range(12)]
    assert np.median([picture.view.side for picture, _ in drawn]) < 0.6
    assert all(wording.endswith(CLOSE_UP) for _, wordings in drawn for wording in wordings)


def test_render_pictures_does_not_depend_on_the_workers_when_a_set_is_rendered(
    tmp_path: Path,
) -> None:
    for workers in (1, 2):
        render_pictures(tmp_path / str(workers), PictureSet(count=6, size=32), workers)
    one, two = tmp_path / "1", tmp_path / "2"
    np.testing.assert_array_equal(np.load(one / "images.npy"), np.load(two / "images.npy"))
    np.testing.assert_array_equal(np.load(one / "faces.npy"), np.load(two / "faces.npy"))
    assert load_captions(one) == load_captions(two)


def _yunet_boxes(session: object, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Boxes of score 0.5 and more, (k, 4), decoded as FACES.md 9.1 says."""
    blob = pixels[..., ::-1].transpose(2, 0, 1)[None].astype(np.float32)
    outputs = session.run(None, {"input": np.ascontiguousarray(blob)})  # type: ignore[attr-defined]
    boxes = []
    for level, stride in enumerate((8, 16, 32)):
        score = np.sqrt(outputs[level] * outputs[3 + level])[0, :, 0]
        columns = pixels.shape[1] // stride
        for cell in np.flatnonzero(score > 0.5):
            dx, dy, width, height = outputs[6 + level][0, cell]
            centre = (np.array([cell % columns, cell // columns]) + [dx, dy]) * stride
            half = np.exp([width, height]) * stride / 2
            boxes.append(np.concatenate([centre - half, centre + half]))
    return np.array(boxes).reshape(-1, 4)


@pytest.mark.skipif(not YUNET.exists(), reason="needs shared/data/yunet")
def test_a_detector_of_photographed_faces_finds_ours_when_they_are_drawn_large() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(YUNET), settings)
    found = 0
    for index in range(32):
        framing = (Framing.PORTRAIT, Framing.FACE, Framing.HALF, Framing.PORTRAIT)[index % 4]
        picture = draw_scene(sample_scene(index, framing=framing, people=1), size=256)
        x0, y0, x1, y1 = picture.faces[0].box
        boxes = _yunet_boxes(session, picture.pixels)
        low = np.maximum(boxes[:, :2], [x0, y0])
        high = np.minimum(boxes[:, 2:], [x1, y1])
        shared = np.clip(high - low, 0, None).prod(1)
        both = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (x1 - x0) * (y1 - y0) - shared
        found += int((shared / both > 0.4).any())
    assert found >= 28
