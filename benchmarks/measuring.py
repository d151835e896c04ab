"""Numbers from samples: medians, ratios, agreement of two pictures. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two sides measured in turns.

    Attributes:
        ours: median of our samples.
        theirs: median of theirs.
        ratio: median of the ratios of neighbouring samples, which a slow drift of the machine's
            load leaves alone.
        spread: (lower, upper) quartile of those ratios.
    """

    ours: float
    theirs: float
    ratio: float
    spread: tuple[float, float]


def compare_pairs(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Compare samples that were taken alternately.

    Raises:
        ValueError: no samples, or a different number of them.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} samples; expected equally many, not 0.")
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    low, high = np.quantile(ratios, [0.25, 0.75])
    return Comparison(
        ours=statistics.median(ours),
        theirs=statistics.median(theirs),
        ratio=statistics.median(ratios),
        spread=(float(low), float(high)),
    )


def median_by_name(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each name over samples that all have the same names."""
    return {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}


def psnr_db(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures of one shape, dB; infinite when equal.

    Raises:
        ValueError: the shapes differ.
    """
    if one.shape != other.shape:
        raise ValueError(f"the pictures are {one.shape} and {other.shape}; expected one shape.")
    error = float(((one.astype(np.float64) - other.astype(np.float64)) ** 2).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
