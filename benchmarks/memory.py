"""Peak memory of all server processes, and of the eager process, as sums of PSS."""

from __future__ import annotations

from pathlib import Path

from benchmarks.eager_process import EagerProcess
from benchmarks.processes import MemoryWatch
from benchmarks.results import Section, Verdict
from benchmarks.serving import Serving
from benchmarks.subjects import Subject

_MIB = 2**20


def measure_memory(
    subject: Subject, server: Serving, eager: EagerProcess, *, out: Path, limit: float | None
) -> Section:
    """Run requests on each side and watch.

    Args:
        subject: what both have loaded.
        server: ours.
        eager: theirs.
        out: folder for the eager side's picture.
        limit: target for the ratio; None has none.
    """
    with MemoryWatch(pid=server.pid) as ours:
        for _ in range(subject.memory_requests):
            server.run(subject.fields)
    with MemoryWatch(pid=eager.pid) as theirs:
        for _ in range(subject.memory_requests):
            eager.run(subject.fields, out / "eager.png")
    ratio = ours.peak_bytes / theirs.peak_bytes
    rows = [(name, f"{size / _MIB:.0f}") for name, size in sorted(ours.at_peak.items())]
    rows.append(("all server processes", f"{ours.peak_bytes / _MIB:.0f}"))
    rows.append(("the diffusers process", f"{theirs.peak_bytes / _MIB:.0f}"))
    rows.append(("ratio", f"{ratio:.2f}"))
    verdicts = () if limit is None else (
        Verdict(name="peak memory, server / diffusers", value=ratio, limit=limit),
    )  # fmt: skip
    return Section(
        title=f"Peak memory, sum of PSS: {subject.title}",
        columns=("process", "MiB"),
        rows=tuple(rows),
        verdicts=verdicts,
        notes=(
            f"Sampled every 0.1 s during {subject.memory_requests} request(s). PSS counts a shared "
            "page once, in equal parts; a process's row is its size when the sum was largest.",
        ),
    )
