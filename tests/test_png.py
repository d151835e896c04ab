"""The PNG writer, read back by Pillow and by OpenCV."""

from __future__ import annotations

import io
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from closeup.png import Bytes, filter_rows, png_from_pixels


def _pictures() -> dict[str, Bytes]:
    random = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(300), np.arange(400))[:, :, None] * [1, 2, 3]
    return {
        "one pixel": np.array([[[1, 128, 255]]], np.uint8),
        "one row": random.integers(0, 256, (1, 17, 3), np.uint8),
        "one column": random.integers(0, 256, (19, 1, 3), np.uint8),
        "noise": random.integers(0, 256, (333, 501, 3), np.uint8),
        "flat": np.full((640, 640, 3), 77, np.uint8),
        "ramp": (ramp % 256).astype(np.uint8),
    }


@pytest.mark.parametrize("name", list(_pictures()))
def test_png_reads_back_equal_when_written(name: str) -> None:
    pixels = _pictures()[name]
    data = png_from_pixels(pixels, {})
    picture = Image.open(io.BytesIO(data))
    picture.load()
    np.testing.assert_array_equal(np.asarray(picture), pixels)  # exact: PNG is lossless
    read = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(read[:, :, ::-1], pixels)


def test_png_is_read_when_pixels_are_a_view_that_is_not_contiguous() -> None:
    pixels = _pictures()["noise"][::2, ::-1]
    picture = Image.open(io.BytesIO(png_from_pixels(pixels, {})))
    np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_png_keeps_texts_when_they_are_latin_and_when_not() -> None:
    texts = {"parameters": "Steps: 20, café", "title": "写真 \0 end"}
    picture = Image.open(io.BytesIO(png_from_pixels(_pictures()["one row"], texts)))
    picture.load()
    assert picture.info == {"parameters": "Steps: 20, café", "title": "写真   end"}


def test_png_is_small_when_the_picture_is_flat() -> None:
    pixels = _pictures()["flat"]
    # 1.2 MB of zeros after the first pixel; coding symbols without runs leaves an eighth of it.
    assert len(png_from_pixels(pixels, {})) < pixels.size / 100


def test_filter_takes_the_row_above_when_columns_are_constant() -> None:
    flat = np.tile(np.array([10, 200, 30, 90, 5, 250], np.uint8), (4, 1))
    rows = filter_rows(flat)
    assert rows[1:, 0].tolist() == [2, 2, 2]
    assert not rows[1:, 1:].any()


def test_filter_takes_the_left_neighbour_when_rows_are_constant() -> None:
    flat = np.repeat(np.array([[10], [200], [90]], np.uint8), 9, axis=1)
    rows = filter_rows(flat)
    assert rows[1:, 0].tolist() == [1, 1]
    assert not rows[:, 4:].any()


def test_png_checksum_is_over_all_rows_when_strips_are_joined() -> None:
    pixels = _pictures()["noise"]
    data = png_from_pixels(pixels, {})
    start = data.index(b"IDAT") + 4
    length = int.from_bytes(data[start - 8 : start - 4], "big")
    rows = filter_rows(pixels.reshape(333, -1))
    assert zlib.decompress(data[start : start + length]) == rows.tobytes()
