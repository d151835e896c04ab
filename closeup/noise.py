"""Seeded noise that equals PyTorch's, without PyTorch.

diffusers draws all noise of a picture from ``torch.Generator("cpu").manual_seed(seed)``. The same
numbers here mean that a seed gives the picture that diffusers gives with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Singles: TypeAlias = npt.NDArray[np.float32]

AHEAD = 1 << 18  # a megabyte; takes some 10 ms to draw
_BLOCK = 16  # PyTorch transforms 8 + 8 uniforms at a time


class TorchNormal:
    """A stream of standard normals, the one that ``torch.randn`` draws on the CPU in float32.

    Draws must come in the same order and with the same shapes as there. On x86-64 with AVX2, 99 %
    of the values are equal and the rest agree within 2.4e-7; elsewhere PyTorch uses other
    functions for log, sin and cos, and differs from itself by up to 2e-6.

    Source: PyTorch ``ATen/native/cpu/DistributionTemplates.h`` (``normal_fill``) and
    ``ATen/core/DistributionsHelper.h`` (``normal_distribution``); Box and Muller 1958; Matsumoto
    and Nishimura 1998 for the Mersenne Twister.
    """

    __slots__ = ("_ahead", "_bits", "_spare")

    def __init__(self, seed: int) -> None:
        # PyTorch's generator keeps the low 32 bits, of negative seeds too.
        self._bits = np.random.RandomState(seed & 0xFFFFFFFF)
        self._spare: float | None = None
        self._ahead = np.empty(0, np.float32)  # normals drawn already

    def randn(self, shape: Sequence[int]) -> Singles:
        """Draws the next normals of the stream.

        Args:
            shape: the array's shape.

        Returns:
            Array of this shape, float32, contiguous.
        """
        size = math.prod(shape)
        if self._ahead.size:
            flat = self._take(size)
        else:
            flat = self._fill(size) if size >= _BLOCK else self._draw_few(size)
        return flat.reshape(tuple(shape))

    def draw_ahead(self, count: int, shape: Sequence[int]) -> None:
        """Draws what the next ``count`` calls of :meth:`randn` with this shape will return.

        For when there is time. At most `AHEAD` values are kept, and none where the shape does
        not fill whole blocks; the draws are the same either way.
        """
        size = math.prod(shape)
        if size and size % _BLOCK == 0:
            count = min(count, (AHEAD - self._ahead.size) // size)
            if count > 0:
                self._ahead = np.concatenate([self._ahead, self._fill(count * size)])

    def _take(self, size: int) -> Singles:
        """The next values, from those drawn ahead first."""
        if size % _BLOCK:
            raise ValueError(
                f"{size} values were asked for after others were drawn ahead; expected a multiple "
                f"of {_BLOCK}."
            )
        taken, self._ahead = self._ahead[:size], self._ahead[size:]
        if taken.size == size:
            return taken.copy()
        return np.concatenate([taken, self._fill(size - taken.size)])

    def randn_each(self, count: int, shape: Sequence[int]) -> Singles:
        """Draws several arrays one after the other: ``count`` calls of :meth:`randn`, stacked.

        Args:
            count: how many arrays, 0 or more.
            shape: of each.

        Returns:
            (count, *shape) float32, contiguous.
        """
        size = math.prod(shape)
        if size >= _BLOCK and size % _BLOCK == 0:
            # Whole blocks leave nothing over, so the arrays are one stretch of the stream.
            return self.randn((count, *shape))
        drawn = np.empty((count, *shape), np.float32)
        for index in range(count):
            drawn[index] = self.randn(shape)
        return drawn

    def _fill(self, size: int) -> Singles:
        """At least a block: whole blocks, then the last 16 values again from fresh uniforms."""
        uniforms = self._draw_uniforms(size)
        whole = size - size % _BLOCK
        values = np.empty(size, np.float32)
        values[:whole] = _transform_blocks(uniforms[:whole])
        if whole < size:
            values[-_BLOCK:] = _transform_blocks(self._draw_uniforms(_BLOCK))
        return values

    def _draw_few(self, size: int) -> Singles:
        """Less than a block: one by one in double precision; of each pair one is kept for later."""
        return np.array([self._draw_one() for _ in range(size)], np.float32)

    def _draw_one(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        u1, u2 = self._draw_double(), self._draw_double()
        radius = math.sqrt(-2 * math.log1p(-u2))
        theta = 2 * math.pi * u1
        self._spare = radius * math.sin(theta)
        return radius * math.cos(theta)

    def _draw_words(self, size: int) -> npt.NDArray[np.uint32]:
        return self._bits.randint(0, 1 << 32, size, dtype=np.uint32)

    def _draw_uniforms(self, size: int) -> Singles:
        """(size,) float32 in [0, 1), 24 random bits each."""
        return (self._draw_words(size) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    def _draw_double(self) -> float:
        """One value in [0, 1), 53 random bits."""
        high, low = (int(word) for word in self._draw_words(2))
        return ((high << 32 | low) & ((1 << 53) - 1)) * 2.0**-53


def _transform_blocks(uniforms: Singles) -> Singles:
    """Box-Muller on blocks of 8 radii and 8 angles: (16 n,) in [0, 1) -> (16 n,) normals."""
    blocks = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - blocks[:, 0]))
    sine, cosine = _sin_cos(np.float32(2 * math.pi) * blocks[:, 1])
    normals = np.empty_like(blocks)
    np.multiply(radius, cosine, out=normals[:, 0])
    np.multiply(radius, sine, out=normals[:, 1])
    return normals.reshape(-1)


# The elementary functions below are those of the Cephes library in single precision, which
# PyTorch's vector code uses too. They need only additions and multiplications, so that a seed
# gives the same bits on every machine, unlike NumPy's own log, sin and cos.
# Source: Moshier, Cephes Mathematical Library (netlib), logf.c and sinf.c.
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_LN2_LOW, _LN2_HIGH = np.float32(-2.12194440e-4), np.float32(0.693359375)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_QUARTER_PI = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)  # high to low parts


def _polynomial(x: Singles, coefficients: Sequence[float]) -> Singles:
    """Horner's scheme, highest power first."""
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value *= x
        value += np.float32(coefficient)
    return value


def _log(x: Singles) -> Singles:
    """Natural logarithm of normal positive float32 values."""
    mantissa, exponent = np.frexp(x)  # x = mantissa * 2**exponent, mantissa in [0.5, 1)
    small = mantissa < np.float32(math.sqrt(0.5))
    e: Singles = (exponent - small).astype(np.float32)
    r = np.where(small, mantissa + mantissa, mantissa) - np.float32(1)
    square = r * r
    tail = _polynomial(r, _LOG) * r * square + e * _LN2_LOW - square * np.float32(0.5)
    return r + tail + e * _LN2_HIGH


def _sin_cos(x: Singles) -> tuple[Singles, Singles]:
    """Sine and cosine of float32 angles in [0, 2 pi]."""
    octant = ((x * np.float32(4 / math.pi)).astype(np.int32) + 1) & ~1
    multiple = octant.astype(np.float32)
    r = x
    for part in _QUARTER_PI:
        r = r - multiple * np.float32(part)
    square = r * r
    sine = _polynomial(r * r, _SIN) * square * r + r
    cosine = _polynomial(square, _COS) * square * square - square * np.float32(0.5) + np.float32(1)
    swap = (octant & 2) != 0
    sine, cosine = np.where(swap, cosine, sine), np.where(swap, sine, cosine)
    np.negative(sine, out=sine, where=(octant & 4) != 0)
    np.negative(cosine, out=cosine, where=((octant + 2) & 4) != 0)
    return sine, cosine
