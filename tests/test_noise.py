"""closeup.noise against torch.randn."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from closeup.noise import AHEAD, Singles, TorchNormal

# One unit in the last place of a value in [2, 4): PyTorch's compiler fuses some multiplications
# with additions, which rounds one time less. The stream of uniforms itself is exact.
TOLERANCE = 2.4e-7
# PyTorch without AVX2 computes the angle in double precision; it is then this far from its own
# AVX2 results (measured with ATEN_CPU_CAPABILITY=default).
TOLERANCE_NO_AVX2 = 2.4e-6

SEEDS = (0, 1, 42, 2**31, 2**32 - 1)
EDGE_SEEDS = (2**32, 2**63 - 1, 2**64 - 1, -1)


def tolerance() -> float:
    simd = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return TOLERANCE if simd else TOLERANCE_NO_AVX2


def agrees(actual: Singles, expected: Singles) -> bool:
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    return bool((np.abs(actual - expected) <= tolerance()).all())


def draw_torch(seed: int, shapes: Sequence[tuple[int, ...]]) -> list[Singles]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator).numpy() for shape in shapes]


@pytest.mark.parametrize("seed", SEEDS + EDGE_SEEDS)
def test_torch_normal_equals_torch_randn_when_latents_are_drawn_repeatedly(seed: int) -> None:
    shapes = [(1, 4, 64, 64), (4, 33, 17), (1, 4, 128, 128)]
    noise = TorchNormal(seed)
    for shape, expected in zip(shapes, draw_torch(seed, shapes), strict=True):
        assert agrees(noise.randn(shape), expected)


@pytest.mark.parametrize("size", [*range(50), 63, 64, 65, 1000, 1001, 1023])
def test_torch_normal_equals_torch_randn_when_size_is_no_multiple_of_16(size: int) -> None:
    shapes = [(size,), (size,), (16,)]  # the next draws show that as many words were consumed
    noise = TorchNormal(7)
    for shape, expected in zip(shapes, draw_torch(7, shapes), strict=True):
        assert agrees(noise.randn(shape), expected)


def test_torch_normal_keeps_the_spare_normal_when_small_and_large_draws_alternate() -> None:
    shapes = [(3,), (32,), (1,), (), (2, 2), (17,), (5,), (0,), (1,)]
    noise = TorchNormal(11)
    for shape, expected in zip(shapes, draw_torch(11, shapes), strict=True):
        assert agrees(noise.randn(shape), expected)


def test_tolerance_rejects_zeros_another_seed_and_a_shifted_stream() -> None:
    (expected,) = draw_torch(3, [(4, 8, 8)])
    actual = TorchNormal(3).randn((4, 8, 8))
    assert agrees(actual, expected)
    assert not agrees(np.zeros_like(actual), expected)
    assert not agrees(TorchNormal(4).randn((4, 8, 8)), expected)
    assert not agrees(np.roll(actual, 1), expected)
    assert not agrees((actual * np.float32(1 + 1e-5)).astype(np.float32), expected)


def test_torch_normal_is_fast_when_a_1024_px_latent_is_drawn() -> None:
    noise = TorchNormal(0)
    noise.randn((4, 128, 128))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        noise.randn((4, 128, 128))
        seconds.append(time.perf_counter() - start)
    # 3 ms on a quiet core; the bound only catches a loop in Python (150 ms).
    assert min(seconds) < 0.02


@pytest.mark.parametrize("shape", [(4, 16, 16), (4, 9, 7), (3,), ()])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_randn_each_equals_single_draws_when_their_size_is_any(
    count: int, shape: tuple[int, ...]
) -> None:
    one_by_one, at_once = TorchNormal(5), TorchNormal(5)
    expected = [one_by_one.randn(shape) for _ in range(count)]
    drawn = at_once.randn_each(count, shape)
    assert drawn.shape == (count, *shape)
    assert drawn.dtype == np.float32
    for array, other in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(array, other)
    # The stream stands at the same place afterwards.
    np.testing.assert_array_equal(at_once.randn((40,)), one_by_one.randn((40,)))


def test_draw_ahead_changes_no_draw_when_it_comes_at_any_time() -> None:
    plain, ahead = TorchNormal(9), TorchNormal(9)
    shape = (4, 8, 10)
    for count in (0, 3, 1, 0, 2):
        ahead.draw_ahead(count, shape)
        for _ in range(2):
            np.testing.assert_array_equal(ahead.randn(shape), plain.randn(shape))
        np.testing.assert_array_equal(ahead.randn_each(3, shape), plain.randn_each(3, shape))


def test_draw_ahead_is_bounded_and_leaves_shapes_alone_that_fill_no_whole_blocks() -> None:
    plain, ahead = TorchNormal(9), TorchNormal(9)
    ahead.draw_ahead(3, (5, 7))
    np.testing.assert_array_equal(ahead.randn((5, 7)), plain.randn((5, 7)))
    for _ in range(2):
        ahead.draw_ahead(10**9, (AHEAD // 4,))
    with pytest.raises(ValueError, match="multiple of 16"):
        ahead.randn((5, 7))
    for _ in range(6):
        np.testing.assert_array_equal(ahead.randn((AHEAD // 4,)), plain.randn((AHEAD // 4,)))
    np.testing.assert_array_equal(ahead.randn((5, 7)), plain.randn((5, 7)))
