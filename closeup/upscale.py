"""Super-resolution of any picture size through one network: tiles, and how they are joined.

Neighbouring tiles share at least ``overlap`` pixels. Between the two, over the middle half of what
they must share, a smooth ramp leads from one to the other, and the ramps of all tiles sum to one
everywhere. So a network whose output depends on inputs up to ``overlap / 4`` pixels away gives
the same picture in tiles as in one piece, and any other network gives a picture without a step.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from closeup.images import Floats, resize

#: Takes (n, 3, t, u) float32 in [0, 1], returns (n, 3, scale*t, scale*u) float32.
InferTiles = Callable[[Floats], Awaitable[Floats]]

#: Pictures of fewer pixels than this are enlarged by 4 a side, the others by 2. Between what was
#: observed of the service: 512x768 gives 2048x3072, 896x1152 gives 1792x2304.
X4_BELOW_PIXELS = 768 * 768


def sr_factor(height: int, width: int) -> int:
    """Return by how much super-resolution enlarges each side: 4 for small pictures, else 2."""
    return 4 if height * width < X4_BELOW_PIXELS else 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Where the tiles of one picture lie. All are of one shape, rows first.

    Attributes:
        picture: (height, width) of the picture, px.
        tile: (height, width) of every tile, px; larger than the picture where that is padded.
        overlap: the least that neighbours share along an axis that is split, px.
        tops: first row of each row of tiles, increasing.
        lefts: first column of each column of tiles, increasing.
    """

    picture: tuple[int, int]
    tile: tuple[int, int]
    overlap: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @property
    def corners(self) -> list[tuple[int, int]]:
        """(top, left) of each tile, row by row."""
        return [(top, left) for top in self.tops for left in self.lefts]

    def weights(self, scale: int) -> tuple[list[Floats], list[Floats]]:
        """Return the ramps of each row of tiles and of each column of tiles.

        Args:
            scale: how many output pixels an input pixel has a side.

        Returns:
            Two lists of (scale * tile height,) and (scale * tile width,) float32 in [0, 1]. Over
            the picture, the products of both sum to 1 at every pixel.
        """
        return (
            _ramps(self.tops, self.tile[0], self.overlap, scale),
            _ramps(self.lefts, self.tile[1], self.overlap, scale),
        )


def plan_tiles(height: int, width: int, tile: int | tuple[int, int], overlap: int) -> Tiles:
    """Cover a picture with as few tiles as the overlap allows, spread evenly.

    Args:
        height: of the picture, px.
        width: of the picture, px.
        tile: side of a square tile, or (height, width), px.
        overlap: the least that neighbours share, px.

    Returns:
        The plan. The picture is padded only along an axis where it is smaller than a tile.

    Raises:
        ValueError: a size below 1, or an overlap as long as the tiles of an axis that is split.
    """
    tile_h, tile_w = (tile, tile) if isinstance(tile, int) else tile
    if min(height, width, tile_h, tile_w) < 1:
        raise ValueError(f"Picture {height}x{width} and tile {tile_h}x{tile_w} must be positive.")
    for size, side in ((height, tile_h), (width, tile_w)):
        if overlap < 0 or (size > side and overlap >= side):
            raise ValueError(
                f"overlap is {overlap}, expected 0 to {side - 1} for tiles of {side} px: "
                "take larger tiles or less overlap."
            )
    return Tiles(
        picture=(height, width),
        tile=(tile_h, tile_w),
        overlap=overlap,
        tops=_starts(height, tile_h, overlap),
        lefts=_starts(width, tile_w, overlap),
    )


def _count(size: int, tile: int, overlap: int) -> int:
    return 1 if size <= tile else math.ceil((size - overlap) / (tile - overlap))


def _starts(size: int, tile: int, overlap: int) -> tuple[int, ...]:
    count = _count(size, tile, overlap)
    if count == 1:
        return (0,)
    return tuple(round(i * (size - tile) / (count - 1)) for i in range(count))


def fit_tile(
    height: int, width: int, *, max_tile: int, overlap: int, multiple: int = 8
) -> tuple[int, int]:
    """Return the smallest tile that covers a picture with no more tiles than ``max_tile`` would.

    For engines with dynamic shapes: 896x1152 in 512 px tiles is 1.6 megapixels of work, in
    fitted tiles 1.1.

    Args:
        height: of the picture, px.
        width: of the picture, px.
        max_tile: the longest side a tile may have, px.
        overlap: the least that neighbours share, px.
        multiple: sides are rounded up to this where the picture is split; an axis that needs no
            split is rounded up to an even length, which networks that begin by folding 2x2 pixels
            into channels demand.

    Returns:
        (height, width) of a tile, px.
    """

    def fit(size: int) -> int:
        count = _count(size, max_tile, overlap)
        if count == 1:
            return size + size % 2
        least = math.ceil((size + overlap * (count - 1)) / count)
        return min(max_tile, math.ceil(least / multiple) * multiple)

    return fit(height), fit(width)


def _ramps(starts: tuple[int, ...], tile: int, overlap: int, scale: int) -> list[Floats]:
    """Return one ramp a tile; they telescope, so their sum is 1 whatever the overlaps are."""
    half = overlap * scale / 4.0
    cuts = [
        scale * (left + tile + right) / 2.0 for left, right in zip(starts, starts[1:], strict=False)
    ]
    ramps = []
    for i, start in enumerate(starts):
        x = scale * start + np.arange(scale * tile) + 0.5
        ramp = np.ones_like(x)
        if i > 0:
            ramp = _smooth_step(x - cuts[i - 1], half)
        if i < len(cuts):
            ramp = ramp - _smooth_step(x - cuts[i], half)
        ramps.append(ramp.astype(np.float32))
    return ramps


def _smooth_step(x: npt.NDArray[np.float64], half: float) -> npt.NDArray[np.float64]:
    """Rise from 0 at -half to 1 at +half with no kink at either end."""
    if half == 0:
        return (x > 0).astype(np.float64)
    t = np.clip(x / (2.0 * half) + 0.5, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


async def super_resolve(
    image: Floats,
    *,
    infer: InferTiles,
    scale: int,
    factor: int,
    tile: int,
    overlap: int,
    max_batch: int,
    fit: bool = True,
) -> Floats:
    """Enlarge a picture with a super-resolution network.

    A network that enlarges more than asked is followed by exact averaging of areas, tile by tile;
    one that enlarges less runs again on its own result.

    Args:
        image: (H, W, 3) float32 in [0, 1].
        infer: the network.
        scale: by how much the network enlarges each side; a multiple or a root of ``factor``.
        factor: by how much the result is to be enlarged.
        tile: longest side of a tile, px.
        overlap: the least that neighbouring tiles share, px; below ``tile``.
        max_batch: the most tiles in one call.
        fit: shrink the tiles to fit the picture (dynamic engines); without it every call has
            square tiles of exactly ``tile`` px (one static shape).

    Returns:
        (factor * H, factor * W, 3) float32 in [0, 1].

    Raises:
        ValueError: ``factor`` cannot be reached with this ``scale``.
    """
    if scale < 2 or factor < 1 or (scale % factor and factor % scale):
        raise ValueError(
            f"A network that enlarges by {scale} cannot give a factor of {factor}: "
            "expected one to divide the other."
        )
    height, width = image.shape[:2]
    shape = fit_tile(height, width, max_tile=tile, overlap=overlap) if fit else (tile, tile)
    tiles = plan_tiles(height, width, shape, overlap)
    reached = min(scale, factor)
    enlarged = await _enlarge(image, tiles, infer, reached, max_batch)
    if reached == factor:
        return enlarged
    return await super_resolve(
        enlarged,
        infer=infer,
        scale=scale,
        factor=factor // reached,
        tile=tile,
        overlap=overlap,
        max_batch=max_batch,
        fit=fit,
    )


async def _enlarge(
    image: Floats, tiles: Tiles, infer: InferTiles, factor: int, max_batch: int
) -> Floats:
    padded = _padded(image, tiles.tile)
    # Colour planes apart, as the network has them: resizing and adding run at twice the speed.
    if len(tiles.corners) == 1:
        (answer,) = await infer(_cut(padded, tiles, tiles.corners))
        joined = _averaged(answer, tiles, factor)
    else:
        joined = await _join_tiles(padded, tiles, infer, factor, max_batch)
    joined = joined[:, : factor * image.shape[0], : factor * image.shape[1]]
    return np.clip(joined, 0.0, 1.0).transpose(1, 2, 0)


async def _join_tiles(
    padded: Floats, tiles: Tiles, infer: InferTiles, factor: int, max_batch: int
) -> Floats:
    """Return the enlarged planes (3, H, W) of several tiles, ramps between them."""
    joined = np.zeros((3, factor * padded.shape[0], factor * padded.shape[1]), np.float32)
    height, width = factor * tiles.tile[0], factor * tiles.tile[1]
    rows, columns = tiles.weights(factor)
    corners = tiles.corners
    for first in range(0, len(corners), max_batch):
        answers = await infer(_cut(padded, tiles, corners[first : first + max_batch]))
        for i, answer in enumerate(answers, start=first):
            row, column = divmod(i, len(tiles.lefts))
            weight = rows[row][:, None] * columns[column][None, :]
            top, left = factor * corners[i][0], factor * corners[i][1]
            place = joined[:, top : top + height, left : left + width]
            for plane, part in zip(place, _averaged(answer, tiles, factor), strict=True):
                plane += part * weight
    return joined


def _averaged(answer: Floats, tiles: Tiles, factor: int) -> Floats:
    """Return a tile's enlarged planes (3, h, w), areas averaged down to the factor."""
    size = (factor * tiles.tile[0], factor * tiles.tile[1])
    if answer.shape[1:] == size:
        return answer
    return np.stack([resize(plane, size, how="area") for plane in answer])


def _cut(image: Floats, tiles: Tiles, corners: list[tuple[int, int]]) -> Floats:
    """Return the tiles at these corners, (n, 3, t, u)."""
    height, width = tiles.tile
    planes = image.transpose(2, 0, 1)
    return np.stack([planes[:, top : top + height, left : left + width] for top, left in corners])


def _padded(image: Floats, tile: tuple[int, int]) -> Floats:
    """Mirror the picture at its right and bottom edges until a tile fits."""
    missing = [max(0, tile[axis] - image.shape[axis]) for axis in (0, 1)]
    if not any(missing):
        return image
    # numpy's symmetric mode repeats the mirroring when the picture is smaller than the padding.
    return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")
