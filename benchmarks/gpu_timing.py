"""Times on a device, the rate of matrix products, and the operations of a network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_models import build_network, call_inputs, make_subject

MATMUL_SIDE = 8192
MATMULS = 10
WARM_UPS = 3
# Samples of one figure: many for quick calls, at least three for slow ones.
SAMPLE_S = 1.0
LEAST_SAMPLES, MOST_SAMPLES = 3, 30


def synchronize(device: str) -> None:
    """Wait for the device's queued work."""
    if device == "cuda":
        torch.cuda.synchronize()


def median_ms(call: Callable[[], object], *, device: str, warm_ups: int = WARM_UPS) -> float:
    """Median wall milliseconds of ``call`` until the device is done."""
    for _ in range(warm_ups):
        call()
    synchronize(device)
    first_s = _timed(call, device)
    samples = max(LEAST_SAMPLES, min(MOST_SAMPLES, int(SAMPLE_S / max(first_s, 1e-6))))
    return 1000 * statistics.median(_timed(call, device) for _ in range(samples))


def _timed(call: Callable[[], object], device: str) -> float:
    started_s = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started_s


def matmul_flops_per_s(*, device: str, dtype: torch.dtype, side: int = MATMUL_SIDE) -> float:
    """Floating-point operations a second of a square matrix product on random data."""
    one = torch.randn(side, side, device=device, dtype=dtype)
    other = torch.randn(side, side, device=device, dtype=dtype)
    out = torch.empty_like(one)

    def products() -> None:
        for _ in range(MATMULS):
            torch.mm(one, other, out=out)

    return 2 * side**3 * MATMULS / (median_ms(products, device=device) / 1000)


def count_flops(name: str, use_tiny: bool) -> float:
    """Operations of one denoising step of one picture: matrix products and convolutions.

    Counted on shapes alone (torch's meta device), a multiplication and an addition as two.
    """
    subject = make_subject(name, use_tiny)
    network = build_network(subject, device="meta", dtype=torch.float32)
    inputs = call_inputs(subject, 1, device="meta", dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(**inputs)
    return float(counter.get_total_flops())


def graphed(
    network: nn.Module, inputs: dict[str, Any], *, warm_ups: int = WARM_UPS
) -> Callable[[], None]:
    """Capture one call in a CUDA graph; returns what replays it on the same inputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            network(**inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        network(**inputs)
    replay: Callable[[], None] = graph.replay
    return replay
