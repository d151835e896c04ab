"""Small files that several processes keep together: replaced whole, merged under a lock.

TensorRT's timing cache (what the builder measured) and TensorRT-RTX's runtime cache (kernels
compiled for this GPU) are each one blob a version and GPU, which every process reads at its start
and adds to at its end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

CACHE_VARIABLE = "CLOSEUP_PLAN_CACHE"


def cache_folder() -> Path:
    """Return the folder of those files: ``CLOSEUP_PLAN_CACHE``, else in the user's cache."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "closeup" / "plans"


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new one, never a part.

    Raises:
        OSError: the disk is full or not writable; the old content stays, nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's is for its owner alone; servers run as others
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def read_file(path: Path) -> bytes:
    """Return a file's content; empty when there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def merge_file(path: Path, merge: Callable[[bytes], bytes]) -> None:
    """Replace a file by what ``merge`` makes of its content; other processes wait meanwhile.

    Args:
        path: of the file.
        merge: given the present content, empty when there is none; returns the new one.

    Raises:
        OSError: as `replace_file`.
    """
    with lock_file(path.with_name(path.name + ".lock")):
        replace_file(path, merge(read_file(path)))


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold a lock against other processes and threads, which wait; freed when this one dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def try_lock_file(path: Path) -> Iterator[bool]:
    """Hold a lock if nobody else does; gives whether it is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
