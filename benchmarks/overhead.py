"""Wall time outside engine calls, of one request at a time."""

from __future__ import annotations

import statistics

from benchmarks.results import Section, Verdict
from benchmarks.serving import Counters, Serving
from benchmarks.subjects import Subject


def measure_overhead(
    subject: Subject, server: Serving, *, repeats: int, warm_ups: int, limit: float
) -> Section:
    """Measure it.

    Args:
        subject: what the server has loaded.
        server: idle but for this.
        repeats: requests measured.
        warm_ups: requests before them.
        limit: target for the share of the client's wall time that no engine was running.
    """
    shares: list[float] = []
    walls: list[float] = []
    added: list[Counters] = []
    for repeat in range(-warm_ups, repeats):
        before = server.counters()
        run = server.run(subject.fields)
        spent = server.counters().since(before)
        if repeat >= 0:
            walls.append(run.wall_s)
            added.append(spent)
            shares.append(1 - sum(spent.engine_s.values()) / run.wall_s)
    share = statistics.median(shares)
    rows = [
        (
            model,
            f"{statistics.median(one.calls[model] for one in added):.0f}",
            f"{1000 * statistics.median(one.engine_s[model] for one in added):.1f}",
        )
        for model in sorted(added[0].engine_s)
        if added[0].calls[model]
    ]
    rows.append(("outside engine calls", "", f"{1000 * share * statistics.median(walls):.1f}"))
    rows.append(("the client's wall time", "", f"{1000 * statistics.median(walls):.1f}"))
    return Section(
        title=f"Wall time outside engine calls: {subject.title}",
        columns=("model", "calls", "ms"),
        rows=tuple(rows),
        verdicts=(
            Verdict(name="share of the wall time outside engine calls", value=share, limit=limit),
        ),
        notes=(
            f"Medians of {repeats} requests, one at a time. Engine time of the denoiser: its own "
            "counter around the engine call; of the others: Triton's compute_infer, which also "
            "holds the hand-over of tensors to the model's process.",
        ),
    )
