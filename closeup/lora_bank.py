"""The resident LoRA vectors that the engines of one pipeline gather from.

A row of the bank is one adapter: a LoRA with its weight, or a sum of several. It lies at the same
place in an array for each network (the denoiser, and text encoders with LoRA inputs). Files are
read and sums made before any lock of the bank is taken, and `LoraBank.array`, which every
denoising step calls, takes no lock at all.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from closeup.array_content import declare_versions
from closeup.errors import UnavailableError
from closeup.lora import LoraWeights, balanced_rows, combine_loras
from closeup.lora_keys import DENOISER
from closeup.lora_store import FileVersion, LoraStore
from closeup.manifest import LoraLayout

_RANK_STEP = 8

Array = npt.NDArray[Any]
_Key = tuple[tuple[str, FileVersion, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraLease:
    """A row in use; give it back with `LoraBank.release`.

    Attributes:
        row: what is leased; 0 for no LoRA.
        networks: those in which the row holds anything.
        warnings: sentences for the user.
    """

    row: int
    networks: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()

    def row_in(self, network: str) -> int:
        """Return the engine's ``lora_row`` for a network; 0 where the LoRAs change nothing."""
        return self.row if network in self.networks else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class BankCounters:
    """State of the bank.

    Attributes:
        rows: rows for adapters, the zero row not counted.
        resident: rows that hold one.
        in_use: rows that a lease keeps.
        hits: leases of an adapter that was resident.
        misses: leases that had to load one.
        array_bytes: size of the arrays; pages never written take no memory.
    """

    rows: int
    resident: int
    in_use: int
    hits: int
    misses: int
    array_bytes: int


@dataclass(kw_only=True, slots=True, eq=False)
class _Row:
    key: _Key
    row: int
    leases: int = 1
    ranks: dict[str, int] = field(default_factory=dict)  # by network; only where it has any
    warnings: tuple[str, ...] = ()
    failure: BaseException | None = None
    ready: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True, eq=False)
class BankView:
    """One network's part of a bank, as its engine's caller needs it."""

    bank: LoraBank
    network: str

    def array(self, rows: Sequence[int]) -> Array:
        """Return `LoraBank.array` of the network."""
        return self.bank.array(rows, self.network)


class LoraBank:
    """A fixed number of resident adapters. Safe to use from several threads.

    Args:
        store: where LoRAs come from.
        layouts: of the engines' banks, by network.
        rows: adapters that may be resident at once, S - 1.
        dtypes: of the engines' inputs ``lora``: float32 or float16; float32 where left out.
    """

    def __init__(
        self,
        store: LoraStore,
        layouts: Mapping[str, LoraLayout],
        *,
        rows: int,
        dtypes: Mapping[str, npt.DTypeLike] | None = None,
    ) -> None:
        if rows < 1:
            raise ValueError(f"the LoRA bank needs 1 row or more, not {rows}")
        self._store = store
        self._layouts = dict(layouts)
        self._zeros: dict[str, Array] = {}
        self._arrays: dict[str, Array] = {}
        self._versions: dict[str, list[int]] = {}  # of the arrays' rows: how often written
        for network, layout in layouts.items():
            dtype = np.dtype((dtypes or {}).get(network, np.float32))
            self._zeros[network] = np.zeros((1, layout.rows, 1), dtype)
            self._zeros[network].setflags(write=False)
            shape = rows + 1, layout.rows, self._width(network, 1)
            self._arrays[network] = np.zeros(shape, dtype)
            self._versions[network] = [0] * (rows + 1)
            declare_versions(self._arrays[network], self._versions[network])
        self._rows = rows
        self._free = list(range(rows, 0, -1))
        self._by_key: OrderedDict[_Key, _Row] = OrderedDict()  # least recently used first
        self._by_row: dict[int, _Row] = {}
        self._hits = self._misses = 0
        self._lock = threading.Lock()  # of the fields above but the arrays; held for moments
        self._writing = threading.Lock()  # of the arrays' content and widths

    def view(self, network: str) -> BankView:
        """Return a network's part."""
        return BankView(self, network)

    def acquire(self, loras: Sequence[tuple[str, float]]) -> LoraLease:
        """Make a sum of LoRAs resident and keep it so until it is released.

        May read files: call it outside the thread that runs denoising steps. Concurrent calls for
        the same sum load it once. A file replaced on disk gets a new row; leases of the old one
        keep what they have.

        Args:
            loras: ids and weights. Weights of a repeated id are added; the order is irrelevant.

        Returns:
            The row; row 0, which needs no loading, when every weight is 0.

        Raises:
            RequestError: unknown id or unusable file; no row is taken.
            UnavailableError: all rows are in use.
        """
        key = self._key(loras)
        if not key:
            return LoraLease(row=0)
        row, is_new = self._lease(key)
        if is_new:
            self._fill(row)
        else:
            row.ready.wait()
            if row.failure is not None:
                raise row.failure
        return LoraLease(row=row.row, networks=frozenset(row.ranks), warnings=row.warnings)

    def release(self, row: int) -> None:
        """Give a lease back; the adapter stays resident until its row is needed.

        Raises:
            ValueError: no lease of this row is open.
        """
        if row == 0:
            return
        with self._lock:
            entry = self._by_row.get(row)
            if entry is None or entry.leases == 0:
                raise ValueError(f"row {row} of the LoRA bank is not in use")
            entry.leases -= 1
            self._by_key.move_to_end(entry.key)

    def array(self, rows: Sequence[int], network: str = DENOISER) -> Array:
        """Return the bank for a call that uses ``rows``: (S, M, r), or (1, M, 1) when all are 0.

        Takes no lock. The array must not be changed; rows that are not leased may change while it
        is read. r is the largest rank of a resident adapter, rounded up to a multiple of 8.
        """
        return self._arrays[network] if any(rows) else self._zeros[network]

    def counters(self) -> BankCounters:
        """Return the state."""
        with self._lock:
            return BankCounters(
                rows=self._rows,
                resident=len(self._by_row),
                in_use=sum(row.leases > 0 for row in self._by_row.values()),
                hits=self._hits,
                misses=self._misses,
                array_bytes=sum(array.nbytes for array in self._arrays.values()),
            )

    def _key(self, loras: Sequence[tuple[str, float]]) -> _Key:
        weights: dict[str, float] = {}
        for lora_id, weight in loras:
            weights[lora_id] = weights.get(lora_id, 0.0) + weight
        versions = {lora_id: self._store.version(lora_id) for lora_id in weights}
        return tuple(
            (lora_id, versions[lora_id], weight)
            for lora_id, weight in sorted(weights.items())
            if weight != 0
        )

    def _lease(self, key: _Key) -> tuple[_Row, bool]:
        """Return the key's row with one more lease, and whether the caller must fill it."""
        with self._lock:
            row = self._by_key.get(key)
            if row is not None:
                row.leases += 1
                self._hits += 1
                return row, False
            row = _Row(key=key, row=self._take_row())
            self._by_key[key] = self._by_row[row.row] = row
            self._misses += 1
            return row, True

    def _take_row(self) -> int:
        if self._free:
            return self._free.pop()
        for row in self._by_key.values():
            if row.leases == 0:
                del self._by_key[row.key], self._by_row[row.row]
                return row.row
        raise UnavailableError(
            f"all {len(self._by_row)} places for LoRAs are in use by running requests; try again "
            "later."
        )

    def _fill(self, row: _Row) -> None:
        try:
            loras = [(self._store.load(lora_id), weight) for lora_id, _, weight in row.key]
            sums = {}
            for network, layout in self._layouts.items():
                parts = [(lora.networks[network], weight) for lora, weight in loras
                         if network in lora.networks]  # fmt: skip
                if parts:
                    sums[network] = combine_loras(parts, layout)
            warnings = [lora.warnings for lora, _ in loras]
            warnings += [weights.warnings for weights in sums.values()]
            row.warnings = tuple(itertools.chain.from_iterable(warnings))
            self._write(row, sums)
        except BaseException as error:
            with self._lock:
                del self._by_key[row.key], self._by_row[row.row]
                self._free.append(row.row)
            row.failure = error
            raise
        finally:
            row.ready.set()

    def _write(self, row: _Row, sums: Mapping[str, LoraWeights]) -> None:
        values = {network: self._converted(network, weights) for network, weights in sums.items()}
        with self._writing:
            with self._lock:  # what another thread's `_fit_width` iterates over
                row.ranks = {network: weights.rank for network, weights in sums.items()}
            for network, rank in row.ranks.items():
                self._fit_width(network)
                target = self._arrays[network][row.row]
                target[:, :rank] = values[network]
                target[:, rank:] = 0
                self._versions[network][row.row] += 1
                declare_versions(self._arrays[network], self._versions[network])

    def _fit_width(self, network: str) -> None:
        """Make an array as wide as the widest resident adapter, or up to twice that."""
        with self._lock:
            ranks = {row.row: row.ranks[network] for row in self._by_row.values()
                     if network in row.ranks}  # fmt: skip
        old = self._arrays[network]
        width = self._width(network, max(ranks.values()))
        if old.shape[2] >= width > old.shape[2] // 2:
            return
        new = np.zeros((*old.shape[:2], width), old.dtype)
        for row, rank in ranks.items():
            kept = min(rank, old.shape[2])
            new[row, :, :kept] = old[row, :, :kept]
        declare_versions(new, self._versions[network])
        self._arrays[network] = new  # readers have the old array or the new one, both whole

    def _width(self, network: str, rank: int) -> int:
        """Round up to a multiple of 8, but not past the engine's largest rank."""
        return min(-(-rank // _RANK_STEP) * _RANK_STEP, self._layouts[network].max_rank)

    def _converted(self, network: str, weights: LoraWeights) -> Array:
        dtype = self._arrays[network].dtype
        if dtype == np.float32:
            return weights.rows
        return balanced_rows(weights.rows, self._layouts[network], dtype)
