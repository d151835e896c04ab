"""Folders that exports work in, and the one moment in which their results become what is served.

Such a folder is gone afterwards, whatever happened: the next export clears what a killed one left,
and puts back what an unfinished publish had moved away.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock

from closeup.cache_files import lock_file, replace_file, try_lock_file
from closeup.errors import ExportError

_ALIVE = ".alive"
# While this file is there, what it lists is being moved.
_JOURNAL = ".publish.json"
_OLD = ".old"
_RANDOM = "[a-z0-9_]" * 8  # what `tempfile.mkdtemp` puts behind a prefix
# Models that no export replaces. Triton takes every folder of a repository for a model, dot or not,
# and does not start with one that has no version; inside a model's folder it passes over dots.
HOSTS = ("generate", "generate_stream")
_HOSTED = ".export-"


@contextlib.contextmanager
def lock_repository(repository: Path) -> Iterator[None]:
    """Hold the repository against other exports; they wait.

    Raises:
        ExportError: the repository cannot be made or written.
    """
    with contextlib.ExitStack() as stack:
        with explained(repository):
            repository.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(repository / ".export.lock"))
        yield


@contextlib.contextmanager
def open_scratch(repository: Path) -> Iterator[Path]:
    """Give a folder from which folders can be renamed into the repository; it is gone afterwards.

    It lies beside the repository. Where it cannot, because the repository is a mount or its parent
    is not writable, it lies in the folder of `generate`, which a starting Triton only warns of
    (one that polls loads `generate` again); in a repository without `generate`, which answers no
    requests yet, in the repository itself.

    Raises:
        ExportError: no place can be written.
    """
    with contextlib.ExitStack() as stack:
        with lock_repository(repository):  # so that nobody takes the new folder for a dead one
            with explained(repository):
                clear_dead(repository)
                folder = stack.enter_context(_first_usable(repository))
        yield folder


def clear_dead(repository: Path) -> None:
    """Clear the folders of exports that were killed, and undo what they had half published.

    The repository is locked by the caller.

    Raises:
        OSError: something cannot be put back; the dead folder stays.
    """
    whole = repository.resolve()
    places = [(whole.parent, f".{whole.name}-")]
    places += [(place, _HOSTED) for place in (whole, *(whole / host for host in HOSTS))]
    for parent, prefix in places:
        for folder in sorted(parent.glob(glob.escape(prefix) + _RANDOM)):
            if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                continue
            with try_lock_file(folder / _ALIVE) as held:  # a living export holds it
                if held:
                    _undo_swap(folder, repository)
                    shutil.rmtree(folder, ignore_errors=True)


def swap_folders(
    folder: Path, repository: Path, *, new: Sequence[str], gone: Sequence[str]
) -> None:
    """Move folders into the repository and out of it; all of them, or none.

    The repository is locked by the caller.

    Args:
        folder: from `open_scratch`.
        repository: that it was opened for.
        new: names in ``folder``; they take the place of what the repository has by these names.
        gone: names to be taken out of the repository.

    Raises:
        OSError: something cannot be moved; the repository is as it was.
    """
    journal, old = folder / _JOURNAL, folder / _OLD
    old.mkdir(exist_ok=True)
    replace_file(journal, json.dumps({"new": list(new)}).encode())
    try:
        for name in (*new, *gone):
            if os.path.lexists(repository / name):
                os.rename(repository / name, old / name)
            if name in new:
                os.rename(folder / name, repository / name)
        journal.unlink()  # from here on it is done
    except BaseException:
        _undo_swap(folder, repository)
        raise


@contextlib.contextmanager
def explained(repository: Path) -> Iterator[None]:
    """Turn an error of the file system into one sentence about the repository.

    Raises:
        ExportError: an OSError was raised.
    """
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        where = f" ({error.filename})" if error.filename else ""
        raise ExportError(
            f"the repository {repository} cannot be written: {reason}{where}; mend that, or choose "
            "another with --repository. What was there before stays."
        ) from error


def _undo_swap(folder: Path, repository: Path) -> None:
    """Put everything back, from wherever `swap_folders` was stopped; nothing when it ended."""
    journal = folder / _JOURNAL
    if not journal.exists():
        return
    for name in json.loads(journal.read_text(encoding="utf-8"))["new"]:
        if not (folder / name).exists() and os.path.lexists(repository / name):
            os.rename(repository / name, folder / name)
    for path in sorted((folder / _OLD).iterdir()):
        os.rename(path, repository / path.name)
    journal.unlink()


@contextlib.contextmanager
def _first_usable(repository: Path) -> Iterator[Path]:
    """Make the folder in the first place that allows it, and hold its lock.

    Raises:
        OSError: no place does.
    """
    whole = repository.resolve()
    host = next((whole / name for name in HOSTS if (whole / name).is_dir()), whole)
    failure: OSError | None = None
    for parent, prefix in ((whole.parent, f".{whole.name}-"), (host, _HOSTED), (whole, _HOSTED)):
        with contextlib.ExitStack() as stack:
            try:
                folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
                stack.callback(_discard, folder)
                stack.enter_context(lock_file(folder / _ALIVE))
                _try_rename(folder, whole)
            except OSError as error:
                failure = error
                continue
            yield folder
            return
    assert failure is not None
    raise failure


def _try_rename(folder: Path, repository: Path) -> None:
    """Fail now if folders cannot be renamed into the repository; tried with a file.

    Device numbers do not tell: two mounts of one file system have the same.
    """
    probe, moved = folder / ".probe", repository / f"{folder.name}.probe"
    probe.touch()
    os.rename(probe, moved)
    moved.unlink()


def _discard(folder: Path) -> None:
    """Remove the folder, unless it holds what could not be put back."""
    if not (folder / _JOURNAL).exists():
        shutil.rmtree(folder, ignore_errors=True)
