"""The picture sizes and batches that plans are built for, as the command line gives them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from closeup.errors import ExportError
from closeup.manifest import SizeRange

_ITEM = re.compile(r"(\d+)x(\d+)(?:-(\d+)x(\d+))?")
MIN_PX, MAX_PX = 64, 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """A size that varies: the smallest, the one to be quickest at, the largest."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"expected 1 <= {self.min} <= {self.opt} <= {self.max}")

    @classmethod
    def fixed(cls, size: int) -> Side:
        """Return a size that does not vary after all."""
        return cls(min=size, opt=size, max=size)

    @classmethod
    def up_to(cls, largest: int, opt: int | None = None) -> Side:
        """Return sizes from 1 on, the largest preferred unless told otherwise."""
        return cls(min=1, opt=largest if opt is None else opt, max=largest)

    def over(self, factor: int) -> Side:
        """Return the side in units of ``factor``."""
        return Side(min=self.min // factor, opt=self.opt // factor, max=self.max // factor)


def parse_sizes(text: str) -> tuple[SizeRange, ...]:
    """Read ``--sizes 512x512,768x1024`` or ``256x256-1024x1024``, width first, px.

    Raises:
        ExportError: anything else, or a size that no model paints.
    """
    sizes = []
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise ExportError(
                f"--sizes {text}: {item.strip()!r} is no size; expected WIDTHxHEIGHT, e.g. "
                "512x512,768x1024, or a range, e.g. 512x512-1024x1024."
            )
        numbers = [int(number) for number in match.groups(default="0")]
        low, high = numbers[:2], numbers[2:] if match[3] else numbers[:2]
        if not (MIN_PX <= low[0] <= high[0] <= MAX_PX and MIN_PX <= low[1] <= high[1] <= MAX_PX):
            raise ExportError(
                f"--sizes {text}: {item.strip()} must lie within {MIN_PX} and {MAX_PX} px a side, "
                "the smaller size of a range first."
            )
        sizes.append(
            SizeRange(min_width=low[0], max_width=high[0], min_height=low[1], max_height=high[1])
        )
    return tuple(dict.fromkeys(sizes))


def default_sizes(native_px: int, step_px: int) -> tuple[SizeRange, ...]:
    """Return the range around a model's native size that serves every named aspect ratio."""
    low = max(MIN_PX, native_px // 2 // step_px * step_px)
    high = native_px * 25 // 16 // step_px * step_px  # 21:9 is 1.53 native sides long
    return (SizeRange(min_width=low, max_width=high, min_height=low, max_height=high),)


def with_native(sizes: tuple[SizeRange, ...], native_px: int) -> tuple[SizeRange, ...]:
    """Add the native square, which the face pass paints at, where no size takes it."""
    if any(size.takes(native_px, native_px) for size in sizes):
        return sizes
    square = SizeRange(
        min_width=native_px, max_width=native_px, min_height=native_px, max_height=native_px
    )
    return (*sizes, square)


def check_steps(sizes: tuple[SizeRange, ...], step_px: int) -> None:
    """Refuse sizes that the model cannot paint.

    Raises:
        ExportError: a limit is no multiple of ``step_px``.
    """
    for size in sizes:
        for side in (size.min_width, size.max_width, size.min_height, size.max_height):
            if side % step_px:
                raise ExportError(
                    f"--sizes {size}: {side} is no multiple of {step_px}, the model's step; take "
                    f"{side // step_px * step_px} or {-(-side // step_px) * step_px}."
                )
