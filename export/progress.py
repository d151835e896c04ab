"""How far a build is: told by TensorRT's builder, said now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

_REPORT_S = 30.0


class Progress(Protocol):
    """Told how far a build is; may raise KeyboardInterrupt to stop it."""

    def __call__(self, done: int, total: int) -> None:
        """Note ``done`` of ``total`` steps of the outermost phase."""


def make_monitor(trt: Any, progress: Progress) -> Any:
    """Return a monitor for a builder's config; its ``stopped`` says what ended the build.

    An exception must not cross TensorRT's own frames: it is kept, to be raised behind them.
    """
    base: Any = trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.stopped: BaseException | None = None
            self._phases: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._phases[name] = steps

        def step_complete(self, name: str, step: int) -> bool:
            if name in self._phases:
                try:
                    progress(step + 1, self._phases[name])
                except BaseException as error:
                    self.stopped = error
            return self.stopped is None

        def phase_finish(self, name: str) -> None:
            self._phases.pop(name, None)

    return Monitor()


def timed_report(
    say: Callable[[str], None], title: str, clock: Callable[[], float] = time.monotonic
) -> Progress:
    """Return a progress that says a line every half minute.

    Args:
        say: takes the line.
        title: what is built.
        clock: seconds.
    """
    started_s = clock()
    said_s = started_s

    def progress(done: int, total: int) -> None:
        nonlocal said_s
        now_s = clock()
        if now_s - said_s >= _REPORT_S:
            said_s = now_s
            say(f"{title}: building, step {done} of {total}, {now_s - started_s:.0f} s")

    return progress
