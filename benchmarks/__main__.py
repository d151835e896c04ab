"""``python -m benchmarks``: measure, print the tables, write them with the hardware."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.eager_process import EagerProcess, faster_wait_policy
from benchmarks.hardware import describe_machine, machine_kind
from benchmarks.lora_cost import measure_lora_cost
from benchmarks.memory import measure_memory
from benchmarks.overhead import measure_overhead
from benchmarks.results import (
    Section,
    report_data,
    report_json,
    report_markdown,
    section_markdown,
)
from benchmarks.serving import Serving, serving
from benchmarks.subjects import CACHE, ROOT, WEIGHTS, Subject, demo_subject, sd15_subject
from benchmarks.throughput import measure_throughput
from benchmarks.whole_request import measure_whole_request
from closeup.engines import count_threads

SD15_REPEATS = 3
SERVER_KINDS = ("whole", "overhead", "throughput", "memory")
KINDS = (*SERVER_KINDS, "lora")
OVERHEAD_LIMIT = {"demo": 0.08, "sd15": 0.03}
MEMORY_LIMIT = {"demo": None, "sd15": 1.8}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND",
                        help=f"what to measure: {', '.join(KINDS)}; default: all")  # fmt: skip
    parser.add_argument("--sd15", action="store_true", help="also at Stable Diffusion 1.5's size "
                        "(random weights; 12 GB of memory, 8 GB of disk, 17 for lora)")  # fmt: skip
    parser.add_argument("--no-demo", action="store_true", help="leave the demo model out")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the demo's weights")
    parser.add_argument("--repository", type=Path, help="where the demo is exported to")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.kinds) - set(KINDS))
    if unknown:
        parser.error(f"unknown kind {unknown[0]!r}; expected {', '.join(KINDS)}")
    kinds = tuple(options.kinds) or KINDS
    machine = describe_machine()
    sections: list[Section] = []
    if not options.no_demo:
        subject = demo_subject(options.weights, options.repository)
        sections += measure(subject, kinds, repeats=options.repeats)
    if options.sd15:
        sections += measure(sd15_subject(options.weights), kinds, repeats=SD15_REPEATS)
    if not options.no_write:
        write_report(sections, machine)
    return 0 if all(verdict.met for section in sections for verdict in section.verdicts) else 1


def measure(subject: Subject, kinds: Sequence[str], *, repeats: int) -> list[Section]:
    """Measure one subject, printing each section as it is found."""
    sections: list[Section] = []

    def found(section: Section) -> None:
        sections.append(section)
        print(f"\n{section_markdown(section)}", flush=True)

    if set(SERVER_KINDS) & set(kinds):
        measure_served(subject, kinds, found, repeats=repeats)
    if "lora" in kinds:
        for section in measure_lora_cost(subject, repeats=repeats):
            found(section)
    return sections


def measure_served(
    subject: Subject, kinds: Sequence[str], found: Callable[[Section], None], *, repeats: int
) -> None:
    """Measure what needs a server."""
    subject.export()
    threads = count_threads()
    with serving(subject, threads=threads) as server:
        if {"whole", "memory"} & set(kinds):
            compare(subject, server, kinds, found, threads=threads, repeats=repeats)
        if "overhead" in kinds:
            limit = OVERHEAD_LIMIT[subject.name]
            found(
                measure_overhead(
                    subject, server, repeats=repeats, warm_ups=subject.warm_ups, limit=limit
                )
            )
        if "throughput" in kinds and subject.name == "demo":
            found(measure_throughput(subject, server, repeats=min(repeats, 3)))


def compare(
    subject: Subject,
    server: Serving,
    kinds: Sequence[str],
    found: Callable[[Section], None],
    *,
    threads: int,
    repeats: int,
) -> None:
    """Measure what needs the eager side, which is loaded for no longer than that."""
    out = CACHE / subject.name
    out.mkdir(parents=True, exist_ok=True)
    policy = faster_wait_policy(subject, threads=threads, out=out / "eager.png")
    with EagerProcess(subject, threads=threads, wait_policy=policy) as eager:
        if "whole" in kinds:
            found(
                measure_whole_request(
                    subject, server, eager, repeats=repeats, warm_ups=subject.warm_ups, out=out
                )
            )
        if "memory" in kinds:
            limit = MEMORY_LIMIT[subject.name]
            found(measure_memory(subject, server, eager, out=out, limit=limit))


def write_report(sections: Sequence[Section], machine: dict[str, str]) -> None:
    """Write the report as Markdown and as JSON."""
    day = datetime.datetime.now(tz=datetime.timezone.utc).date()
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    stem = f"{day.isoformat()}-{machine_kind(machine)}"
    text = report_markdown(sections, machine, command, day)
    (folder / f"{stem}.md").write_text(text, encoding="utf-8")
    data = report_json(report_data(sections, machine, command, day))
    (folder / f"{stem}.json").write_text(data + "\n", encoding="utf-8")
    print(f"\nwritten: benchmarks/results/{stem}.md and .json")


if __name__ == "__main__":
    sys.exit(main())
