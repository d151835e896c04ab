"""The live display of a running request: a bar a stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from closeup_client.result import Progress

LINE_INTERVAL_S = 2.0


class ProgressDisplay:
    """Shows progress events while it is open; what it drew on a terminal is gone afterwards.

    Args:
        stream: where to; standard error, so that standard output stays clean.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._tasks: dict[str, TaskID] = {}
        self._stage = ""
        self._printed_s = 0.0
        self._bars: Bars | None = None
        if stream.isatty():
            self._bars = Bars(
                TextColumn("{task.description:<16}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("{task.fields[eta]}"),
                console=Console(file=stream),
                transient=True,
            )

    def __enter__(self) -> ProgressDisplay:
        if self._bars:
            self._bars.start()
            self._tasks[""] = self._bars.add_task("waiting", total=None, eta="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bars:
            self._bars.stop()

    def update(self, event: Progress) -> None:
        """Show one event."""
        if self._bars:
            self._draw(self._bars, event)
        else:
            self._print(event)

    def _draw(self, bars: Bars, event: Progress) -> None:
        if "" in self._tasks:
            bars.remove_task(self._tasks.pop(""))
        if event.stage != self._stage:
            self._finish(bars)
            self._stage = event.stage
        if event.stage not in self._tasks:
            self._tasks[event.stage] = bars.add_task(stage_title(event.stage), total=None, eta="")
        # A stage without steps, such as a face pass without faces, has done its nothing.
        total, done = (event.steps, event.step) if event.steps else (1, 1)
        task = self._tasks[event.stage]
        bars.update(task, total=total, completed=done, eta=eta_text(event))

    def _finish(self, bars: Bars) -> None:
        if self._stage in self._tasks:
            task = self._tasks[self._stage]
            total = next((row.total for row in bars.tasks if row.id == task), None)
            bars.update(task, completed=total or 0, eta="")

    def _print(self, event: Progress) -> None:
        now_s = time.monotonic()
        is_new = event.stage != self._stage
        is_due = now_s - self._printed_s >= LINE_INTERVAL_S
        if not (is_new or is_due or (event.step == event.steps and event.steps > 1)):
            return
        self._stage, self._printed_s = event.stage, now_s
        parts = [f"{stage_title(event.stage)} {event.step}/{event.steps}"]
        parts += [text for text in (eta_text(event), f"{event.elapsed_s:.1f} s elapsed") if text]
        self._stream.write(f"{', '.join(parts)}\n")
        self._stream.flush()


def stage_title(stage: str) -> str:
    """A stage's name for people."""
    return stage.replace("_", " ")


def eta_text(event: Progress) -> str:
    """What is left of the stage: ``"12 s left"``, ``"2:05 left"`` or nothing when unknown."""
    if event.eta_s is None or event.step >= event.steps:
        return ""
    seconds = max(round(event.eta_s), 0)
    if seconds < 60:
        return f"{seconds} s left"
    return f"{seconds // 60}:{seconds % 60:02d} left"
