"""One whole request: the server against PyTorch eager, in turns."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.eager_process import EagerProcess
from benchmarks.measuring import Comparison, compare_pairs, median_by_name, psnr_db
from benchmarks.processes import timed_cpu
from benchmarks.results import Section, Verdict
from benchmarks.serving import Serving
from benchmarks.subjects import Subject

RATIO_LIMIT = 0.9
# The two sides round differently and nothing else: 80 dB. One step too many gives about 30 dB.
PSNR_LIMIT_DB = 40.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    wall_s: float
    cpu_s: float
    timings_ms: dict[str, float]


def measure_whole_request(
    subject: Subject,
    server: Serving,
    eager: EagerProcess,
    *,
    repeats: int,
    warm_ups: int,
    out: Path,
) -> Section:
    """Compare the two sides.

    Args:
        subject: what both have loaded.
        server: ours.
        eager: theirs.
        repeats: pairs of measured requests.
        warm_ups: pairs before them.
        out: folder for both sides' pictures.
    """
    out.mkdir(parents=True, exist_ok=True)
    ours: list[_Sample] = []
    theirs: list[_Sample] = []
    faces = 0
    eager.pause()
    for repeat in range(-warm_ups, repeats):
        with timed_cpu(server.pid) as spent:
            answer = server.run(subject.fields)
        ours.append(_Sample(wall_s=answer.wall_s, cpu_s=spent["cpu_s"],
                            timings_ms=answer.result.info["timings_ms"]))  # fmt: skip
        with timed_cpu(eager.pid) as spent:
            other = eager.run(subject.fields, out / "eager.png")
        eager.pause()
        theirs.append(_Sample(wall_s=other.wall_s, cpu_s=spent["cpu_s"],
                              timings_ms=other.timings_ms))  # fmt: skip
        if repeat == 0:
            (out / "server.png").write_bytes(answer.result.images[0])
            faces = sum(face["action"] == "repaint" for face in answer.result.faces())
    del ours[:warm_ups], theirs[:warm_ups]
    agreement_db = psnr_db(_pixels(out / "server.png"), _pixels(out / "eager.png"))
    wall = compare_pairs([s.wall_s for s in ours], [s.wall_s for s in theirs])
    cpu = compare_pairs([s.cpu_s for s in ours], [s.cpu_s for s in theirs])
    return Section(
        title=f"Whole request against diffusers in PyTorch eager: {subject.title}",
        columns=("stage", "server ms", "eager ms", "ratio"),
        rows=(*_stage_rows(ours, theirs), _row("whole request", wall), _row("CPU time", cpu)),
        verdicts=(
            Verdict(name="whole request, server / eager", value=wall.ratio, limit=RATIO_LIMIT),
            Verdict(name="agreement of the two pictures, dB", value=agreement_db,
                    limit=PSNR_LIMIT_DB, at_least=True),
        ),
        notes=(
            f"Medians of {repeats} requests on each side, taken in turns after {warm_ups} "
            f"warm-ups; ratios are medians of neighbours (quartiles of the whole request "
            f"{wall.spread[0]:.2f} to {wall.spread[1]:.2f}). {faces} face(s) repainted; "
            f"eager ran with OMP_WAIT_POLICY={eager.wait_policy}, the faster of active and "
            "passive here, and was held (SIGSTOP) during the server's turns, in which its waiting "
            "threads would take a core.",
        ),
    )  # fmt: skip


def _stage_rows(ours: list[_Sample], theirs: list[_Sample]) -> list[tuple[str, ...]]:
    mine = median_by_name([sample.timings_ms for sample in ours])
    other = median_by_name([sample.timings_ms for sample in theirs])
    return [
        (name, f"{mine[name]:.0f}", f"{other[name]:.0f}", f"{mine[name] / other[name]:.2f}")
        for name in other
        if name in mine
    ]


def _row(name: str, comparison: Comparison) -> tuple[str, ...]:
    return (
        name,
        f"{1000 * comparison.ours:.0f}",
        f"{1000 * comparison.theirs:.0f}",
        f"{comparison.ratio:.2f}",
    )


def _pixels(path: Path) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
