"""The whole graph of a request in this process, on the GPU and on the CPU, and how they agree."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.measuring import psnr_db
from benchmarks.results import Section, Verdict
from closeup.engines import DEVICE_VARIABLE
from closeup.local import LocalModels
from closeup.settings import Settings

# The CPU and the GPU add in other orders; 20 steps of a sampler with fresh noise every step carry
# that on. One step more gives less than 55 dB (tests/test_parity.py), another seed or black 20.
LEAST_PSNR_DB = 45.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeRun:
    """One side's answer.

    Attributes:
        picture: (H, W, 3) uint8.
        seconds: median of the timed runs.
        first_s: the first run, engines opened in it.
        timings_ms: stage -> milliseconds, of the last run.
    """

    picture: npt.NDArray[np.uint8]
    seconds: float
    first_s: float
    timings_ms: Mapping[str, float]


@contextmanager
def device_variable(device: str) -> Iterator[None]:
    """Set ``CLOSEUP_DEVICE`` for what is opened inside."""
    before = os.environ.get(DEVICE_VARIABLE)
    os.environ[DEVICE_VARIABLE] = device
    try:
        yield
    finally:
        if before is None:
            del os.environ[DEVICE_VARIABLE]
        else:
            os.environ[DEVICE_VARIABLE] = before


def run_whole(
    repository: Path, fields: Mapping[str, Any], *, device: str, repeats: int
) -> WholeRun:
    """Run a request ``repeats`` times after a first one.

    Args:
        repository: exported models.
        fields: of the request.
        device: ``cpu`` or ``cuda`` (see `closeup.engines.wanted_device`).
        repeats: timed runs; 0 takes the first run's time.

    Raises:
        CloseupError: refused, a model failed, or the device is not there.
    """
    with device_variable(device), LocalModels(repository, Settings()) as models:
        times = []
        for _ in range(repeats + 1):
            started_s = time.perf_counter()
            run = models.start(models.resolve(**fields))
            outcome = asyncio.run(models.run(run))
            times.append(time.perf_counter() - started_s)
    return WholeRun(
        picture=outcome.pictures[0],
        seconds=statistics.median(times[1:] or times),
        first_s=times[0],
        timings_ms=dict(run.timings_ms),
    )


def whole_section(title: str, sides: Mapping[str, WholeRun]) -> Section:
    """Return the table of the sides, and the verdict on the GPU's picture against the CPU's."""
    verdicts: tuple[Verdict, ...] = ()
    if len(sides) == 2:
        one, other = sides.values()
        verdicts = (
            Verdict(
                name="picture on the GPU against the CPU's, dB",
                value=psnr_db(one.picture, other.picture),
                limit=LEAST_PSNR_DB,
                at_least=True,
            ),
        )
    stages = sorted({stage for run in sides.values() for stage in run.timings_ms})
    return Section(
        title=title,
        columns=("", "s", "first, with opening", *(f"{stage}, ms" for stage in stages)),
        rows=tuple(
            (
                side,
                f"{run.seconds:.3f}",
                f"{run.first_s:.1f}",
                *(f"{run.timings_ms.get(stage, 0.0):.0f}" for stage in stages),
            )
            for side, run in sides.items()
        ),
        verdicts=verdicts,
    )
