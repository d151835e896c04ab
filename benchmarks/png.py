"""``python -m benchmarks.png``: how long a PNG file takes to write, and how large it gets.

Ours (`closeup.images.encode_image`) against the quickest of zlib's ways, OpenCV's run-length
strategy, on a drawn picture and on the same with film grain, which photographs have.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.results import Section, section_markdown
from benchmarks.subjects import ROOT
from closeup.images import encode_image

PICTURE = ROOT / "docs" / "before_after.png"
SIDES_PX = (512, 2048)
GRAIN = 3.0  # standard deviation, of 255
REPEATS = 15
_RUN_LENGTH = [
    cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE,
]  # fmt: skip
Pixels = npt.NDArray[np.uint8]


def main() -> None:
    """Print the table."""
    print(section_markdown(measure_png()))


def measure_png(sides_px: tuple[int, ...] = SIDES_PX, repeats: int = REPEATS) -> Section:
    """Measure it.

    Args:
        sides_px: of the square pictures.
        repeats: files of each kind, in turns.
    """
    rows = [
        _row(f"{kind}, {side_px}x{side_px}", pixels, repeats)
        for side_px in sides_px
        for kind, pixels in pictures(side_px).items()
    ]
    return Section(
        title="PNG files",
        columns=("picture", "ms", "OpenCV ms", "ratio", "kB", "OpenCV kB", "ratio"),
        rows=tuple(rows),
        notes=(
            f"Medians of {repeats} files each, in turns. OpenCV: level 1, run-length strategy.",
        ),
    )


def _row(name: str, pixels: Pixels, repeats: int) -> tuple[str, ...]:
    ways = (partial(encode_image, pixels, format="png"), partial(encode_with_opencv, pixels))
    (ms, size), (other_ms, other_size) = timed_in_turns(*ways, repeats)
    return (
        name,
        f"{ms:.1f}",
        f"{other_ms:.1f}",
        f"{ms / other_ms:.2f}",
        f"{size / 1000:.0f}",
        f"{other_size / 1000:.0f}",
        f"{size / other_size:.2f}",
    )


def pictures(side_px: int) -> dict[str, Pixels]:
    """Return the same square picture drawn and with grain, uint8 (side, side, 3)."""
    with Image.open(PICTURE) as image:
        half = image.convert("RGB").crop((0, 0, image.width // 2, image.height))
    drawn = np.asarray(half.resize((side_px, side_px), Image.Resampling.BICUBIC))
    noise = np.random.default_rng(0).normal(0, GRAIN, drawn.shape)
    return {
        "drawn": drawn,
        "with grain": np.clip(drawn + noise, 0, 255).round().astype(np.uint8),
    }


def encode_with_opencv(pixels: Pixels) -> bytes:
    """Return the PNG file that OpenCV writes quickest."""
    _, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), _RUN_LENGTH)
    return bytes(encoded.tobytes())


def timed_in_turns(
    first: Callable[[], bytes], second: Callable[[], bytes], repeats: int
) -> tuple[tuple[float, int], tuple[float, int]]:
    """Return the median milliseconds and the bytes of each."""
    times: tuple[list[float], list[float]] = ([], [])
    sizes = [0, 0]
    for _ in range(repeats):
        for index, encode in enumerate((first, second)):
            started_s = time.perf_counter()
            sizes[index] = len(encode())
            times[index].append(1000 * (time.perf_counter() - started_s))
    return (statistics.median(times[0]), sizes[0]), (statistics.median(times[1]), sizes[1])


if __name__ == "__main__":
    main()
