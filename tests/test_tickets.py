"""Slots: granted, refused, given back, taken back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from closeup.errors import ModelError, RequestError, UnavailableError
from closeup.lora_bank import LoraLease
from closeup.tickets import TicketDesk


class Rows:
    """Bank rows handed out in order; the id "bad" does not fit."""

    def __init__(self) -> None:
        self.held: list[int] = []

    def acquire(self, loras: Sequence[tuple[str, float]]) -> LoraLease:
        if loras[0][0] == "bad":
            raise RequestError({"prompt": "does not fit."})
        self.held.append(len(self.held) + 1)
        return LoraLease(
            row=self.held[-1], networks=frozenset({"denoiser"}), warnings=("was compressed.",)
        )

    def release(self, row: int) -> None:
        self.held.remove(row)


def desk(rows: Rows, now_s: list[float] | None = None) -> TicketDesk:
    times = now_s if now_s is not None else [0.0]
    return TicketDesk(
        capacity=4,
        lease_s=10,
        acquire_loras=rows.acquire,
        release_loras=rows.release,
        clock=lambda: times[0],
    )


def test_acquire_is_refused_when_slots_run_out_and_works_after_a_release() -> None:
    made = desk(Rows())
    first, _ = made.acquire(3, [])
    with pytest.raises(UnavailableError, match="3 of 4 slots are taken and this request needs 2"):
        made.acquire(2, [])
    made.acquire(1, [])
    assert made.slots_in_use == 4
    made.release(first)
    assert made.slots_in_use == 1
    made.acquire(3, [])


def test_ticket_holds_a_lora_row_until_its_release() -> None:
    rows = Rows()
    made = desk(rows)
    number, warnings = made.acquire(1, [("a", 1.0)])
    assert made.lora_row(number) == 1
    assert made.lora_row(number, "text_encoder") == 0  # the LoRA holds nothing for it
    assert warnings == ["was compressed."]
    made.release(number)
    made.release(number)  # twice is harmless
    assert rows.held == []
    with pytest.raises(ModelError, match=f"no ticket {number}"):
        made.lora_row(number)


def test_nothing_is_held_when_a_lora_does_not_fit() -> None:
    made = desk(Rows())
    with pytest.raises(RequestError):
        made.acquire(4, [("bad", 1.0)])
    assert made.slots_in_use == 0


def test_ticket_is_taken_back_when_its_lease_ends() -> None:
    now_s = [0.0]
    rows = Rows()
    made = desk(rows, now_s)
    made.acquire(4, [("a", 1.0)])
    now_s[0] = 10.5
    made.acquire(4, [])
    assert rows.held == []


@pytest.mark.parametrize("slots", [5, 0, -100])
def test_more_slots_than_there_are_or_none_is_the_requests_fault(slots: int) -> None:
    made = desk(Rows())
    with pytest.raises(RequestError, match=f"num_images: got {slots}; this server works on 1 to 4"):
        made.acquire(slots, [])
    assert made.slots_in_use == 0


def test_ticket_numbers_cannot_be_guessed() -> None:
    made = desk(Rows())
    first, _ = made.acquire(1, [])
    second, _ = made.acquire(1, [])
    assert abs(first - second) > 1_000_000
    assert 0 < min(first, second)
    assert max(first, second) < 2**63


def test_no_ticket_is_granted_when_the_server_is_about_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOSEUP_DRAIN_FILE", str(tmp_path / "draining"))
    made = desk(Rows())
    running, _ = made.acquire(1, [])
    (tmp_path / "draining").touch()
    with pytest.raises(UnavailableError, match="shutting down"):
        made.acquire(1, [])
    made.release(running)
    assert made.slots_in_use == 0
