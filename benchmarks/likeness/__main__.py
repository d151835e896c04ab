"""``python -m benchmarks.likeness``: likeness before and after the face pass, and what judges it.

Tables are printed and written to benchmarks/results/, sheets to out/likeness/.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.hardware import describe_machine
from benchmarks.likeness import commands
from benchmarks.likeness.prompts import COUNTS, Group, Split
from benchmarks.likeness.sweeps import PARAMETERS
from benchmarks.results import (
    Section,
    report_data,
    report_json,
    report_markdown,
    section_markdown,
)
from benchmarks.subjects import ROOT

OUT = ROOT / "out" / "likeness"
YUNET = ROOT.parent / "shared" / "data" / "yunet" / "yunet_n_dynamic.onnx"


def make_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.likeness", description=__doc__)
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository",
                        help="exported demo model (python -m demo.run --export-only)")  # fmt: skip
    parser.add_argument("--lora-dir", type=Path, default=ROOT / "demo" / "weights" / "loras")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of sheets and base pictures")
    parser.add_argument("--no-cache", action="store_true", help="paint every base picture anew")
    parser.add_argument("--no-write", action="store_true", help="print only")
    kinds = parser.add_subparsers(dest="kind", metavar="COMMAND")
    for name, text in (
        ("run", "the benchmark (default)"),
        ("judge", "the judge's own accuracy"),
        ("generator", "attributes right in generated pictures"),
        ("detector", "the face detector on generated pictures"),
        ("sweep", "closeup with several values of a parameter"),
        ("crowd", "closeup in groups: one prompt for all faces, and one for each"),
        ("worst", "a sheet of the worst results before and after"),
    ):
        _add_options(name, kinds.add_parser(name, help=text, description=text))
    return parser


def _add_options(name: str, parser: argparse.ArgumentParser) -> None:
    if name in ("run", "sweep", "worst", "crowd"):
        split = Split.TUNE if name == "sweep" else Split.REPORT
        parser.add_argument("--split", type=Split, choices=list(Split), default=split,
                            metavar="|".join(Split), help="which seeds")  # fmt: skip
        usual = {"sweep": 40, "crowd": COUNTS[Group.CROWD]}.get(name, COUNTS[Group.LONG])
        words = "long shots; half as many with the LoRA, 3 of 10 with several people"
        parser.add_argument("--count", type=int, default=usual,
                            help="pictures" if name == "crowd" else words)  # fmt: skip
    if name in ("judge", "generator"):
        parser.add_argument("--count", type=int, default=800 if name == "judge" else 200)
    if name == "detector":
        parser.add_argument("--yunet", type=Path, default=YUNET, help="the real YuNet, ONNX")
        parser.add_argument("--propose", action="store_true", help="write sheets and a truth.json "
                            "to check by hand")  # fmt: skip
    if name == "sweep":
        parser.add_argument("--parameter", required=True, choices=sorted(PARAMETERS))
        parser.add_argument("values", nargs="+", help="numbers, or: default")
    if name == "worst":
        parser.add_argument("--results", type=int, default=10, help="how many")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 when an aim is missed."""
    parser = make_parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.kind is None:
        options = parser.parse_args([*given, "run"])
    if getattr(options, "count", 1) < 1:
        parser.error(f"--count is {options.count}; expected at least 1.")
    machine, started_s = describe_machine(), time.perf_counter()
    sections: list[Section] = []
    data: dict[str, object] = {}
    for found in getattr(commands, f"{options.kind}_command")(options):
        if isinstance(found, Section):
            sections.append(found)
            print(f"\n{section_markdown(found)}", flush=True)
        else:
            data |= found
    print(f"\n{time.perf_counter() - started_s:.0f} s")
    if not options.no_write:
        machine["wall time of the command"] = f"{time.perf_counter() - started_s:.0f} s"
        write_report(sections, data, machine, options.kind, given)
    return 0 if all(verdict.met for section in sections for verdict in section.verdicts) else 1


def write_report(
    sections: Sequence[Section],
    data: dict[str, object],
    machine: dict[str, str],
    kind: str,
    arguments: Sequence[str],
) -> None:
    """Write the report as Markdown and as JSON; a sweep's stays in out/."""
    if not sections:
        return
    day = datetime.datetime.now(tz=datetime.timezone.utc).date()
    command = " ".join(["python -m benchmarks.likeness", *arguments])
    folder = OUT if kind in ("sweep", "worst") else ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / ("likeness" if kind == "run" else f"likeness-{kind}")
    text = report_markdown(sections, machine, command, day)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    record = report_data(sections, machine, command, day) | data
    stem.with_suffix(".json").write_text(report_json(record) + "\n", encoding="utf-8")
    print(f"written: {stem.name}.md and .json in {folder.name}/")


if __name__ == "__main__":
    sys.exit(main())
