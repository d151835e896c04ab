"""Blocks of a benchmark that share a budget: each has a time limit, and failing is a result.

GPU time is scarce: whatever breaks or runs late costs its own block, never the others, and what
was measured before is on disk by then.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

# Less than this is not enough to load anything.
LEAST_S = 3.0
# After the budget: a block that hangs in foreign code is cut off with the whole process.
GRACE_S = 15.0
CUT_OFF_CODE = 3


class BlockTimeout(BaseException):
    """The block's time is up; no Exception, so that libraries do not swallow it."""


class NotRun(Exception):  # noqa: N818 - an answer, not a fault
    """A block cannot run here; the message says why."""


@dataclass(kw_only=True)
class Budget:
    """Seconds for a whole benchmark, and what became of its blocks.

    Attributes:
        total_s: for everything.
        seconds: block -> wall seconds it took.
        reasons: block -> why it was not run, or not to its end.
    """

    total_s: float
    seconds: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    _started_s: float = field(default_factory=time.perf_counter)

    @property
    def left_s(self) -> float:
        """Seconds until the budget is spent; negative afterwards."""
        return self.total_s - (time.perf_counter() - self._started_s)

    def run(self, name: str, block: Callable[[], None], *, limit_s: float) -> bool:
        """Run a block, at most until its limit or the budget's end.

        Args:
            name: for the report.
            block: notes its findings itself, one by one, so that a cut one keeps the first.
            limit_s: of this block alone.

        Returns:
            Whether it came to its end.
        """
        limit_s = min(limit_s, self.left_s)
        if limit_s < LEAST_S:
            self.reasons[name] = f"not run: the budget of {self.total_s:.0f} s was spent"
            return False
        started_s = time.perf_counter()
        try:
            with _alarm(limit_s):
                block()
        except BlockTimeout:
            self.reasons[name] = f"stopped after {limit_s:.0f} s, its time limit"
        except NotRun as reason:
            self.reasons[name] = f"not run: {' '.join(str(reason).split())}"
        except Exception as error:  # a benchmark reports what broke and goes on
            self.reasons[name] = f"failed: {first_line(error)}"
        finally:
            self.seconds[name] = time.perf_counter() - started_s
        return name not in self.reasons


def first_line(error: BaseException, limit: int = 300) -> str:
    """Return an error's class and first line, cut to ``limit`` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def last_line(output: str) -> str:
    """Return the last line of a command's output: what it died of."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


_ALARM_AGAIN_S = 0.5


@contextmanager
def cut_off(budget: Budget, write: Callable[[], None]) -> Iterator[None]:
    """End the process some seconds after the budget, whatever it does; ``write`` comes first."""

    def end() -> None:
        budget.reasons["budget"] = (
            f"cut off {GRACE_S:.0f} s after the budget of {budget.total_s:.0f} s"
        )
        try:
            write()
        finally:
            os._exit(CUT_OFF_CODE)

    timer = threading.Timer(max(0.0, budget.left_s) + GRACE_S, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise BlockTimeout in the main thread after ``seconds``, and again until it gets through.

    Python that foreign code calls (TensorRT's log) loses what is raised in it.
    """

    def ring(number: int, frame: FrameType | None) -> None:
        raise BlockTimeout

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, _ALARM_AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
