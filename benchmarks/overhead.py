"""Wall time outside engine calls, of one request at a time."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.processes import cpu_seconds_by_name, machine_cpu_seconds
from benchmarks.results import Section, Verdict
from benchmarks.serving import Counters, Serving
from benchmarks.subjects import Subject

# These run no engine; their processor time is a cost of everything around the engines, though
# not all of it: the engines' processes receive and answer calls as well.
ENGINELESS = ("generate", "generate_stream", "tritonserver")


@dataclass(frozen=True, kw_only=True, slots=True)
class OverheadSample:
    """One measured request.

    Attributes:
        wall_s: the client's.
        added: what the server's counters gained.
    """

    wall_s: float
    added: Counters

    @property
    def outside_s(self) -> float:
        """Wall time in which no engine ran."""
        return self.wall_s - sum(self.added.engine_s.values())

    @property
    def share(self) -> float:
        """The same as a share of the wall time."""
        return self.outside_s / self.wall_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What the processors did while all requests were measured.

    Attributes:
        cpu_s: process name of the server -> processor seconds.
        machine_s: processor seconds of everything on the machine.
        wall_s: how long it took.
    """

    cpu_s: Mapping[str, float]
    machine_s: float
    wall_s: float

    @property
    def others(self) -> float:
        """Share of the processors' time that anything but the server used."""
        spent_s = self.machine_s - sum(self.cpu_s.values())
        return max(0.0, spent_s) / (self.wall_s * len(os.sched_getaffinity(0)))


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
    for _ in range(warm_ups):
        server.run(subject.fields)
    cpu_s, machine_s, started_s = (
        cpu_seconds_by_name(server.pid), machine_cpu_seconds(), time.perf_counter()
    )  # fmt: skip
    samples = []
    for _ in range(repeats):
        before = server.counters()
        run = server.run(subject.fields)
        added = server.counters().since(before)
        samples.append(OverheadSample(wall_s=run.wall_s, added=added))
    load = Load(
        cpu_s={name: total - cpu_s.get(name, 0.0)
               for name, total in cpu_seconds_by_name(server.pid).items()},
        machine_s=machine_cpu_seconds() - machine_s,
        wall_s=time.perf_counter() - started_s,
    )  # fmt: skip
    return overhead_section(subject.title, samples, load, limit)


def overhead_section(
    title: str, samples: Sequence[OverheadSample], load: Load, limit: float
) -> Section:
    """Return the table of measured requests.

    Args:
        title: of the subject.
        samples: one a request.
        load: over all of them.
        limit: as in `measure_overhead`.
    """
    share = statistics.median(sample.share for sample in samples)
    models = sorted(name for name, calls in samples[0].added.calls.items() if calls)
    rows = [
        (
            model,
            f"{statistics.median(one.added.calls[model] for one in samples):.0f}",
            _ms(statistics.median(one.added.engine_s[model] for one in samples)),
        )
        for model in models
    ]
    total_s = sum(load.cpu_s.values())
    engineless_s = sum(load.cpu_s.get(name, 0.0) for name in ENGINELESS)
    rows += [
        ("outside engine calls", "", _ms(statistics.median(one.outside_s for one in samples))),
        ("the client's wall time", "", _ms(statistics.median(one.wall_s for one in samples))),
        ("CPU time of processes without engines", "", _ms(engineless_s / len(samples))),
        ("CPU time of all server processes", "", _ms(total_s / len(samples))),
    ]
    return Section(
        title=f"Wall time outside engine calls: {title}",
        columns=("model", "calls", "ms"),
        rows=tuple(rows),
        verdicts=(
            Verdict(name="share of the wall time outside engine calls", value=share, limit=limit),
        ),
        notes=(
            f"Medians of {len(samples)} requests, one at a time, CPU times means. Engine time of "
            "the denoiser: its own counter around the engine call; of the others: Triton's "
            "compute_infer, which also holds the hand-over of tensors to the model's process. "
            f"Processes without engines: {engineless_s / max(total_s, 1e-9):.1%} of the server's "
            f"CPU time. Other programs used {load.others:.0%} of the processors meanwhile.",
        ),
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"
