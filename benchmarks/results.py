"""What a benchmark found: rows for a table, and verdicts against the targets. Pure."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One figure against its target.

    Attributes:
        name: what it is.
        value: measured.
        limit: the target.
        at_least: whether the target is a lower limit, else an upper one.
    """

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side of its target."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def describe(self) -> str:
        """One line, e.g. ``ok    whole request 0.62 (at most 0.90)``."""
        word = "ok" if self.met else "MISSED"
        bound = "at least" if self.at_least else "at most"
        return f"{word:6}  {self.name}: {self.value:.3g} ({bound} {self.limit:g})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """What one benchmark found about one subject.

    Attributes:
        title: what was measured, on what.
        columns: of the table.
        rows: of the table, each as long as `columns`.
        verdicts: figures with targets.
        notes: sentences below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with aligned columns; the first to the left, the others to the right.

    Raises:
        ValueError: a row is not as long as ``columns``.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"row {row} has {len(row)} cells; expected {len(columns)}.")
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *others]) + " |"

    rule = (
        "|"
        + "|".join(
            "-" * (width + 1) + ("-" if index == 0 else ":") for index, width in enumerate(widths)
        )
        + "|"
    )
    return "\n".join([line(columns), rule, *(line(row) for row in rows)])


def section_markdown(section: Section) -> str:
    """Return a section as Markdown."""
    parts = [f"## {section.title}", markdown_table(section.columns, section.rows)]
    if section.verdicts:
        parts.append("\n".join(f"- {verdict.describe()}" for verdict in section.verdicts))
    parts += section.notes
    return "\n\n".join(parts)


def report_markdown(
    sections: Sequence[Section], machine: dict[str, str], command: str, day: datetime.date
) -> str:
    """Return the whole report."""
    facts = markdown_table(("machine", ""), tuple(machine.items()))
    head = f"# Benchmarks, {day.isoformat()}\n\nMade by `{command}`."
    return "\n\n".join([head, facts, *map(section_markdown, sections)]) + "\n"


def report_data(
    sections: Sequence[Section], machine: dict[str, str], command: str, day: datetime.date
) -> dict[str, Any]:
    """Return the same for JSON."""
    return {
        "date": day.isoformat(),
        "command": command,
        "machine": machine,
        "sections": [
            dataclasses.asdict(section)
            | {
                "verdicts": [
                    dataclasses.asdict(verdict) | {"met": verdict.met}
                    for verdict in section.verdicts
                ]
            }
            for section in sections
        ],
    }


def report_json(value: object, depth: int = 4, indent: str = "") -> str:
    """Write a report as JSON with a record a line, so that files of results can be compared.

    Args:
        value: what `json.dumps` takes.
        depth: how many levels are spread over lines; what lies deeper stays on one.
        indent: of the line that the value begins in.
    """
    if not depth or not value or not isinstance(value, (dict, list, tuple)):
        return json.dumps(value)
    inner = indent + " "
    if isinstance(value, dict):
        parts = [
            f"{json.dumps(name)}: {report_json(item, depth - 1, inner)}"
            for name, item in value.items()
        ]
        first, last = "{}"
    else:
        parts = [report_json(item, depth - 1, inner) for item in value]
        first, last = "[]"
    return f"{first}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{last}"
