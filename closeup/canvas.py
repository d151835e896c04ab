"""How large the picture is that a request paints, and its input picture and mask at that size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from closeup.errors import RequestError
from closeup.fields import ASPECT_RATIOS, FIELD_BY_NAME, LEGACY_ASPECTS
from closeup.images import decode_image, floats_from_pixels, pixels_from_floats, resize
from closeup.manifest import ModelManifest
from closeup.options import Options
from closeup.request_rules import (
    Limits,
    Mode,
    check_engine_sizes,
    check_final_size,
    check_pixels,
    wants_super_resolution,
)

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]

SIDE_FIELDS = ("w", "h")


@dataclass(frozen=True, kw_only=True, slots=True)
class Canvas:
    """What a request paints on.

    Attributes:
        width: of the picture to paint, px.
        height: see width.
        image: uint8 (height, width, 3), the input picture; None for text-to-image.
        mask: uint8 (height, width); None without one.
        stretched_from: (width, height) of an input picture of another shape; None where its
            shape was kept.
    """

    width: int
    height: int
    image: Pixels | None
    mask: Pixels | None
    stretched_from: Size | None


def open_canvas(options: Options, mode: Mode, model: ModelManifest, limits: Limits) -> Canvas:
    """Decode the pictures of a request, choose the size, bring them to it.

    Raises:
        RequestError: a picture cannot be read, or the size is none that this server paints.
    """
    image, mask = _pictures(options, limits)
    given = None if image is None else (image.shape[1], image.shape[0])
    if mode is Mode.UPSCALE:
        assert given is not None
        width, height = given
    else:
        width, height = picture_size(options, model, given, limits)
    check_pixels(options, mode, limits, width=width, height=height)
    check_engine_sizes(options, mode, model, width=width, height=height)
    enlarged = wants_super_resolution(options, mode)
    check_final_size(options, width=width, height=height, enlarged=enlarged)
    stretched = given is not None and _is_stretched(given, (width, height), model)
    if image is not None and given != (width, height):
        image = _resized(image, (height, width))
        mask = None if mask is None else _resized(mask, (height, width))
    return Canvas(
        width=width,
        height=height,
        image=image,
        mask=mask,
        stretched_from=given if stretched else None,
    )


def picture_size(
    options: Options, model: ModelManifest, image: Size | None, limits: Limits
) -> Size:
    """Return width and height before super-resolution.

    Both sides where both are given. A side that is missing follows from the other by
    ``aspect_ratio``, else by the input picture's shape, else it is the model's. Without either
    side the number of pixels is the input picture's, as far as they are allowed, else the
    model's; and the shape is ``aspect_ratio``'s, the picture's, or the model's.

    Args:
        options: of the request.
        model: that paints.
        image: (width, height) of the input picture; None without one.
        limits: of the server.
    """
    step = model.facts.size_step_px
    usual = (model.defaults.width or model.native_px, model.defaults.height or model.native_px)
    ratio = _ratio(options, image)
    given = [name for name in SIDE_FIELDS if name in options]
    if len(given) == len(SIDE_FIELDS) or (given and ratio is None):
        sides: Sequence[float] = [
            int(options.get(name, side)) for name, side in zip(SIDE_FIELDS, usual, strict=True)
        ]
    elif given:
        assert ratio is not None  # else the branch above
        side = int(options[given[0]])
        sides = (side, side / ratio) if given == ["w"] else (side * ratio, side)
    else:
        across, down = image or usual
        shape = across / down if ratio is None else ratio
        sides = (math.sqrt(across * down * shape), math.sqrt(across * down / shape))
        if image is not None:
            sides = _allowed(sides, limits)
    width, height = (_fit(side, step) for side in sides)
    if image is not None and not given and width * height > limits.max_pixels:
        width, height = (_fit(side - step / 2, step) for side in sides)
    return width, height


def _ratio(options: Options, image: Size | None) -> float | None:
    """Width over height that is asked for: by name, or by the input picture."""
    named = options.get("aspect_ratio") or LEGACY_ASPECTS.get(str(options.get("ar")))
    if named:
        across, down = ASPECT_RATIOS[str(named)]
        return across / down
    return None if image is None else image[0] / image[1]


def _allowed(sides: Sequence[float], limits: Limits) -> Sequence[float]:
    """Bring both sides, by one factor, to what a picture may have."""
    least, most = _side_range()
    shrink = min(1.0, most / max(sides), math.sqrt(limits.max_pixels / (sides[0] * sides[1])))
    grow = max(1.0, least / min(sides))
    factor = shrink if shrink < 1 else min(grow, most / max(sides))
    return [side * factor for side in sides]


def _side_range() -> tuple[float, float]:
    side_field = FIELD_BY_NAME["w"]
    assert side_field.minimum is not None
    assert side_field.maximum is not None
    return side_field.minimum, side_field.maximum


def _fit(side: float, step: int) -> int:
    least, most = _side_range()
    return int(min(max(int(side / step + 0.5) * step, least), most))


def _is_stretched(given: Size, size: Size, model: ModelManifest) -> bool:
    """Whether the shape changed by more than the rounding of the sides."""
    factor = math.sqrt(size[0] * size[1] / (given[0] * given[1]))
    step = model.facts.size_step_px
    return any(abs(side - factor * old) > step for side, old in zip(size, given, strict=True))


def _pictures(options: Options, limits: Limits) -> tuple[Pixels | None, Pixels | None]:
    if "input_image" not in options:
        return None, None
    image = _decoded(options, "input_image", limits, "rgb")
    if "mask_image" not in options:
        return image, None
    mask = _decoded(options, "mask_image", limits, "mask")
    if mask.shape != image.shape[:2]:
        given, wanted = (f"{a.shape[1]}x{a.shape[0]}" for a in (mask, image))
        raise RequestError(
            {"mask_image": f"is {given}, input_image is {wanted}; send them in the same size."}
        )
    return image, mask


def _resized(pixels: Pixels, size: Size) -> Pixels:
    return pixels_from_floats(resize(floats_from_pixels(pixels), size))


def _decoded(options: Options, name: str, limits: Limits, mode: Any) -> Pixels:
    data = options[name]
    assert isinstance(data, bytes)
    return decode_image(data, field=name, max_pixels=limits.max_input_pixels, mode=mode)
