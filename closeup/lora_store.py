"""The folder of LoRA files, with the recently used ones kept in memory.

A LoRA's id is its file's name without ``.safetensors``. Files may be added, replaced and removed
while the server runs: a file that changed is read again.
"""

from __future__ import annotations

import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from closeup.errors import RequestError
from closeup.lora import Lora
from closeup.lora_files import UnreadableError
from closeup.lora_read import Layouts, read_lora
from closeup.prompt import is_lora_id

SUFFIX = ".safetensors"
_NAMES_IN_MESSAGE = 5
_REFUSALS_KEPT = 256


class FileVersion(NamedTuple):
    """What changes when a file is written or replaced."""

    mtime_ns: int
    size_bytes: int
    inode: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreCounters:
    """Totals since the start, and what is held now.

    Attributes:
        hits: loads answered from memory.
        misses: loads that read a file.
        evictions: LoRAs dropped for lack of room.
        held: LoRAs in memory.
        held_bytes: their size.
    """

    hits: int
    misses: int
    evictions: int
    held: int
    held_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    version: FileVersion
    lora: Lora


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraEntry:
    """One file of the folder.

    Attributes:
        id: what prompts call it.
        size_bytes: of the file.
        networks: what it adapts; None while it is not in memory.
    """

    id: str
    size_bytes: int
    networks: tuple[str, ...] | None


class LoraStore:
    """Loads LoRAs by id. Safe to use from several threads; loads of different ids overlap.

    Args:
        folder: where the files are; None when there is none.
        layouts: of the model's banks, by network (see `closeup.lora_read`); None, or nothing but
            None in it, when it was exported without LoRA inputs.
        byte_limit: size of what is kept in memory, least recently used dropped first. A LoRA
            larger than that is loaded each time.
    """

    def __init__(
        self, folder: Path | None, layouts: Layouts | None = None, byte_limit: int = 0
    ) -> None:
        self._folder = folder
        self._layouts = dict(layouts or {})
        self._takes_loras = any(layout is not None for layout in self._layouts.values())
        self._byte_limit = byte_limit
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._held_bytes = 0
        self._refused: OrderedDict[str, tuple[FileVersion, dict[str, str]]] = OrderedDict()
        self._hits = self._misses = self._evictions = 0
        self._lock = threading.Lock()  # of the fields above; never held while a file is read
        self._loading: dict[str, threading.Lock] = {}

    def ids(self) -> list[str]:
        """Return the ids of all files, sorted."""
        if self._folder is None or not self._folder.is_dir():
            return []
        names = (entry.name for entry in self._folder.iterdir())
        ids = (name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX))
        return sorted(name for name in ids if self.known(name))

    def entries(self) -> list[LoraEntry]:
        """Return what `ids` names with each file's size; no file is read."""
        found = [(lora_id, self._find(lora_id)) for lora_id in self.ids()]
        with self._lock:
            held = {lora_id: tuple(one.lora.networks) for lora_id, one in self._held.items()}
        return [
            LoraEntry(id=lora_id, size_bytes=file[1].size_bytes, networks=held.get(lora_id))
            for lora_id, file in found
            if file is not None
        ]

    def known(self, lora_id: str) -> bool:
        """Whether there is such a file; one look at the file system, nothing is read."""
        return self._find(lora_id) is not None

    def check(self, lora_ids: Iterable[str]) -> None:
        """Refuse ids that cannot be served, before anything runs.

        Raises:
            RequestError: an id is unknown, or the model takes no LoRAs.
        """
        for lora_id in lora_ids:
            self.version(lora_id)

    def version(self, lora_id: str) -> FileVersion:
        """Return what identifies the file's present content.

        Raises:
            RequestError: see `check`.
        """
        if not self._takes_loras:
            raise RequestError(
                {
                    "prompt": f"LoRA {lora_id!r} cannot be used: this model was exported without "
                    "LoRA inputs (--lora-rank 0)."
                }
            )
        found = self._find(lora_id)
        if found is None:
            raise RequestError({"prompt": self._unknown(lora_id)})
        return found[1]

    def load(self, lora_id: str) -> Lora:
        """Return a LoRA, from memory when its file has not changed.

        Raises:
            RequestError: unknown id, or a file that cannot be used (see
                `closeup.lora_read.read_lora`). Of such a file the sentence is kept, so that it
                is read again only when it has changed.
        """
        self.version(lora_id)
        held = self._held_version(lora_id)
        if held is not None:
            return held
        with self._lock:
            loading = self._loading.setdefault(lora_id, threading.Lock())
        with loading:
            held = self._held_version(lora_id)  # another thread may have loaded it meanwhile
            return self._read(lora_id) if held is None else held

    def counters(self) -> StoreCounters:
        """Return the totals."""
        with self._lock:
            return StoreCounters(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                held=len(self._held),
                held_bytes=self._held_bytes,
            )

    def _held_version(self, lora_id: str) -> Lora | None:
        found = self._find(lora_id)
        with self._lock:
            held = self._held.get(lora_id)
            if held is None or found is None or held.version != found[1]:
                return None
            self._held.move_to_end(lora_id)
            self._hits += 1
            return held.lora

    def _read(self, lora_id: str) -> Lora:
        found = self._find(lora_id)
        if found is None:
            raise RequestError({"prompt": self._unknown(lora_id)})
        path, version = found  # taken before reading: a later write shows as another version
        with self._lock:
            refused = self._refused.get(lora_id)
        if refused is not None and refused[0] == version:
            raise RequestError(refused[1])
        try:
            lora = read_lora(path, self._layouts, name=lora_id)
        except RequestError as error:
            self._refuse(lora_id, version, error)
            raise
        with self._lock:
            self._misses += 1
            self._drop(lora_id)
            if lora.size_bytes <= self._byte_limit:
                self._held[lora_id] = _Held(version, lora)
                self._held_bytes += lora.size_bytes
            while self._held_bytes > self._byte_limit:
                self._drop(next(iter(self._held)))
                self._evictions += 1
        return lora

    def _refuse(self, lora_id: str, version: FileVersion, error: RequestError) -> None:
        if isinstance(error.__cause__, UnreadableError):  # may pass without a change of the file
            return
        with self._lock:
            self._refused[lora_id] = version, error.problems
            while len(self._refused) > _REFUSALS_KEPT:
                self._refused.popitem(last=False)

    def _drop(self, lora_id: str) -> None:
        held = self._held.pop(lora_id, None)
        if held is not None:
            self._held_bytes -= held.lora.size_bytes

    def _find(self, lora_id: str) -> tuple[Path, FileVersion] | None:
        """The regular file of an id, which must lie in the folder when links are followed."""
        if self._folder is None or not is_lora_id(lora_id):
            return None
        try:
            folder = self._folder.resolve(strict=True)
            path = (folder / f"{lora_id}{SUFFIX}").resolve(strict=True)
            facts = path.stat()
        except (OSError, RuntimeError):  # missing, no permission, or links in a circle
            return None
        if not stat.S_ISREG(facts.st_mode) or not path.is_relative_to(folder):
            return None
        return path, FileVersion(facts.st_mtime_ns, facts.st_size, facts.st_ino)

    def _unknown(self, lora_id: str) -> str:
        if self._folder is None:
            return (
                f"unknown LoRA id {lora_id[:80]!r}: this server has no LoRA folder; start it with "
                "--lora-dir."
            )
        ids = self.ids()
        if not ids:
            return f"unknown LoRA id {lora_id[:80]!r}: the server's LoRA folder is empty."
        names = ", ".join(ids[:_NAMES_IN_MESSAGE])
        more = len(ids) - _NAMES_IN_MESSAGE
        return (
            f"unknown LoRA id {lora_id[:80]!r}; known: {names}"
            f"{f' and {more} more' if more > 0 else ''}."
        )
