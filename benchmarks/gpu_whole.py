"""A whole request through Triton, the embedded server, on the GPU and on the CPU."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from closeup_client import Client, Result
from PIL import Image

from benchmarks.measuring import psnr_db
from benchmarks.results import Section, Verdict
from closeup.engines import DEVICE_VARIABLE
from closeup.server import EmbeddedServer, ServerOptions

# The CPU and the GPU add in other orders; 20 steps of a sampler with fresh noise every step carry
# that on. One step more gives less than 55 dB (tests/test_parity.py), another seed or black 20.
LEAST_PSNR_DB = 45.0
START_TIMEOUT_S = 300.0
REQUEST_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeRun:
    """One side's answer.

    Attributes:
        picture: (H, W, 3) uint8.
        seconds: median of the timed requests, as the client waits for them.
        first_s: until the first picture: the server's start, its engines, the first request.
        timings_ms: stage -> milliseconds, of the last request.
        faces: repainted in it.
    """

    picture: npt.NDArray[np.uint8]
    seconds: float
    first_s: float
    timings_ms: Mapping[str, float]
    faces: int


def serve_options(repository: Path, device: str) -> ServerOptions:
    """Return the options of a server on free ports whose graphs run on ``device``.

    Args:
        repository: exported models and the Python models that run the whole graph.
        device: ``cpu``, ``cuda`` or ``auto``, see `closeup.engines.wanted_device`.
    """
    return ServerOptions(
        repository=repository,
        http_port=0,
        grpc_port=0,
        metrics_port=0,
        start_timeout_s=START_TIMEOUT_S,
        request_timeout_s=REQUEST_TIMEOUT_S,
        environment={DEVICE_VARIABLE: device},
    )


def run_served(
    repository: Path, requests: Sequence[Mapping[str, Any]], *, device: str, repeats: int
) -> list[WholeRun]:
    """Serve a repository and send each request ``repeats`` times after a first one.

    Args:
        repository: see `serve_options`.
        requests: fields of each.
        device: see `serve_options`.
        repeats: timed requests; 0 takes the first one's time.

    Raises:
        ServerError: it does not start, for example because the device is not there.
        ClientError: a request is refused or fails.
    """
    runs = []
    started_s = time.perf_counter()
    with EmbeddedServer(serve_options(repository, device)) as server:
        with Client(server.grpc_url, timeout_s=REQUEST_TIMEOUT_S) as client:
            for fields in requests:
                times, result = [], client.generate(**fields)
                first_s = time.perf_counter() - started_s
                for _ in range(max(repeats, 0)):
                    sent_s = time.perf_counter()
                    result = client.generate(**fields)
                    times.append(time.perf_counter() - sent_s)
                runs.append(_whole_run(result, times, first_s))
                started_s = time.perf_counter()
    return runs


def _whole_run(result: Result, times: Sequence[float], first_s: float) -> WholeRun:
    picture = Image.open(io.BytesIO(result.images[0])).convert("RGB")
    return WholeRun(
        picture=np.asarray(picture),
        seconds=statistics.median(times or [first_s]),
        first_s=first_s,
        timings_ms=dict(result.info["timings_ms"]),
        faces=sum(face["action"] == "repaint" for face in result.faces()),
    )


def whole_section(title: str, sides: Mapping[str, WholeRun]) -> Section:
    """Return the table of the sides, and the verdict on the first one's picture.

    With two sides the first one's picture is held against the second's, which is the CPU's. No
    face repainted is a failure of its own: the face pass was to be part of it.
    """
    faces = min(run.faces for run in sides.values())
    verdicts = [Verdict(name="faces repainted", value=faces, limit=1, at_least=True)]
    if len(sides) == 2:
        one, other = sides.values()
        verdicts.append(
            Verdict(
                name="picture against the CPU's, dB",
                value=psnr_db(one.picture, other.picture),
                limit=LEAST_PSNR_DB,
                at_least=True,
            )
        )
    stages = sorted({stage for run in sides.values() for stage in run.timings_ms})
    return Section(
        title=title,
        columns=("", "s", "until the first, s", *(f"{stage}, ms" for stage in stages)),
        rows=tuple(
            (
                side,
                f"{run.seconds:.3f}",
                f"{run.first_s:.1f}",
                *(f"{run.timings_ms.get(stage, 0.0):.0f}" for stage in stages),
            )
            for side, run in sides.items()
        ),
        verdicts=tuple(verdicts),
    )
