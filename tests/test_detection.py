"""YuNet's input and outputs: values worked by hand, and the real network on drawn people."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from closeup.detection import (
    OUTPUT_NAMES,
    STRIDES,
    Box,
    Face,
    decode_detections,
    detection_long_sides,
    detector_input,
    merge_detections,
    scale_faces,
)
from closeup.images import Floats, Pixels

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
YUNET = SHARED / "yunet" / "yunet_n_dynamic.onnx"
WORLD = SHARED / "demo" / "experiment" / "world.py"

needs_yunet = pytest.mark.skipif(
    not (YUNET.exists() and WORLD.exists()), reason="the shared YuNet and drawn world are absent"
)


def _silent(height: int, width: int) -> dict[str, Floats]:
    """Return outputs in which nothing is found."""
    widths = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}
    return {
        name: np.zeros(
            (
                1,
                (height // int(name.split("_")[1])) * (width // int(name.split("_")[1])),
                widths[name.split("_")[0]],
            ),
            np.float32,
        )
        for name in OUTPUT_NAMES
    }


def _put(
    outputs: dict[str, Floats],
    *,
    stride: int,
    cell: tuple[int, int],
    wide: int,
    box: tuple[float, float, float, float],
    score: tuple[float, float] = (0.81, 1.0),
) -> None:
    column, row = cell
    n = row * (wide // stride) + column
    outputs[f"cls_{stride}"][0, n] = score[0]
    outputs[f"obj_{stride}"][0, n] = score[1]
    outputs[f"bbox_{stride}"][0, n] = box
    outputs[f"kps_{stride}"][0, n] = np.arange(10) / 10


def test_decode_detections_gives_the_hand_worked_face_when_one_cell_fires() -> None:
    outputs = _silent(64, 96)
    _put(outputs, stride=16, cell=(2, 1), wide=96, box=(0.5, 0.25, math.log(1.5), math.log(2)))
    (face,) = decode_detections(outputs, scale=1.0, size=(64, 96))
    # centre (2.5, 1.25) * 16 = (40, 20), size (24, 32), score sqrt(0.81)
    np.testing.assert_allclose(face.box, (28, 4, 52, 36), atol=1e-4)
    assert face.score == pytest.approx(0.9, abs=1e-6)
    np.testing.assert_allclose(face.landmarks[0], (32, 17.6), atol=1e-4)
    np.testing.assert_allclose(face.landmarks[4], ((0.8 + 2) * 16, (0.9 + 1) * 16), atol=1e-4)
    assert face.side == pytest.approx(32)
    assert face.center == pytest.approx((40, 20))


@pytest.mark.parametrize("stride", STRIDES)
def test_decode_detections_maps_back_when_the_picture_was_scaled(stride: int) -> None:
    # A 100x50 picture looked at in 200x100, padded to 224x128.
    outputs = _silent(128, 224)
    _put(outputs, stride=stride, cell=(1, 1), wide=224, box=(0, 0, 0, 0))
    (face,) = decode_detections(outputs, scale=2.0, size=(50, 100))
    half = stride / 4
    np.testing.assert_allclose(face.box, (half, half, 3 * half, 3 * half), atol=1e-4)


def test_decode_detections_clips_the_box_and_not_the_landmarks_when_face_is_cut() -> None:
    outputs = _silent(64, 64)
    _put(outputs, stride=32, cell=(0, 0), wide=64, box=(0, 0, math.log(2), math.log(2)))
    outputs["kps_32"][0, 0, :2] = -0.5
    (face,) = decode_detections(outputs, scale=1.0, size=(60, 60))
    np.testing.assert_allclose(face.box, (0, 0, 32, 32), atol=1e-4)
    assert face.landmarks[0] == (-16.0, -16.0)


def test_decode_detections_drops_a_face_when_below_threshold_empty_or_not_finite() -> None:
    outputs = _silent(64, 64)
    _put(outputs, stride=8, cell=(1, 1), wide=64, box=(0, 0, 1, 1), score=(0.59, 0.61))
    _put(outputs, stride=8, cell=(4, 4), wide=64, box=(0, 0, np.nan, 1), score=(1, 1))
    _put(outputs, stride=8, cell=(7, 7), wide=64, box=(99, 99, 0, 0), score=(1, 1))
    assert decode_detections(outputs, scale=1.0, size=(64, 64)) == []
    # sqrt(0.59 * 0.61) = 0.5999: on the other side of the limit it is there.
    assert len(decode_detections(outputs, scale=1.0, size=(64, 64), score_threshold=0.5998)) == 1


def test_decode_detections_suppresses_the_weaker_when_boxes_overlap() -> None:
    outputs = _silent(64, 64)
    # Two 16 px boxes, 8 px apart: intersection over union 1/3.
    _put(outputs, stride=8, cell=(2, 2), wide=64, box=(0, 0, math.log(2), math.log(2)))
    _put(
        outputs, stride=8, cell=(3, 2), wide=64, box=(0, 0, math.log(2), math.log(2)), score=(1, 1)
    )
    (kept,) = decode_detections(outputs, scale=1.0, size=(64, 64), nms_iou=0.33)
    assert kept.score == 1.0
    assert len(decode_detections(outputs, scale=1.0, size=(64, 64), nms_iou=0.34)) == 2


def test_decode_detections_raises_when_outputs_belong_to_another_size() -> None:
    with pytest.raises(ValueError, match="expected"):
        decode_detections(_silent(64, 64), scale=1.0, size=(96, 64))


def test_detector_input_is_padded_bgr_when_picture_is_rgb() -> None:
    pixels = np.zeros((10, 50, 3), np.uint8)
    pixels[..., 0] = 200
    tensor, scale = detector_input(pixels, long_side=100)
    assert scale == 2.0
    assert tensor.shape == (1, 3, 32, 128)
    assert tensor.dtype == np.float32
    # Lanczos of a constant, in float32; a channel mix-up is off by 200.
    np.testing.assert_allclose(tensor[0, 2, :20, :100], 200, atol=0.01)
    assert not tensor[0, :2].any()
    assert not tensor[0, :, 20:].any()
    assert not tensor[0, :, :, 100:].any()


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ((128, 128), (512, 128)),
        ((384, 256), (512, 128)),
        ((768, 512), (768, 192)),
        ((2304, 1792), (1280, 320)),
    ],
)
def test_detection_long_sides_stay_in_the_trained_range_when_sizes_differ(
    size: tuple[int, int], sides: tuple[int, int]
) -> None:
    assert detection_long_sides(*size) == sides


def _face(x: float, score: float) -> Face:
    points = ((x, 1.0),) * 5
    return Face(box=(x, 0.0, x + 10, 10.0), score=score, landmarks=points)


def test_merge_detections_keeps_each_face_once_when_both_looks_found_it() -> None:
    merged = merge_detections([_face(0, 0.7), _face(50, 0.8)], [_face(1, 0.9)], [])
    assert [(face.box[0], face.score) for face in merged] == [(1, 0.9), (50, 0.8)]
    assert merge_detections([], []) == []


def test_scale_faces_moves_box_and_landmarks_when_picture_is_enlarged() -> None:
    (face,) = scale_faces([_face(3, 0.7)], 4)
    assert face.box == (12, 0, 52, 40)
    assert face.landmarks[2] == (12, 4)
    assert face.score == 0.7


# ------------------------------------------------------------------------ the real network

Detect = Callable[[Pixels, int], list[Face]]


@pytest.fixture(scope="module")
def detect() -> Detect:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(YUNET), options)

    def look(pixels: Pixels, long_side: int) -> list[Face]:
        tensor, scale = detector_input(pixels, long_side=long_side)
        outputs = dict(zip(OUTPUT_NAMES, session.run(OUTPUT_NAMES, {"input": tensor}), strict=True))
        return decode_detections(outputs, scale=scale, size=(pixels.shape[0], pixels.shape[1]))

    return look


@pytest.fixture(scope="module")
def world() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drawn_world", WORLD)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _overlap(a: Box, b: Box) -> float:
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return wide * high / (both - wide * high)


@needs_yunet
def test_two_looks_find_the_drawn_faces_when_yunet_is_real(
    detect: Detect, world: ModuleType
) -> None:
    found = false = 0
    for i in range(16):
        framing = ("full", "half", "portrait", "face")[i % 4]
        pixels, _, box, landmarks = world.render(1000 + i, framing, size=128)
        faces = merge_detections(*(detect(pixels, s) for s in detection_long_sides(128, 128)))
        hits = [face for face in faces if _overlap(face.box, tuple(box)) > 0.5]
        false += len(faces) - len(hits)
        found += len(hits) == 1
        if hits:
            # Within a fifth of the face; swapped x and y or right and left would be off by more.
            error = np.abs(np.array(hits[0].landmarks) - landmarks).max()
            assert error < 0.2 * hits[0].side
    assert found >= 15
    assert false <= 1


def _static_yunet(folder: Path, side: int) -> str:
    """Return a YuNet of one input size, its shape arithmetic folded: OpenCV reads no other."""
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    model = onnx.load(str(YUNET))
    shape = model.graph.input[0].type.tensor_type.shape
    for dimension, value in zip(shape.dim, (1, 3, side, side), strict=True):
        dimension.ClearField("dim_param")
        dimension.dim_value = value
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "static.onnx")
    ort.InferenceSession(model.SerializeToString(), options)
    return str(folder / "static.onnx")


@needs_yunet
@pytest.mark.parametrize("framing", ["full", "portrait", "face"])
def test_decode_detections_agrees_with_opencv_when_the_network_is_the_same(
    detect: Detect, world: ModuleType, tmp_path: Path, framing: str
) -> None:
    pixels = world.render(1002, framing, size=256)[0]
    judge = cv2.FaceDetectorYN.create(_static_yunet(tmp_path, 256), "", (256, 256), 0.6, 0.3)
    _, rows = judge.detect(np.ascontiguousarray(pixels[..., ::-1]))
    (face,) = detect(pixels, 256)
    # Same network and decoding; the engines' rounding stays far below a hundredth of a pixel.
    np.testing.assert_allclose(
        [face.box[0], face.box[1], face.width, face.height], rows[0, :4], atol=0.01
    )
    np.testing.assert_allclose(np.ravel(face.landmarks), rows[0, 4:14], atol=0.01)
    assert face.score == pytest.approx(float(rows[0, 14]), abs=1e-4)
