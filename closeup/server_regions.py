"""The name, locks and folder of a running server, and clearing what a dead one left.

Each server has a region: a name that starts all its files in ``/dev/shm``, and a folder of that
name among the temporary files. A lock file in the one and the folder itself are held (``flock``)
by every process of the server. The kernel drops a lock with the last of them, however it ended,
so a lock that can be taken means a dead server. Process ids, which are used again and mean nothing
in another container, are never asked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from closeup.errors import ServerError
from closeup.server_guard import SHM, remove_folder, remove_shared_memory

_NAME = re.compile(r"closeup_\d+_[0-9a-f]{8}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """What marks a server's files as its own, and as in use.

    Attributes:
        name: prefix of its files in /dev/shm.
        folder: its own folder, for this user alone.
        lock_fds: open and locked; to be inherited by the server and then closed here.
    """

    name: str
    folder: Path
    lock_fds: tuple[int, int]

    def close(self) -> None:
        """Let go of the locks, which those who inherited them keep."""
        for lock_fd in self.lock_fds:
            os.close(lock_fd)


def create_region() -> Region:
    """Make a region: its locks held, its folder empty.

    Raises:
        ServerError: /dev/shm or the temporary folder cannot be written to.
    """
    name = f"closeup_{os.getpid()}_{secrets.token_hex(4)}"
    lock, folder = SHM / f"{name}.lock", Path(tempfile.gettempdir()) / name
    try:
        lock_fd = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        folder.mkdir(mode=0o700)
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # Another start may be trying these locks right now, before they are held: then it will
        # remove both, and this region is given up for a new one.
        for descriptor in (lock_fd, folder_fd):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise ServerError(
            f"{error.filename or SHM} cannot be written ({error.strerror}); the embedded server "
            "needs shared memory and a temporary folder (TMPDIR)."
        ) from error
    region = Region(name=name, folder=folder, lock_fds=(lock_fd, folder_fd))
    if lock.exists() and folder.exists():
        return region
    region.close()
    remove_folder(folder)
    remove_shared_memory(name)
    return create_region()


def region_exists(name: str) -> bool:
    """Whether anything of a region is left."""
    return (Path(tempfile.gettempdir()) / name).exists() or any(SHM.glob(f"{name}*"))


def clear_dead_regions() -> list[str]:
    """Remove the files of every server of this user that has no living process.

    Returns:
        The names of the regions that were cleared, sorted.
    """
    cleared = set()
    for name in _list_names(SHM):
        lock = SHM / f"{name}.lock"
        with _try_lock(lock) as locked:
            if locked or not lock.exists():
                remove_shared_memory(name)
                cleared.add(name)
    temporary = Path(tempfile.gettempdir())
    for name in _list_names(temporary):
        with _try_lock(temporary / name) as locked:
            if locked:
                remove_folder(temporary / name)
                cleared.add(name)
    return sorted(cleared)


@contextlib.contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Whether the lock on ``path`` could be taken, which is held until the end of the block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _list_names(folder: Path) -> list[str]:
    found = set()
    for path in folder.glob("closeup_*"):
        match = _NAME.match(path.name)
        with contextlib.suppress(OSError):
            if match and path.lstat().st_uid == os.getuid():
                found.add(match.group())
    return sorted(found)
