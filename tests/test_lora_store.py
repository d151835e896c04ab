"""The LoRA folder and the resident bank: files that change, limits, threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import closeup.lora_store
from closeup.array_content import find_pieces
from closeup.errors import RequestError, UnavailableError
from closeup.lora_bank import LoraBank
from closeup.lora_read import Layouts, read_lora
from closeup.lora_store import LoraStore
from closeup.manifest import LoraLayer, LoraLayout
from tests.lora_writers import random_factors, tensors_from_factors, write_lora

LAYERS = tuple(LoraLayer(name=f"mid_block.x.{index}.to_q", in_features=6, out_features=10)
               for index in range(3))  # fmt: skip
LAYOUT = LoraLayout(max_rank=20, layers=LAYERS)
PLENTY = 1 << 30


def _write(folder: Path, name: str, *, seed: int = 0, rank: int = 4) -> Path:
    factors = random_factors(LAYERS, seed=seed, ranks=(rank,))
    # Written aside and moved: what a careful operator does, and the harder case to notice.
    aside = write_lora(folder / "aside", tensors_from_factors(factors, "kohya"))
    return aside.rename(folder / f"{name}.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    loras = tmp_path / "loras"
    loras.mkdir()
    for seed, name in enumerate(("a", "b", "c.v1")):
        _write(loras, name, seed=seed)
    return loras


def _store(folder: Path | None, byte_limit: int = PLENTY) -> LoraStore:
    return LoraStore(folder, {"denoiser": LAYOUT}, byte_limit)


def test_ids_lists_the_files_when_the_folder_holds_other_things(folder: Path) -> None:
    (folder / "notes.txt").write_text("x")
    (folder / "sub.safetensors").mkdir()
    (folder / ".hidden.safetensors").write_text("x")
    (folder / "with space.safetensors").write_text("x")
    assert _store(folder).ids() == ["a", "b", "c.v1"]
    assert _store(None).ids() == []
    assert _store(folder / "missing").ids() == []


def test_known_refuses_when_an_id_leads_out_of_the_folder(folder: Path) -> None:
    outside = folder.parent / "secret.safetensors"
    outside.write_bytes((folder / "a.safetensors").read_bytes())
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "inner.safetensors").symlink_to("a.safetensors")
    (folder / "circle.safetensors").symlink_to("circle.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    store = _store(folder)
    assert store.known("a")
    assert store.known("inner")
    bad = ("link", "circle", "pipe", "../secret", "..", ".", "", "a/../a", "a\x00", "A" * 5000)
    for lora_id in bad:
        assert not store.known(lora_id), lora_id
        with pytest.raises(RequestError, match="unknown LoRA id"):
            store.load(lora_id)


def test_load_names_some_known_ids_when_the_id_is_unknown(folder: Path) -> None:
    for index in range(4):
        _write(folder, f"d{index}")
    with pytest.raises(RequestError) as caught:
        _store(folder).load("zzz")
    assert caught.value.problems == {
        "prompt": "unknown LoRA id 'zzz'; known: a, b, c.v1, d0, d1 and 2 more."
    }


def test_check_says_what_to_do_when_nothing_can_be_loaded(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for store, words in (
        (_store(None), "has no LoRA folder"),
        (_store(tmp_path / "empty"), "folder is empty"),
        (LoraStore(folder, {"denoiser": None}, PLENTY), "exported without LoRA inputs"),
    ):
        with pytest.raises(RequestError, match=words):
            store.check(["a"])
        store.check([])


def test_load_answers_from_memory_when_the_file_is_unchanged(folder: Path) -> None:
    store = _store(folder)
    first = store.load("c.v1")
    assert first.name == "c.v1"
    assert store.load("c.v1") is first
    counters = store.counters()
    assert (counters.hits, counters.misses, counters.held) == (1, 1, 1)
    assert counters.held_bytes == first.size_bytes


def test_load_reads_again_when_the_file_is_replaced(folder: Path) -> None:
    store = _store(folder)
    before = store.load("a")
    facts = (folder / "a.safetensors").stat()
    _write(folder, "a", seed=99)  # same size; and the same time, as rsync -t would leave it
    os.utime(folder / "a.safetensors", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    after = store.load("a")
    assert np.abs(after.networks["denoiser"].rows - before.networks["denoiser"].rows).max() > 0.01
    assert store.counters().held == 1
    (folder / "a.safetensors").unlink()
    with pytest.raises(RequestError, match="unknown LoRA id"):
        store.load("a")


def test_load_drops_the_least_recently_used_when_the_limit_is_reached(folder: Path) -> None:
    size = _store(folder).load("a").size_bytes
    store = _store(folder, 2 * size)
    for lora_id in ("a", "b", "a", "c.v1", "a", "b"):
        store.load(lora_id)
    counters = store.counters()
    assert (counters.hits, counters.misses, counters.evictions) == (2, 4, 2)
    assert counters.held_bytes == 2 * size
    tiny = _store(folder, size - 1)
    tiny.load("a")
    assert tiny.counters().held_bytes == 0


def test_load_keeps_nothing_when_the_file_is_damaged(folder: Path) -> None:
    store = _store(folder)
    good = (folder / "a.safetensors").read_bytes()
    (folder / "a.safetensors").write_bytes(good[:-1])
    for _ in range(2):
        with pytest.raises(RequestError, match="the LoRA 'a' is truncated"):
            store.load("a")
    (folder / "a.safetensors").write_bytes(good)
    assert store.load("a").networks["denoiser"].rank == 4
    assert store.counters().misses == 1


def test_load_reads_a_refused_file_again_only_when_it_has_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def counted(path: Path, layouts: Layouts, *, name: str | None = None) -> Any:
        reads.append(name)
        return read_lora(path, layouts, name=name)

    monkeypatch.setattr(closeup.lora_store, "read_lora", counted)
    store = _store(folder)
    path = folder / "a.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    for _ in range(3):
        with pytest.raises(RequestError, match="the LoRA 'a' is truncated"):
            store.load("a")
    assert reads == ["a"]
    path.write_bytes(good)
    assert store.load("a").name == "a"
    assert reads == ["a", "a"]


def test_load_reads_again_when_a_file_could_not_be_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _store(folder)

    def denied(path: Path, mode: str) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied)
        with pytest.raises(RequestError, match="cannot be read \\(Permission denied\\)"):
            store.load("a")
    assert store.load("a").name == "a"


class _Gate:
    """Replaces `read_lora`; reading `held` waits until it is opened."""

    def __init__(self, held: str) -> None:
        self.held = held
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.reads: list[str] = []

    def __call__(self, path: Path, layouts: Layouts, *, name: str | None = None) -> Any:
        self.reads.append(str(name))
        if name == self.held:
            self.reached.set()
            assert self.opened.wait(20)
        return read_lora(path, layouts, name=name)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> _Gate:
    gate = _Gate("a")
    monkeypatch.setattr(closeup.lora_store, "read_lora", gate)
    return gate


def test_load_reads_once_and_stalls_no_other_id_when_threads_meet(
    folder: Path, gate: _Gate
) -> None:
    store = _store(folder)
    with ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(store.load, "a") for _ in range(3)]
        assert gate.reached.wait(20)
        assert pool.submit(store.load, "b").result(20).name == "b"
        assert not any(future.done() for future in slow)
        gate.opened.set()
        loaded = [future.result(20) for future in slow]
    assert gate.reads.count("a") == 1
    assert all(weights is loaded[0] for weights in loaded)


def _bank(folder: Path, rows: int = 3, dtype: Any = np.float32) -> LoraBank:
    return LoraBank(_store(folder), {"denoiser": LAYOUT}, rows=rows, dtypes={"denoiser": dtype})


def _delta(bank: LoraBank, row: int) -> Any:
    """The first layer's delta, (10, 6), as the graph would compute it from the bank."""
    both = bank.array([row])[row, :16].astype(np.float64)
    return both[6:] @ both[:6].T


def _expected(seed: int, rank: int = 4) -> Any:
    return random_factors(LAYERS, seed=seed, ranks=(rank,))[LAYERS[0].name].delta


# Two float32 products of rank 4 with values of 0.01: rounding is below 1e-8, zeros are off by
# 1e-2, and half precision (11 bits) by 1e-5.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-7}


def test_acquire_puts_the_sum_into_a_row_when_it_is_new(folder: Path) -> None:
    bank = _bank(folder)
    lease = bank.acquire([("a", 0.5), ("b", -2.0), ("a", 0.25)])
    assert lease.row != 0
    assert bank.array([lease.row]).shape == (4, LAYOUT.rows, 8)
    np.testing.assert_allclose(
        _delta(bank, lease.row), 0.75 * _expected(0) - 2 * _expected(1), **CLOSE
    )
    assert not bank.array([lease.row])[0].any()
    again = bank.acquire([("b", -2.0), ("a", 0.75)])
    assert again.row == lease.row
    assert (bank.counters().hits, bank.counters().misses) == (1, 1)


def test_array_is_one_zero_row_when_no_row_is_in_use(folder: Path) -> None:
    bank = _bank(folder)
    assert bank.acquire([]).row == 0
    assert bank.acquire([("a", 0.0)]).row == 0
    assert bank.acquire([("a", 1.0), ("a", -1.0)]).row == 0
    bank.release(0)
    assert bank.array([0, 0]).shape == (1, LAYOUT.rows, 1)
    assert not bank.array([]).any()
    with pytest.raises(RequestError, match="unknown LoRA id"):
        bank.acquire([("zzz", 0.0)])


def test_acquire_evicts_the_longest_released_when_rows_run_out(folder: Path) -> None:
    bank = _bank(folder, rows=2)
    first, second = bank.acquire([("a", 1.0)]), bank.acquire([("b", 1.0)])
    with pytest.raises(UnavailableError, match="all 2 places"):
        bank.acquire([("c.v1", 1.0)])
    bank.release(second.row)
    bank.release(first.row)
    assert bank.counters().resident == 2
    third = bank.acquire([("c.v1", 1.0)])
    assert third.row == second.row
    np.testing.assert_allclose(_delta(bank, third.row), _expected(2), **CLOSE)
    assert bank.acquire([("a", 1.0)]).row == first.row
    assert bank.counters().hits == 1


def test_release_refuses_when_the_row_is_not_in_use(folder: Path) -> None:
    bank = _bank(folder)
    lease = bank.acquire([("a", 1.0)])
    assert bank.acquire([("a", 1.0)]).row == lease.row
    bank.release(lease.row)
    bank.release(lease.row)
    for row in (lease.row, 2, 99):
        with pytest.raises(ValueError, match="is not in use"):
            bank.release(row)


def test_acquire_takes_a_new_row_when_the_file_was_replaced(folder: Path) -> None:
    bank = _bank(folder)
    old = bank.acquire([("a", 1.0)])
    _write(folder, "a", seed=99)
    new = bank.acquire([("a", 1.0)])
    assert new.row != old.row
    np.testing.assert_allclose(_delta(bank, old.row), _expected(0), **CLOSE)
    np.testing.assert_allclose(_delta(bank, new.row), _expected(99), **CLOSE)


def test_array_follows_the_widest_adapter_when_it_comes_and_goes(folder: Path) -> None:
    _write(folder, "wide", seed=5, rank=19)
    bank = _bank(folder, rows=2)
    narrow = bank.acquire([("a", 1.0)])
    held = bank.array([narrow.row])
    wide = bank.acquire([("wide", 1.0)])
    assert bank.array([wide.row]).shape == (3, LAYOUT.rows, 20)  # 24 would pass max_rank
    assert held.shape == (3, LAYOUT.rows, 8)  # a step under way keeps what it has
    np.testing.assert_allclose(_delta(bank, narrow.row), _expected(0), **CLOSE)
    np.testing.assert_allclose(_delta(bank, wide.row), _expected(5, rank=19), **CLOSE)
    bank.release(wide.row)
    other = bank.acquire([("b", 1.0)])
    assert bank.array([other.row]).shape == (3, LAYOUT.rows, 8)
    np.testing.assert_allclose(_delta(bank, narrow.row), _expected(0), **CLOSE)
    np.testing.assert_allclose(_delta(bank, other.row), _expected(1), **CLOSE)


def test_acquire_warns_again_when_a_reduced_adapter_is_resident(folder: Path) -> None:
    _write(folder, "wide", seed=5, rank=30)
    bank = _bank(folder)
    for _ in range(2):
        (warning,) = bank.acquire([("wide", 1.0)]).warnings
        assert "rank 30 was reduced to 20" in warning


def test_acquire_keeps_half_precision_when_the_network_has_it(folder: Path) -> None:
    bank = _bank(folder, dtype=np.float16)
    lease = bank.acquire([("a", 1e-4)])
    array = bank.array([lease.row])
    assert array.dtype == np.float16
    assert bank.array([0]).dtype == np.float16
    # 11 bits: 5e-4 a factor and two of them; unbalanced, B would be subnormal with 5 bits left.
    expected = 1e-4 * _expected(0)
    np.testing.assert_allclose(
        _delta(bank, lease.row), expected, rtol=0, atol=2e-3 * np.abs(expected).max()
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_acquire_spoils_no_other_row_when_values_are_huge(folder: Path, dtype: Any) -> None:
    factors = random_factors(LAYERS, seed=1, scale=1e37)
    write_lora(folder / "huge.safetensors", tensors_from_factors(factors, "kohya"))
    bank = _bank(folder, dtype=dtype)
    good, huge = bank.acquire([("a", 1.0)]), bank.acquire([("huge", 10.0)])
    np.testing.assert_allclose(_delta(bank, good.row), _expected(0), rtol=0, atol=1e-4)
    with np.errstate(all="ignore"):
        both = bank.array([huge.row])[huge.row, :16].astype(np.float32)
        assert not np.isfinite(both[6:] @ both[:6].T).all()


def test_acquire_frees_the_row_when_the_file_is_damaged(folder: Path) -> None:
    (folder / "bad.safetensors").write_bytes(b"x" * 100)
    bank = _bank(folder, rows=1)
    for _ in range(3):
        with pytest.raises(RequestError, match="no safetensors file"):
            bank.acquire([("bad", 1.0)])
    assert bank.counters().resident == 0
    assert bank.acquire([("a", 1.0)]).row == 1


def test_acquire_stalls_nobody_when_another_load_takes_long(folder: Path, gate: _Gate) -> None:
    bank = _bank(folder)
    ready = bank.acquire([("b", 1.0)])
    with ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(bank.acquire, [("a", 1.0)]) for _ in range(3)]
        assert gate.reached.wait(20)
        assert bank.array([ready.row]).any()
        assert bank.acquire([("c.v1", 1.0)]).row not in (0, ready.row)
        bank.release(ready.row)
        gate.opened.set()
        rows = {future.result(20).row for future in slow}
    assert len(rows) == 1
    assert gate.reads.count("a") == 1
    np.testing.assert_allclose(_delta(bank, rows.pop()), _expected(0), **CLOSE)


def test_acquire_fails_for_all_who_wait_when_the_load_fails(folder: Path, gate: _Gate) -> None:
    (folder / "a.safetensors").write_bytes(b"x" * 100)
    bank = _bank(folder, rows=1)
    with ThreadPoolExecutor(3) as pool:
        slow = [pool.submit(bank.acquire, [("a", 1.0)]) for _ in range(3)]
        assert gate.reached.wait(20)
        gate.opened.set()
        for future in slow:
            with pytest.raises(RequestError, match="no safetensors file"):
                future.result(20)
    assert bank.counters().in_use == 0


def test_bank_gives_every_lease_its_own_adapter_when_many_threads_take_turns(folder: Path) -> None:
    _write(folder, "wide", seed=5, rank=18)
    bank = _bank(folder, rows=3)
    expected = {"a": _expected(0), "b": _expected(1), "c.v1": _expected(2),
                "wide": _expected(5, rank=18)}  # fmt: skip
    names = list(expected)

    def work(seed: int) -> int:
        rng = np.random.default_rng(seed)
        refused = 0
        for _ in range(60):
            name, weight = names[rng.integers(4)], float(rng.integers(1, 4))
            try:
                lease = bank.acquire([(name, weight)])
            except UnavailableError:
                refused += 1
                continue
            np.testing.assert_allclose(_delta(bank, lease.row), weight * expected[name], **CLOSE)
            bank.release(lease.row)
        return refused

    with ThreadPoolExecutor(5) as pool:
        refused = sum(pool.map(work, range(5)))
    assert refused < 300
    counters = bank.counters()
    assert counters.in_use == 0
    assert counters.hits + counters.misses >= 300 - refused


def test_bank_refuses_when_it_has_no_rows(folder: Path) -> None:
    make: Callable[[], LoraBank] = lambda: _bank(folder, rows=0)  # noqa: E731
    with pytest.raises(ValueError, match="1 row or more"):
        make()


def test_bank_tells_which_rows_changed_when_an_adapter_is_written(folder: Path) -> None:
    bank = _bank(folder)
    first = bank.acquire([("a", 1.0)])
    array = bank.array([first.row])
    before = [piece.version for piece in find_pieces(array)]
    second = bank.acquire([("b", 1.0)])
    assert bank.array([second.row]) is array  # of one width: written in place
    after = [piece.version for piece in find_pieces(array)]
    changed = [row for row, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    assert changed == [second.row]
    assert find_pieces(bank.array([0]))[0].owner is not None  # the zero row never changes
