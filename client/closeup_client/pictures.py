"""Pictures on their way in: whatever the caller holds becomes the bytes of an image file."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SUFFIXES = ((b"\x89PNG", ".png"), (b"\xff\xd8\xff", ".jpg"), (b"RIFF", ".webp"))
_PNG_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}


def bytes_from_picture(picture: Any) -> bytes:
    """The bytes of an image file.

    Args:
        picture: the file's bytes, its `pathlib.Path`, a PIL image, or an array (H, W), (H, W, 3)
            or (H, W, 4) uint8; the last two are sent as PNG.

    Raises:
        TypeError: the value is none of these. Text is refused, since it could be a path or
            base64.
        ValueError: the file cannot be read, is empty, or the array has another shape or type.
    """
    if isinstance(picture, (bytes, bytearray, memoryview)):
        data = bytes(picture)
    elif isinstance(picture, Path):
        try:
            data = picture.read_bytes()
        except OSError as error:
            reason = (error.strerror or "cannot be read").lower()
            raise ValueError(f"cannot read {picture}: {reason}.") from None
    elif isinstance(picture, np.ndarray):
        data = png_from_array(picture)
    elif hasattr(picture, "save") and hasattr(picture, "mode"):
        data = _png_from_pil(picture)
    else:
        raise TypeError(type(picture).__name__)
    if not data:
        raise ValueError("is an empty picture; expected PNG, JPEG or WebP.")
    return data


def png_from_array(pixels: NDArray[Any]) -> bytes:
    """A PNG file of an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8.

    Source: the PNG specification (ISO/IEC 15948), chunks IHDR, IDAT, IEND, filter 0.
    """
    channels = 1 if pixels.ndim == 2 else (pixels.shape[2] if pixels.ndim == 3 else 0)
    if pixels.dtype != np.uint8 or channels not in _PNG_COLOUR_TYPES or pixels.size == 0:
        raise ValueError(
            f"is an array of shape {pixels.shape} and type {pixels.dtype}; expected (H, W), "
            "(H, W, 3) or (H, W, 4) of uint8."
        )
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # a filter byte before each row
    rows[:, 1:] = pixels.reshape(height, width * channels)
    header = struct.pack(">IIBBBBB", width, height, 8, _PNG_COLOUR_TYPES[channels], 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 6)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(name, body) for name, body in chunks)


def _png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _png_from_pil(picture: Any) -> bytes:
    if picture.mode not in ("1", "L", "P", "RGB", "RGBA"):
        picture = picture.convert("RGB")
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def suffix_from_bytes(data: bytes) -> str:
    """The file name's ending that fits an image file: ``.png``, ``.jpg``, ``.webp`` or ``.bin``."""
    return next((suffix for magic, suffix in _SUFFIXES if data.startswith(magic)), ".bin")
