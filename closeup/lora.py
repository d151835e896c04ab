"""LoRAs as rows of a network's bank, and sums of several LoRAs.

A LoRA adds ``(alpha / rank) B A`` to a layer's weight. In the bank a layer owns ``in`` rows of
``A`` transposed and ``out`` rows of ``B``, each r wide (see `closeup.manifest.LoraLayout`). The
sum of several LoRAs is their concatenation along the rank, since
``w1 B1 A1 + w2 B2 A2 = [w1 B1, w2 B2] [A1; A2]``; what is wider than the engine allows is replaced
by its best approximation of that rank.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1; Eckart
and Young 1936 for the approximation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from closeup.manifest import LoraLayout

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoraWeights:
    """One LoRA, or a sum of several, laid out for one network's bank.

    Attributes:
        name: for messages.
        rows: (M, r) float32, r >= 1; alpha, rank and weight are folded into the rows of B.
        ranks: columns that each layer of the layout really uses, 0 for layers it leaves alone.
        warnings: sentences for the user.
    """

    name: str
    rows: Floats
    ranks: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """r, the width of `rows`."""
        return int(self.rows.shape[1])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lora:
    """One LoRA, for all networks of a pipeline.

    Attributes:
        name: for messages.
        networks: rows by network (``denoiser``, ``text_encoder``, ``text_encoder_2``), only of
            those it adapts.
        warnings: sentences for the user that concern no network in particular.
    """

    name: str
    networks: Mapping[str, LoraWeights]
    warnings: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Of the rows."""
        return sum(weights.rows.nbytes for weights in self.networks.values())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Factors:
    """``up @ down.T`` for one layer: down (in, r), up (out, r), float32."""

    down: Floats
    up: Floats

    @property
    def rank(self) -> int:
        """Columns of both."""
        return int(self.down.shape[1])


def combine_loras(
    parts: Sequence[tuple[LoraWeights, float]], layout: LoraLayout, max_rank: int | None = None
) -> LoraWeights:
    """Add up weighted LoRAs.

    Args:
        parts: LoRAs of this layout with their weights; those of weight 0 are left out.
        layout: of the bank.
        max_rank: width of the result at most; the layout's when None.

    Returns:
        The sum. With one LoRA of weight 1 its rows are shared, not copied. The warnings of all
        parts, and one with the relative error when the sum was approximated.
    """
    limit = layout.max_rank if max_rank is None else max_rank
    used = [(lora, weight) for lora, weight in parts if weight != 0]
    warnings = tuple(warning for lora, _ in used for warning in lora.warnings)
    name = " + ".join(lora.name for lora, _ in used)
    if len(used) == 1 and used[0][0].rank <= limit:
        lora, weight = used[0]
        return LoraWeights(name=name, rows=_scaled(lora.rows, weight, layout), ranks=lora.ranks,
                           warnings=warnings)  # fmt: skip
    factors = _concatenated(used, layout)
    return pack_factors(name, factors, layout, limit, warnings=warnings)


def zero_rows(layout: LoraLayout, rank: int = 1) -> Floats:
    """Return (M, rank) zeros: the adapter that changes nothing."""
    return np.zeros((layout.rows, rank), np.float32)


def layer_starts(layout: LoraLayout) -> npt.NDArray[np.int64]:
    """Return (2n,) int64: the first row of A and of B of each layer, in bank order."""
    sizes = [size for layer in layout.layers for size in (layer.in_features, layer.out_features)]
    return np.cumsum([0, *sizes[:-1]], dtype=np.int64)


def balanced_rows(
    rows: Floats, layout: LoraLayout, dtype: npt.DTypeLike = np.float32
) -> npt.NDArray[Any]:
    """Return the same LoRA with A and B of equal size, for a bank of float16.

    The scale folded into B often makes its values subnormal in half precision. Every column of A
    is multiplied with a power of two, that of B divided by it, so that their largest values come
    within a factor of two: exact before the conversion, and the product stays the same.

    Args:
        rows: (M, r) float32.
        layout: of the bank.
        dtype: of the result. What is beyond its range becomes infinite or zero.
    """
    balanced = np.empty(rows.shape, dtype)
    # Layer by layer: whole arrays of this size would be written to memory several times over.
    for start, middle, end in _layer_bounds(layout):
        down, up = rows[start:middle], rows[middle:end]
        down_peak, up_peak = _peaks(down), _peaks(up)
        both = (down_peak > 0) & (up_peak > 0)
        ratio = np.log2(np.where(both, up_peak, 1)) - np.log2(np.where(both, down_peak, 1))
        shift = np.round(ratio / 2).astype(np.int32)
        with np.errstate(over="ignore", under="ignore"):
            balanced[start:middle] = np.ldexp(down, shift)
            balanced[middle:end] = np.ldexp(up, -shift)
    return balanced


def _peaks(rows: Floats) -> Floats:
    peaks: Floats = np.maximum(rows.max(0), -rows.min(0))
    return peaks


def _layer_bounds(layout: LoraLayout) -> Iterator[tuple[int, int, int]]:
    """First row of A, first row of B and the end, of each layer."""
    start = 0
    for layer in layout.layers:
        middle = start + layer.in_features
        end = middle + layer.out_features
        yield start, middle, end
        start = end


def pack_factors(
    name: str,
    factors: Mapping[int, Factors],
    layout: LoraLayout,
    limit: int,
    *,
    warnings: tuple[str, ...] = (),
) -> LoraWeights:
    """Lay factors out as rows, approximating layers that are wider than ``limit``.

    Args:
        name: of the LoRA, for the warning.
        factors: by place in the layout.
        layout: of the bank.
        limit: the largest rank.
        warnings: to be carried on.
    """
    widest = max((item.rank for item in factors.values()), default=1)
    rows = zero_rows(layout, min(widest, limit))
    ranks = [0] * len(layout.layers)
    lost = total = 0.0
    starts = layer_starts(layout)
    for place, item in factors.items():
        if widest > limit:
            item, lost_here, total_here = _compressed(item, limit)
            lost, total = lost + lost_here, total + total_here
        layer, start = layout.layers[place], int(starts[2 * place])
        middle = start + layer.in_features
        rows[start:middle, : item.rank] = item.down
        rows[middle : middle + layer.out_features, : item.rank] = item.up
        ranks[place] = item.rank
    if widest > limit:
        error = math.sqrt(lost / total) if total else 0.0
        warnings += (
            f"LoRA {name!r}: rank {widest} was reduced to {limit}, the most this model takes; the "
            f"relative error of its weights is {error:.3g}.",
        )
    return LoraWeights(name=name, rows=rows, ranks=tuple(ranks), warnings=warnings)


def _compressed(item: Factors, limit: int) -> tuple[Factors, float, float]:
    """Return the best approximation of rank ``limit`` and the squared norms lost and in all.

    The singular values of ``B A`` are those of the small core ``R_B R_A^T`` of the factors' QR
    decompositions, so nothing of the layer's full size is ever formed.
    """
    down = item.down.astype(np.float64)
    up = np.nan_to_num(item.up).astype(np.float64)  # infinite after scaling: the largest float32
    if item.rank <= limit:
        return item, 0.0, float(np.sum((up.T @ up) * (down.T @ down)))
    down_q, down_r = np.linalg.qr(down)
    up_q, up_r = np.linalg.qr(up)
    left, values, right = np.linalg.svd(up_r @ down_r.T)
    total = float(np.sum(values**2))
    count = min(limit, len(values))
    root = np.sqrt(values[:count])
    with np.errstate(over="ignore"):
        kept = Factors(
            down=(down_q @ (right[:count].T * root)).astype(np.float32),
            up=(up_q @ (left[:, :count] * root)).astype(np.float32),
        )
    return kept, float(np.sum(values[count:] ** 2)), total


def _scaled(rows: Floats, weight: float, layout: LoraLayout) -> Floats:
    if weight == 1:
        return rows
    scaled = rows.copy()
    with np.errstate(over="ignore"):
        for _, middle, end in _layer_bounds(layout):
            scaled[middle:end] *= np.float32(weight)
    return scaled


def _concatenated(
    parts: Sequence[tuple[LoraWeights, float]], layout: LoraLayout
) -> dict[int, Factors]:
    starts = layer_starts(layout)
    factors: dict[int, Factors] = {}
    for place, layer in enumerate(layout.layers):
        here = [(lora, weight) for lora, weight in parts if lora.ranks[place]]
        if not here:
            continue
        start = int(starts[2 * place])
        middle, end = start + layer.in_features, start + layer.in_features + layer.out_features
        with np.errstate(over="ignore"):
            ups = [lora.rows[middle:end, : lora.ranks[place]] * np.float32(weight)
                   for lora, weight in here]  # fmt: skip
        downs = [lora.rows[start:middle, : lora.ranks[place]] for lora, _ in here]
        factors[place] = Factors(down=np.concatenate(downs, 1), up=np.concatenate(ups, 1))
    return factors
