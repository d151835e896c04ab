"""Tiled super-resolution against the same network on the whole picture."""

from __future__ import annotations

import asyncio

import cv2
import numpy as np
import pytest

from closeup.images import Floats
from closeup.upscale import fit_tile, plan_tiles, sr_factor, super_resolve

RNG = np.random.default_rng(0)


def _picture(height: int, width: int) -> Floats:
    noise = RNG.random((height, width, 3), dtype=np.float32)
    picture: Floats = cv2.GaussianBlur(noise, (0, 0), 1.5)
    return picture


class Network:
    """Enlarges by ``scale`` after a blur of ``radius`` px, with a convolution's zero padding."""

    def __init__(self, scale: int, radius: int) -> None:
        self.scale = scale
        side = 2 * radius + 1
        self.kernel = np.random.default_rng(3).random((side, side)).astype(np.float32)
        self.kernel /= self.kernel.sum()
        self.shapes: list[tuple[int, ...]] = []

    def whole(self, image: Floats) -> Floats:
        blurred = cv2.filter2D(image, -1, self.kernel, borderType=cv2.BORDER_CONSTANT)
        enlarged = np.repeat(np.repeat(blurred, self.scale, 0), self.scale, 1)
        # Give the enlarged pixels detail that depends on the input, not on their position.
        result: Floats = np.sqrt(np.clip(enlarged, 0, 1))
        return result

    async def __call__(self, tiles: Floats) -> Floats:
        self.shapes.append(tiles.shape)
        assert tiles.dtype == np.float32
        return np.stack([self.whole(t.transpose(1, 2, 0)).transpose(2, 0, 1) for t in tiles])


def _run(image: Floats, network: Network, **options: int | bool) -> Floats:
    settings: dict[str, int | bool] = {"tile": 32, "overlap": 8, "max_batch": 3, "factor": 2}
    settings["scale"] = network.scale
    return asyncio.run(super_resolve(image, infer=network, **(settings | options)))  # type: ignore[arg-type]


@pytest.mark.parametrize("fit", [True, False])
@pytest.mark.parametrize("size", [(70, 101), (33, 32), (32, 200), (64, 65)])
def test_super_resolve_equals_untiled_when_radius_is_a_quarter_of_the_overlap(
    size: tuple[int, int], fit: bool
) -> None:
    network = Network(2, radius=2)
    image = _picture(*size)
    tiled = _run(image, network, fit=fit)
    # Weights sum to 1 within float32 rounding; a tile one pixel off differs by more than 0.01.
    np.testing.assert_allclose(tiled, network.whole(image), atol=2e-6)
    assert np.abs(np.roll(tiled, 1, 0) - network.whole(image)).max() > 0.01
    assert all(shape[0] <= 3 and max(shape[2:]) <= 32 for shape in network.shapes)
    assert len({shape[1:] for shape in network.shapes}) == 1


def test_super_resolve_averages_when_the_network_enlarges_more_than_asked() -> None:
    network = Network(4, radius=2)
    image = _picture(50, 70)
    whole = network.whole(image)
    expected = whole.reshape(100, 2, 140, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(_run(image, network), expected, atol=2e-6)


def test_super_resolve_runs_twice_when_the_network_enlarges_less_than_asked() -> None:
    network = Network(2, radius=1)
    image = _picture(20, 24)
    enlarged = _run(image, network, factor=4)
    np.testing.assert_allclose(enlarged, network.whole(network.whole(image)), atol=2e-6)


@pytest.mark.parametrize("size", [(7, 9), (1, 1), (40, 5)])
def test_super_resolve_keeps_the_size_when_picture_is_smaller_than_a_static_tile(
    size: tuple[int, int],
) -> None:
    network = Network(2, radius=2)
    enlarged = _run(_picture(*size), network, fit=False)
    assert enlarged.shape == (2 * size[0], 2 * size[1], 3)
    assert np.isfinite(enlarged).all()
    assert {shape[2:] for shape in network.shapes} == {(32, 32)}


def _jumps(image: Floats) -> tuple[Floats, Floats]:
    """Mean absolute second difference of each row and column: a seam stands out."""
    rows = np.abs(np.diff(image, n=2, axis=0)).mean(axis=(1, 2))
    columns = np.abs(np.diff(image, n=2, axis=1)).mean(axis=(0, 2))
    return rows, columns


def test_super_resolve_leaves_no_seam_when_the_network_sees_further_than_the_overlap() -> None:
    class Shaded(Network):
        """Brightens each tile from its own left to its right: the worst kind of tile edge."""

        def whole(self, image: Floats) -> Floats:
            ramp = np.linspace(0.8, 1.0, image.shape[1] * 2, dtype=np.float32)[None, :, None]
            return super().whole(image) * ramp

    network = Shaded(2, radius=1)
    image = np.full((40, 200, 3), 0.5, np.float32) + 0.02 * _picture(40, 200)
    _, columns = _jumps(_run(image, network, overlap=16)[8:-8, 8:-8])
    usual = np.percentile(columns, 90)
    # A hard cut between tiles jumps by 0.2 * 0.7 = 0.14, some 50 times the picture's own detail.
    assert columns.max() < 3 * usual
    assert columns.max() < 0.02
    _, hard = _jumps(_run(image, network, overlap=0)[8:-8, 8:-8])
    assert hard.max() > 5 * columns.max()


def test_tiles_weights_sum_to_one_when_tiles_overlap_unevenly() -> None:
    for size, tile, overlap in ((65, 32, 8), (33, 32, 30), (200, 33, 7), (100, 64, 63)):
        tiles = plan_tiles(size, size, tile, overlap)
        total = np.zeros(size * 2)
        for start, ramp in zip(tiles.tops, tiles.weights(2)[0], strict=True):
            assert ramp.min() >= 0
            total[2 * start : 2 * (start + tile)] += ramp
        np.testing.assert_allclose(total, 1.0, atol=1e-6)


def test_plan_tiles_covers_the_picture_when_it_is_split() -> None:
    tiles = plan_tiles(100, 30, 32, 8)
    assert tiles.tops == (0, 23, 45, 68)
    assert tiles.lefts == (0,)
    assert tiles.tops[-1] + 32 == 100


@pytest.mark.parametrize("overlap", [-1, 32, 40])
def test_plan_tiles_raises_when_overlap_leaves_no_progress(overlap: int) -> None:
    with pytest.raises(ValueError, match="overlap"):
        plan_tiles(100, 100, 32, overlap)


def test_fit_tile_needs_no_more_tiles_when_shrunk() -> None:
    height, width = fit_tile(896, 1152, max_tile=512, overlap=32)
    fitted = plan_tiles(896, 1152, (height, width), 32)
    full = plan_tiles(896, 1152, 512, 32)
    assert len(fitted.corners) == len(full.corners) == 6
    assert 6 * height * width < 1.15 * 896 * 1152
    assert fit_tile(100, 300, max_tile=512, overlap=32) == (100, 300)
    # Even sides, for networks that fold 2x2 pixels into channels.
    assert fit_tile(101, 301, max_tile=512, overlap=32) == (102, 302)
    assert fit_tile(511, 512, max_tile=512, overlap=32) == (512, 512)


def test_super_resolve_raises_when_factor_cannot_be_reached() -> None:
    with pytest.raises(ValueError, match="divide"):
        _run(_picture(8, 8), Network(4, radius=1), factor=3)


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [(768, 512, 4), (1152, 896, 2), (128, 128, 4), (767, 768, 4), (768, 768, 2)],
)
def test_sr_factor_agrees_with_the_service_when_sizes_were_observed(
    height: int, width: int, factor: int
) -> None:
    assert sr_factor(height, width) == factor
