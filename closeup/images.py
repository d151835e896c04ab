"""Pictures in and out: decoding untrusted bytes, encoding with metadata, resizing.

Everywhere else a picture is either ``uint8 RGB (H, W, 3)`` or ``float32 RGB (H, W, 3) in [0, 1]``;
:func:`floats_from_pixels` and :func:`pixels_from_floats` are the only two ways between them.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from isal import isal_zlib
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from closeup.errors import ModelError, RequestError

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
ImageMode = Literal["rgb", "mask"]
ImageFormat = Literal["png", "jpeg", "webp"]
ResizeHow = Literal["auto", "area", "linear", "cubic", "lanczos"]

FORMATS: tuple[ImageFormat, ...] = ("png", "jpeg", "webp")
#: The keyword under which generation parameters are looked for by other programs.
PARAMETERS_KEY = "parameters"

_DEFAULT_QUALITY = {"jpeg": 95, "webp": 92}
# A JPEG segment holds 65,533 bytes; this leaves room for the other tags.
_MAX_COMMENT_BYTES = 60_000
# Everything Pillow's decoders are known to raise on damaged files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)
_INTERPOLATION = {
    "area": cv2.INTER_AREA,
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "lanczos": cv2.INTER_LANCZOS4,
}
_log = logging.getLogger(__name__)


def floats_from_pixels(pixels: Pixels) -> Floats:
    """Convert bytes to floats.

    Args:
        pixels: any shape, uint8.

    Returns:
        The same shape, float32 in [0, 1].
    """
    return np.divide(pixels, np.float32(255.0), dtype=np.float32)


def pixels_from_floats(floats: Floats) -> Pixels:
    """Convert floats to bytes: clamp, scale, round half to even, cast.

    Args:
        floats: any shape of 1 to 3 dimensions, float32; values outside [0, 1] are clamped.

    Returns:
        The same shape, uint8.

    Raises:
        ModelError: some values are not numbers (NaN), which a cast would turn into black.
    """
    planes = _planes_of(floats)
    if planes is not None:
        merged: Pixels = cv2.merge(list(_bytes_from_floats(planes)))
        return merged
    return _bytes_from_floats(np.ascontiguousarray(floats, dtype=np.float32))


def _bytes_from_floats(floats: Floats) -> Pixels:
    flat = floats.reshape(1, -1)
    lowest, highest = float(flat.min(initial=0)), float(flat.max(initial=0))
    if math.isnan(lowest):  # both pass a NaN on
        raise ModelError(
            "The picture holds values that are not numbers, expected floats in [0, 1]: "
            "run the VAE in bf16 or fp32."
        )
    if lowest < 0 or highest > 1:
        flat = cv2.min(cv2.max(flat, 0.0), 1.0)
    # OpenCV's product into bytes rounds half to even; the matrix is one row, so that the scalar
    # applies to every channel.
    pixels: Pixels = cv2.multiply(flat, 255.0, dtype=cv2.CV_8U).reshape(floats.shape)
    return pixels


def _planes_of(floats: Floats) -> Floats | None:
    """Return (3, H, W) where that is how a picture (H, W, 3) lies in memory, else None.

    Networks answer in colour planes; a transposed view of those is a picture. OpenCV brings it
    into the order of pixels at twenty times NumPy's speed.
    """
    if floats.ndim != 3 or floats.shape[2] != 3 or floats.dtype != np.float32:
        return None
    planes = floats.transpose(2, 0, 1)
    out_of_order = planes.flags.c_contiguous and not floats.flags.c_contiguous
    return planes if out_of_order else None


def _in_pixel_order(floats: Floats) -> Floats:
    """Return the same picture or mask, contiguous, float32."""
    planes = _planes_of(floats)
    if planes is not None:
        merged: Floats = cv2.merge(list(planes))
        return merged
    return np.ascontiguousarray(floats, dtype=np.float32)


def resize(floats: Floats, size: tuple[int, int], *, how: ResizeHow = "auto") -> Floats:
    """Resize a picture or a mask.

    Args:
        floats: (H, W, 3) or (H, W) float32 in [0, 1].
        size: (height, width) wanted, px.
        how: ``auto`` averages areas along an axis that shrinks and uses Lanczos along one that
            grows; the others use that kernel for both (only ``area`` prevents aliasing).

    Returns:
        float32 of the size asked for, in [0, 1] (overshoot of the kernels is clamped); the input
        itself when it has that size already.
    """
    height, width = floats.shape[:2]
    if (height, width) == size:
        return floats
    if how != "auto":
        return _resize(floats, size, _INTERPOLATION[how])
    # OpenCV averages areas only when neither axis grows, so the axes that shrink go first.
    smaller = (min(height, size[0]), min(width, size[1]))
    if smaller != (height, width):
        floats = _resize(floats, smaller, cv2.INTER_AREA)
    return _resize(floats, size, cv2.INTER_LANCZOS4) if smaller != size else floats


def _resize(floats: Floats, size: tuple[int, int], interpolation: int) -> Floats:
    resized: Floats = cv2.resize(
        _in_pixel_order(floats), (size[1], size[0]), interpolation=interpolation
    )
    if interpolation in (cv2.INTER_CUBIC, cv2.INTER_LANCZOS4):
        np.clip(resized, 0.0, 1.0, out=resized)
    return resized


# ---------------------------------------------------------------------------------- decoding


def decode_image(data: bytes, *, field: str, max_pixels: int, mode: ImageMode = "rgb") -> Pixels:
    """Decode one still picture that a client sent.

    The header is read and judged before any pixel is decoded. Orientation tags are applied,
    transparency is laid over white (over black for a mask: what is transparent is not repainted),
    16-bit and CMYK files are converted to 8-bit RGB.

    Args:
        data: the bytes of a PNG, JPEG or WebP file.
        field: name of the request field, used in errors.
        max_pixels: the most pixels (width x height) that are accepted.
        mode: ``rgb`` or ``mask`` (one channel of luminance).

    Returns:
        (H, W, 3) uint8 for ``rgb``, (H, W) uint8 for ``mask``.

    Raises:
        RequestError: the bytes are not one acceptable still picture; nothing was decoded, or the
            decoder stopped at the damage.
    """
    if not data:
        raise _refused(field, "is empty", "send the bytes of a PNG, JPEG or WebP file")
    with _decoder_errors(field, data, max_pixels):
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    _check_header(image, field, max_pixels)
    with _decoder_errors(field, data, max_pixels):
        image.load()
        upright = ImageOps.exif_transpose(image)
        return _mask_of(upright) if mode == "mask" else _rgb_of(upright)


def _refused(field: str, given: str, remedy: str) -> RequestError:
    return RequestError({field: f"{given}; {remedy}."})


@contextlib.contextmanager
def _decoder_errors(field: str, data: bytes, max_pixels: int) -> Iterator[None]:
    """Turn what Pillow raises into a RequestError."""
    try:
        yield
    # The warning comes as an error where an interpreter runs with -W error.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        declared = re.search(r"\d+", str(error))
        count = f"{int(declared[0]):,}" if declared else "too many"
        raise _refused(
            field, f"declares {count} pixels", f"send a picture of at most {max_pixels:,} pixels"
        ) from None
    except UnidentifiedImageError:
        raise _refused(
            field,
            f"holds {len(data):,} bytes that are no picture this server reads",
            "send a PNG, JPEG or WebP file",
        ) from None
    except _DECODE_ERRORS as error:
        _log.debug("decoding %s failed: %r", field, error)
        raise _refused(
            field, "is damaged or cut short and cannot be decoded", "send the whole file again"
        ) from None


def _check_header(image: Image.Image, field: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1 or width * height > max_pixels:
        raise _refused(
            field,
            f"is {width}x{height} = {width * height:,} pixels",
            f"send a picture of 1 to {max_pixels:,} pixels",
        )
    # Phones write a JPEG with a second picture (MPO) for depth or a preview: the first is meant.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise _refused(field, f"is an animation of {frames} frames", "send one still picture")


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _eight_bit_gray(image: Image.Image) -> Image.Image:
    """Scale a 16-bit gray picture to 8 bits, rounding (Pillow's own conversion clips)."""
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.rint(np.clip(values, 0, 65535) / 257.0).astype(np.uint8))


def _laid_over(image: Image.Image, shade: int) -> Image.Image:
    """Return the picture as RGB, its transparency laid over a gray of ``shade``."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layers = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (shade, shade, shade, 255))
        return Image.alpha_composite(ground, layers).convert("RGB")
    return image.convert("RGB")


def _rgb_of(image: Image.Image) -> Pixels:
    if _is_deep(image):
        image = _eight_bit_gray(image)
    return np.array(_laid_over(image, 255), dtype=np.uint8)


def _mask_of(image: Image.Image) -> Pixels:
    if _is_deep(image):
        image = _eight_bit_gray(image)
    return np.array(_laid_over(image, 0).convert("L"), dtype=np.uint8)


# ---------------------------------------------------------------------------------- encoding


def encode_image(
    pixels: Pixels,
    *,
    format: ImageFormat,
    quality: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Encode a picture, with what made it in its metadata.

    PNG: each entry is an ``iTXt`` (or, in Latin-1, ``tEXt``) chunk. JPEG and WebP: the entry
    ``parameters`` is the EXIF UserComment, the others are one JSON object in ImageDescription.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        format: ``png`` (compressed quickly rather than tightly), ``jpeg`` (no chroma
            subsampling from quality 90 on) or ``webp``.
        quality: 1 to 100 for ``jpeg`` (default 95) and ``webp`` (92); ``png`` is lossless and
            must have None.
        metadata: keyword -> text.

    Returns:
        The file's bytes.

    Raises:
        ValueError: a quality for ``png``, or an unknown format.
    """
    texts = dict(metadata or {})
    if format == "png":
        if quality is not None:
            raise ValueError(f"quality is {quality}, but PNG is lossless: leave it out.")
        return _png(pixels, texts)
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}.")
    quality = _DEFAULT_QUALITY[format] if quality is None else quality
    options: dict[str, Any] = {"quality": quality}
    if format == "jpeg":
        options["subsampling"] = 0 if quality >= 90 else 2
    else:
        options["method"] = 2
    if texts:
        options["exif"] = _exif(texts)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format.upper(), **options)
    return file.getvalue()


def _png(pixels: Pixels, texts: Mapping[str, str]) -> bytes:
    height, width = pixels.shape[:2]
    rows = np.ascontiguousarray(pixels).reshape(height, 3 * width)
    # Every row as its difference to the one above (filter 2), compressed by Intel's deflate;
    # `python -m benchmarks.png` compares it with the quickest way of zlib.
    filtered = np.empty((height, 1 + 3 * width), np.uint8)
    filtered[:, 0] = 2
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            *(_text_chunk(key, text) for key, text in texts.items()),
            _chunk(b"IDAT", isal_zlib.compress(filtered, level=1)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    check = isal_zlib.crc32(body, isal_zlib.crc32(kind))
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def _text_chunk(key: str, text: str) -> bytes:
    """Return one text chunk: tEXt where Latin-1 can hold it, else iTXt in UTF-8."""
    keyword = key.encode("latin-1", "replace").replace(b"\0", b" ")[:79] or b"Comment"
    # Chunks end keyword and text with NUL, so a NUL inside would cut them.
    text = text.replace("\0", " ")
    try:
        kind, body = b"tEXt", keyword + b"\0" + text.encode("latin-1")
    except UnicodeEncodeError:
        kind, body = b"iTXt", keyword + b"\0\0\0\0\0" + text.encode("utf-8", "replace")
    return _chunk(kind, body)


def _exif(texts: Mapping[str, str]) -> Image.Exif:
    exif = Image.Exif()
    others = {key: text for key, text in texts.items() if key != PARAMETERS_KEY}
    if others:
        exif[ExifTags.Base.ImageDescription] = json.dumps(others)[:_MAX_COMMENT_BYTES]
    if PARAMETERS_KEY in texts:
        room = _MAX_COMMENT_BYTES - len(exif.get(ExifTags.Base.ImageDescription, ""))
        comment = texts[PARAMETERS_KEY].encode("utf-16-be", "replace")[: max(0, room) & ~1]
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + comment
    return exif


def read_metadata(data: bytes) -> dict[str, str]:
    """Read back what :func:`encode_image` wrote.

    Args:
        data: the bytes of a file that this project made.

    Returns:
        keyword -> text, in no particular order.
    """
    image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    if isinstance(image, PngImagePlugin.PngImageFile):
        return {str(key): str(text) for key, text in image.text.items()}
    exif = image.getexif()
    texts: dict[str, str] = {}
    if ExifTags.Base.ImageDescription in exif:
        texts.update(json.loads(exif[ExifTags.Base.ImageDescription]))
    comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if comment is not None:
        texts[PARAMETERS_KEY] = bytes(comment)[8:].decode("utf-16-be", "replace")
    return texts
