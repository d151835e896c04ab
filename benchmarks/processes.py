"""Memory and processor time of a process and all its descendants, from /proc."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

SAMPLE_INTERVAL_S = 0.1
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def parents_of_all() -> dict[int, int]:
    """Return process id -> its parent's."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parents[int(folder.name)] = int(_stat_fields(int(folder.name))[1])
    return parents


def descendants(pid: int, parents: Mapping[int, int]) -> list[int]:
    """Return ``pid`` and every process below it.

    Args:
        pid: the root.
        parents: process id -> its parent's.
    """
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def pss_bytes(pid: int) -> int:
    """Proportional set size: private memory and this process's share of what it shares.

    Returns:
        0 for a process that has ended.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def cpu_seconds(pid: int) -> float:
    """Processor seconds that ``pid`` and its descendants have used so far."""
    return sum(cpu_seconds_by_name(pid).values())


def cpu_seconds_by_name(pid: int) -> dict[str, float]:
    """The same by process name (see `process_name`), in steps of the kernel's tick."""
    named: dict[str, float] = {}
    for one in descendants(pid, parents_of_all()):
        with contextlib.suppress(OSError):
            fields = _stat_fields(one)
            name = process_name(one)
            spent_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
            named[name] = named.get(name, 0.0) + spent_s
    return named


def machine_cpu_seconds() -> float:
    """Processor seconds that everything on this machine has used since it was started."""
    line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    user, nice, system, _, _, interrupts, soft_interrupts, *_ = map(int, line.split()[1:])
    return (user + nice + system + interrupts + soft_interrupts) / _TICKS_PER_S


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on; the name before may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


@dataclass(kw_only=True)
class MemoryWatch:
    """Samples a process tree's memory from a thread until the ``with`` block ends.

    Attributes:
        pid: root of the tree.
        peak_bytes: largest sum of PSS seen.
        at_peak: process name -> bytes, when the sum was largest.
    """

    pid: int
    peak_bytes: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> MemoryWatch:
        self.sample()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.sample()

    def sample(self) -> None:
        """Look once."""
        sizes = {pid: pss_bytes(pid) for pid in descendants(self.pid, parents_of_all())}
        total = sum(sizes.values())
        if total > self.peak_bytes:
            self.peak_bytes = total
            self.at_peak = _by_name(sizes)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            self.sample()


def _by_name(sizes: Mapping[int, int]) -> dict[str, int]:
    named: dict[str, int] = {}
    for pid, size in sizes.items():
        name = process_name(pid)
        named[name] = named.get(name, 0) + size
    return named


def process_name(pid: int) -> str:
    """Name a server process by the Triton model it runs, else by its program."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return "ended"
    program = Path(words[0]).name
    if "python_backend_stub" in program:
        return Path(words[1]).parent.parent.name  # <repository>/<model>/<version>/<file>
    return program


@contextlib.contextmanager
def timed_cpu(pid: int) -> Iterator[dict[str, float]]:
    """Time a block: fills ``wall_s`` and ``cpu_s`` of the process tree below ``pid``."""
    spent: dict[str, float] = {}
    before_s, started_s = cpu_seconds(pid), time.perf_counter()
    yield spent
    spent["wall_s"] = time.perf_counter() - started_s
    spent["cpu_s"] = cpu_seconds(pid) - before_s
