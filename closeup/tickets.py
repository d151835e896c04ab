"""The server's one limit on work in flight, and the LoRAs a request keeps resident."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from closeup.drain import is_draining
from closeup.errors import ModelError, RequestError, UnavailableError
from closeup.lora_bank import LoraLease
from closeup.lora_keys import DENOISER

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Ticket:
    slots: int
    loras: LoraLease
    granted_s: float


class TicketDesk:
    """Grants tickets while there are slots; every ticket must be released.

    A ticket whose holder died is taken back after its lease, so that no slot is lost for ever.

    Args:
        capacity: slots in all; a picture takes one.
        lease_s: seconds after which a ticket is taken back.
        acquire_loras: makes LoRAs [(id, weight), ...] resident (see
            `closeup.lora_bank.LoraBank`); may raise RequestError or UnavailableError.
        release_loras: gives a row of the bank back.
        clock: seconds.
        is_closed: whether no more tickets are granted.
    """

    def __init__(
        self,
        *,
        capacity: int,
        lease_s: float,
        acquire_loras: Callable[[Sequence[tuple[str, float]]], LoraLease],
        release_loras: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
        is_closed: Callable[[], bool] = is_draining,
    ) -> None:
        self._capacity = capacity
        self._lease_s = lease_s
        self._acquire_loras = acquire_loras
        self._release_loras = release_loras
        self._clock = clock
        self._is_closed = is_closed
        self._lock = threading.Lock()
        self._tickets: dict[int, _Ticket] = {}
        self._reserved = 0

    @property
    def slots_in_use(self) -> int:
        """Slots that tickets hold now."""
        with self._lock:
            return self._reserved

    def acquire(self, slots: int, loras: Sequence[tuple[str, float]]) -> tuple[int, list[str]]:
        """Take slots and make the LoRAs resident.

        Args:
            slots: wanted, at least 1.
            loras: (id, weight) pairs; empty for none.

        Returns:
            The ticket's number, and sentences for the client.

        Raises:
            UnavailableError: not enough free slots or bank rows, or the server is about to stop;
                nothing is held afterwards.
            RequestError: a LoRA does not fit, or more slots than there are; nothing is held
                afterwards.
        """
        if self._is_closed():
            raise UnavailableError("the server is shutting down; try another server.")
        if not 1 <= slots <= self._capacity:
            raise RequestError(
                {
                    "num_images": f"got {slots}; this server works on 1 to {self._capacity} "
                    "pictures at once; ask for so many in a request."
                }
            )
        self._expire()
        with self._lock:
            if self._reserved + slots > self._capacity:
                raise UnavailableError(
                    f"{self._reserved} of {self._capacity} slots are taken and this request "
                    f"needs {slots}; try again later."
                )
            self._reserved += slots
        try:
            lease = self._acquire_loras(loras) if loras else LoraLease(row=0)
        except BaseException:
            with self._lock:
                self._reserved -= slots
            raise
        with self._lock:
            # One that nobody guesses: whoever names it may return it. 0 stands for none.
            number = secrets.randbelow(2**63 - 1) + 1
            self._tickets[number] = _Ticket(slots, lease, self._clock())
        return number, list(lease.warnings)

    def lora_row(self, number: int, network: str = DENOISER) -> int:
        """Return the row of a ticket's LoRAs in a network's bank, 0 for none.

        Raises:
            ModelError: no such ticket, or its lease has ended.
        """
        with self._lock:
            if number not in self._tickets:
                raise ModelError(f"the denoiser knows no ticket {number}; its lease has ended.")
            return self._tickets[number].loras.row_in(network)

    def release(self, number: int) -> None:
        """Give a ticket back; one that is unknown (its lease ended) is ignored."""
        with self._lock:
            ticket = self._tickets.pop(number, None)
            if ticket is None:
                return
            self._reserved -= ticket.slots
        if ticket.loras.row:
            self._release_loras(ticket.loras.row)

    def _expire(self) -> None:
        now_s = self._clock()
        with self._lock:
            late = [
                number
                for number, ticket in self._tickets.items()
                if now_s - ticket.granted_s > self._lease_s
            ]
        for number in late:
            log.warning("ticket %d was held past its lease of %g s", number, self._lease_s)
            self.release(number)
