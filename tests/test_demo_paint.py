"""Painted pictures for the detector: which of its findings are faces, and what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from closeup.detection import Face
from demo import paint
from demo.paint import label_faces


def _face(score: float, middle_y: float) -> Face:
    return Face(
        box=(10, middle_y - 5, 20, middle_y + 5), score=score, landmarks=((15, middle_y),) * 5
    )


def test_the_best_findings_are_the_faces_when_there_are_more_than_people() -> None:
    first, second, feet = _face(0.9, 30), _face(0.8, 32), _face(0.7, 170)
    labels = label_faces([feet, second, first], 2, 192)
    assert labels is not None
    assert labels.faces == (first, second)
    assert labels.alarms == (feet,)


def test_a_picture_tells_nothing_when_a_face_is_missing_or_feet_score_best() -> None:
    face, feet = _face(0.7, 30), _face(0.9, 170)
    assert label_faces([face], 2, 192) is None
    assert label_faces([face, feet], 1, 192) is None


def test_paint_writes_pictures_with_the_faces_that_their_captions_name(tmp_path: Path) -> None:
    arguments = ["--count", "2", "--seed", "600000003", "--threads", "1", "--device", "cpu"]
    paint.main([*arguments, "--place", "studio", "--out", str(tmp_path)])
    pictures, faces = (np.load(tmp_path / f"{name}.npy") for name in ("images", "faces"))
    assert pictures.shape[1:] == (192, 192, 3)
    assert pictures.std() > 20  # a picture, not grey
    assert faces.shape == (len(pictures), 3, 14)
    assert 1 <= len(pictures) <= 2
    for rows in faces:
        found = rows[~np.isnan(rows[:, 0])]
        assert len(found) >= 1
        assert (found[:, 3] < 0.6 * 192).all()  # heads, not feet
        inside = (found[:, 4] > found[:, 0]) & (found[:, 6] < found[:, 2])
        assert inside.all()  # the eyes lie in their box
