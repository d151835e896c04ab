"""Decoding untrusted bytes, encoding with metadata, converting and resizing."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from closeup.errors import ModelError, RequestError
from closeup.images import (
    ImageFormat,
    Pixels,
    decode_image,
    encode_image,
    floats_from_pixels,
    pixels_from_floats,
    read_metadata,
    resize,
)

LIMIT = 4_000_000


def _file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _noise(height: int = 20, width: int = 30) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _bare_png(width: int, height: int) -> bytes:
    """Return a PNG whose header promises any size and whose data is nearly empty."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def _refusal(data: bytes, *, max_pixels: int = LIMIT) -> str:
    with pytest.raises(RequestError) as caught:
        decode_image(data, field="input_image", max_pixels=max_pixels)
    assert list(caught.value.problems) == ["input_image"]
    return caught.value.problems["input_image"]


def test_decode_image_returns_the_pixels_when_png_is_plain() -> None:
    pixels = _noise()
    decoded = decode_image(_file(Image.fromarray(pixels)), field="input_image", max_pixels=LIMIT)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("keep", [0, 5, 30, 60, 20_000, -200])
def test_decode_image_refuses_when_png_is_truncated(keep: int) -> None:
    data = _file(Image.fromarray(_noise(200, 200)))
    assert "send" in _refusal(data[:keep])


def test_decode_image_refuses_when_a_byte_is_damaged() -> None:
    data = bytearray(_file(Image.fromarray(_noise(200, 200))))
    data[len(data) // 2] ^= 0xFF
    assert "damaged" in _refusal(bytes(data))


def test_decode_image_never_raises_another_error_when_bytes_are_random() -> None:
    rng = np.random.default_rng(1)
    sources = [
        _file(Image.fromarray(_noise(40, 40)), kind, **options)
        for kind, options in (("PNG", {}), ("JPEG", {"exif": _orientation(6)}), ("WEBP", {}))
    ]
    refused = 0
    for _ in range(300):
        data = bytearray(sources[rng.integers(3)])
        for place in rng.integers(0, len(data), 8):
            data[place] = rng.integers(256)
        try:
            decode_image(bytes(data), field="input_image", max_pixels=LIMIT)
        except RequestError:
            refused += 1
    assert refused > 100  # the damage is real: most PNGs fail their checksums


@pytest.mark.parametrize("side", [40_000, 10_000])
def test_decode_image_refuses_before_decoding_when_header_promises_too_much(side: int) -> None:
    sentence = _refusal(_bare_png(side, side))
    assert f"{side * side:,}" in sentence
    assert f"{LIMIT:,}" in sentence


def test_decode_image_accepts_the_limit_and_refuses_one_row_more() -> None:
    assert decode_image(
        _file(Image.fromarray(_noise(20, 30))), field="x", max_pixels=600
    ).shape == (20, 30, 3)
    assert "30x21" in _refusal(_file(Image.fromarray(_noise(21, 30))), max_pixels=600)


@pytest.mark.parametrize("data", [b"", b"hello", b"%PDF-1.4 ...", b"GIF89a" + b"\0" * 50])
def test_decode_image_refuses_when_bytes_are_no_picture(data: bytes) -> None:
    assert "PNG, JPEG or WebP" in _refusal(data)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_decode_image_refuses_when_picture_is_animated(kind: str) -> None:
    frames = [Image.fromarray(_noise()), Image.fromarray(255 - _noise())]
    data = _file(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert "animation of 2 frames" in _refusal(data)


def test_decode_image_lays_transparency_over_white_when_rgb_and_black_when_mask() -> None:
    layers = np.zeros((4, 4, 4), np.uint8)
    layers[:2] = (200, 200, 200, 255)
    data = _file(Image.fromarray(layers, "RGBA"))
    rgb = decode_image(data, field="x", max_pixels=LIMIT)
    mask = decode_image(data, field="x", max_pixels=LIMIT, mode="mask")
    assert rgb[0, 0].tolist() == [200, 200, 200]
    assert rgb[3, 3].tolist() == [255, 255, 255]
    assert mask.shape == (4, 4)
    assert [int(mask[0, 0]), int(mask[3, 3])] == [200, 0]


def test_decode_image_looks_colours_up_when_palette_has_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    decoded = decode_image(_file(image, transparency=1), field="x", max_pixels=LIMIT)
    assert decoded[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_decode_image_scales_when_gray_has_16_bits() -> None:
    values = np.array([[0, 257 * 7, 257 * 128, 65535]], np.uint16)
    decoded = decode_image(_file(Image.fromarray(values)), field="x", max_pixels=LIMIT, mode="mask")
    assert decoded.tolist() == [[0, 7, 128, 255]]


def test_decode_image_converts_when_jpeg_is_cmyk() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    decoded = decode_image(_file(image, "JPEG", quality=95), field="x", max_pixels=LIMIT)
    # JPEG rounding of a flat colour stays within a few steps; a missed inversion is off by 255.
    np.testing.assert_allclose(decoded[8, 8].astype(int), [255, 0, 0], atol=6)


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_decode_image_turns_the_picture_when_exif_says_so() -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, :12] = 255  # left half white; orientation 6 turns it clockwise: top half white
    data = _file(Image.fromarray(pixels), "JPEG", quality=95, exif=_orientation(6))
    decoded = decode_image(data, field="x", max_pixels=LIMIT)
    assert decoded.shape == (24, 8, 3)
    assert decoded[2].mean() > 250
    assert decoded[-3].mean() < 5


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("text", ["a wood, Steps: 20", 'ünï "語" 🙂\nline two, Seed: 7'])
def test_encode_image_keeps_metadata_when_read_back(format: ImageFormat, text: str) -> None:
    metadata = {"parameters": text, "closeup": '{"seed": 7}'}
    data = encode_image(_noise(), format=format, metadata=metadata)
    assert read_metadata(data) == metadata
    assert decode_image(data, field="x", max_pixels=LIMIT).shape == (20, 30, 3)


def test_encode_image_writes_the_keyword_other_programs_read_when_png() -> None:
    image = Image.open(
        io.BytesIO(encode_image(_noise(), format="png", metadata={"parameters": "é"}))
    )
    image.load()
    assert image.info["parameters"] == "é"


def test_encode_image_loses_nothing_when_png() -> None:
    data = encode_image(_noise(), format="png")
    np.testing.assert_array_equal(decode_image(data, field="x", max_pixels=LIMIT), _noise())


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_encode_image_obeys_quality_when_lossy(format: ImageFormat) -> None:
    sizes = [len(encode_image(_noise(64, 64), format=format, quality=q)) for q in (20, 60, 95)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.6 * sizes[2]


def test_encode_image_cuts_the_comment_when_it_exceeds_a_jpeg_segment() -> None:
    data = encode_image(_noise(), format="jpeg", metadata={"parameters": "x" * 100_000})
    kept = read_metadata(data)["parameters"]
    assert 20_000 < len(kept) < 40_000


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (33, 50), (512, 300)])
def test_png_is_read_by_other_decoders_when_of_any_size(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    data = encode_image(pixels[:, ::-1], format="png", metadata={"parameters": "x"})
    read = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(read[:, ::-1, ::-1], pixels)
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # checks every chunk's sum
        np.testing.assert_array_equal(np.asarray(image), pixels[:, ::-1])


def test_encode_image_raises_when_png_gets_a_quality() -> None:
    with pytest.raises(ValueError, match="lossless"):
        encode_image(_noise(), format="png", quality=90)


def test_pixels_from_floats_inverts_floats_from_pixels_when_all_bytes_are_tried() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    floats = floats_from_pixels(every)
    assert floats.dtype == np.float32
    assert float(floats.max()) == 1.0
    np.testing.assert_array_equal(pixels_from_floats(floats), every)


def test_pixels_from_floats_clamps_and_rounds_when_values_are_between_or_outside() -> None:
    floats = np.array([-np.inf, 0.49 / 255, 0.51 / 255, 254.51 / 255, 1e9, np.inf], np.float32)
    assert pixels_from_floats(floats).tolist() == [0, 0, 1, 255, 255, 255]


def test_pixels_from_floats_raises_when_a_value_is_nan() -> None:
    floats = np.zeros((4, 4, 3), np.float32)
    floats[1, 2, 0] = np.nan
    with pytest.raises(ModelError, match="bf16"):
        pixels_from_floats(floats)


def test_pictures_in_colour_planes_give_the_same_when_converted_or_resized() -> None:
    floats = np.random.default_rng(1).random((40, 24, 3), dtype=np.float32) * 1.2 - 0.1
    planes = np.ascontiguousarray(floats.transpose(2, 0, 1)).transpose(1, 2, 0)
    assert not planes.flags.c_contiguous
    expected = np.rint(np.clip(floats, 0, 1).astype(np.float64) * 255).astype(np.uint8)
    for picture in (floats, planes, floats[:, ::-1][:, ::-1]):
        np.testing.assert_array_equal(pixels_from_floats(picture), expected)
        np.testing.assert_array_equal(resize(picture, (17, 60)), resize(floats, (17, 60)))
    planes[3, 2, 1] = np.nan
    with pytest.raises(ModelError, match="bf16"):
        pixels_from_floats(planes)


def test_resize_averages_areas_when_shrinking() -> None:
    floats = np.random.default_rng(0).random((12, 18, 3), dtype=np.float32)
    expected = floats.reshape(4, 3, 6, 3, 3).mean(axis=(1, 3))
    # Summation order only; picking nearest pixels instead is off by more than 0.3.
    np.testing.assert_allclose(resize(floats, (4, 6)), expected, atol=1e-6)


def test_resize_averages_the_axis_that_shrinks_when_the_other_grows() -> None:
    stripes = np.zeros((64, 8), np.float32)
    stripes[::2] = 1.0
    resized = resize(stripes, (16, 16))
    # Every fourth row averaged is 0.5 exactly; aliasing would give 0 or 1.
    np.testing.assert_allclose(resized, 0.5, atol=1e-5)


def test_resize_stays_in_range_when_lanczos_overshoots() -> None:
    step = np.zeros((8, 8), np.float32)
    step[:, 4:] = 1.0
    resized = resize(step, (32, 32))
    assert float(resized.min()) >= 0.0
    assert float(resized.max()) <= 1.0
    assert abs(float(resized.mean()) - 0.5) < 0.01  # a shift by half a pixel gives 0.0625
