"""The process between a program and its tritonserver, so that neither outlives the other.

Run as a script by :mod:`closeup.server` (standard library only, isolated interpreter). It starts
the server as its child and watches its own standard input, a pipe whose other end the program
holds. When a byte comes the server is stopped in order, its running requests first; when the pipe
closes without one, the program has died in whatever way and the server is killed. Either way its
files are removed. Should the guard itself be
killed, the kernel kills the server (``PR_SET_PDEATHSIG``; safe here, since it is tied to the
thread that forks and the guard has only one).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.1
SHM = Path("/dev/shm")


def remove_shared_memory(region: str) -> None:
    """Remove every file in /dev/shm whose name starts with ``region``; the lock file goes last."""
    for path in sorted(SHM.glob(f"{region}*"), key=lambda path: path.suffix == ".lock"):
        with contextlib.suppress(OSError):
            path.unlink()


def remove_folder(folder: Path) -> None:
    """Remove a server's folder."""
    shutil.rmtree(folder, ignore_errors=True)


def _make_death_signal(libc: ctypes.CDLL) -> Callable[[], None]:
    guard = os.getpid()

    def die_with_guard() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(1)

    return die_with_guard


def _stop_group(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """End the child, then whatever is left of its process group, and reap it all.

    Args:
        child: the leader of its group.
        grace_s: how long it may take to end by itself; 0 kills it at once.
    """
    if child.poll() is None and grace_s > 0:
        child.terminate()
        try:
            child.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            pass
    if child.poll() is None:
        child.kill()
        child.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


def _wait(child: subprocess.Popen[bytes], program: int, asked: list[bool]) -> bool:
    """Wait until the child has ended, the program has gone, or someone asked to stop.

    Returns:
        Whether the child may take its time to stop.
    """
    # The parent's id is asked too: a process forked from the program may hold the pipe open.
    while child.poll() is None and not asked and os.getppid() == program:
        readable, _, _ = select.select([sys.stdin], [], [], _POLL_S)
        if readable:
            return bool(os.read(sys.stdin.fileno(), 1))
    return bool(asked)


def main(argument: str) -> int:
    """Guard one server.

    Args:
        argument: JSON with ``command`` (list), ``region``, ``folder``, ``lock_fds`` (inherited by
            every process of the server), ``grace_s``.

    Returns:
        The server's exit status, 128 + n when signal n ended it.
    """
    program = os.getppid()
    job = json.loads(argument)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    asked: list[bool] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(True)

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    child = subprocess.Popen(
        job["command"],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=job["lock_fds"],
        preexec_fn=_make_death_signal(libc),
    )
    grace_s = 0.0
    try:
        if _wait(child, program, asked):
            grace_s = float(job["grace_s"])
    finally:
        _stop_group(child, grace_s)
        remove_shared_memory(job["region"])
        remove_folder(Path(job["folder"]))
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
