"""The Triton model `<model>_denoiser`: `closeup.denoiser.Denoiser` behind late answers.

Non-decoupled: `execute` hands segments to the batcher's thread and returns; each answer is sent
when its segment is done.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from closeup.denoiser import LEASE_MARGIN_S, Answer, Denoiser, LoraCounters
from closeup.settings import read_settings
from closeup.triton_glue import Reply, Watchdog, configure_logging, request_inputs


class TritonPythonModel:
    """See the module."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the engine and run one step to warm up."""
        configure_logging()
        settings = read_settings()
        self._limit_s = settings.request_timeout_s + LEASE_MARGIN_S
        self._metrics = _Metrics(args["model_name"])
        self._watchdog = Watchdog()
        self._denoiser = Denoiser(
            Path(args["model_repository"]),
            version=args["model_version"],
            settings=settings,
            on_tick=self._metrics.tick,
        )
        self._metrics.state(0, self._denoiser.lora_counters())

    def execute(self, requests: Sequence[Any]) -> None:
        """Start every request; answers come later."""
        for request in requests:
            reply = self._watchdog.guard(Reply(request, self._limit_s))
            try:
                future = self._denoiser.start(request_inputs(request))
            except BaseException as error:
                reply.fail(error)
            else:
                future.add_done_callback(partial(self._answer, reply))

    def finalize(self) -> None:
        """Answer what is still open and release the engine."""
        self._denoiser.close()
        self._watchdog.close()

    def _answer(self, reply: Reply, done: Future[Answer]) -> None:
        error = done.exception()
        if error is not None:
            reply.fail(error)
        else:
            reply.finish(done.result())
        self._metrics.state(self._denoiser.slots_in_use, self._denoiser.lora_counters())


class _Metrics:
    """Counters and gauges on Triton's metrics endpoint."""

    def __init__(self, model: str) -> None:
        self._labels = {"model": model}
        self._families: list[Any] = []  # Triton drops a metric with its family
        self._calls = self._counter("engine_calls_total", "Denoiser engine calls")
        self._steps = self._counter("sequence_steps_total", "Denoising steps of sequences")
        self._seconds = self._counter("engine_seconds_total", "Seconds in the denoiser engine")
        self._slots = self._gauge("slots_in_use", "Pictures in flight")
        self._totals = {
            name: self._counter(f"lora_{name}_total", description)
            for name, description in LORA_TOTALS.items()
        }
        self._states = {
            name: self._gauge(f"lora_{name}", description)
            for name, description in LORA_STATES.items()
        }
        self._counted = dict.fromkeys(LORA_TOTALS, 0)
        self._ticks = [0.0, 0.0, 0.0]
        self._lock = threading.Lock()

    def tick(self, sequences: int, seconds: float) -> None:
        """Count an engine call.

        Every change of a metric crosses to Triton's process, at a few tenths of a millisecond
        each, so ticks are summed here and published with the answers.
        """
        with self._lock:
            for index, amount in enumerate((1, sequences, seconds)):
                self._ticks[index] += amount

    def state(self, slots_in_use: int, loras: LoraCounters | None) -> None:
        """Publish what is in use, and what was counted since the last time."""
        with self._lock:  # answers come from several threads
            self._slots.set(slots_in_use)
            ticks, self._ticks = self._ticks, [0.0, 0.0, 0.0]
            for counter, amount in zip(
                (self._calls, self._steps, self._seconds), ticks, strict=True
            ):
                if amount:
                    counter.increment(amount)
            if loras is None:
                return
            for name, total in lora_totals(loras).items():
                self._totals[name].increment(max(0, total - self._counted[name]))
                self._counted[name] = max(total, self._counted[name])
            for name, value in lora_states(loras).items():
                self._states[name].set(value)

    def _counter(self, name: str, description: str) -> Any:
        return self._metric(name, description, pb_utils.MetricFamily.COUNTER)

    def _gauge(self, name: str, description: str) -> Any:
        return self._metric(name, description, pb_utils.MetricFamily.GAUGE)

    def _metric(self, name: str, description: str, kind: Any) -> Any:
        family = pb_utils.MetricFamily(name=f"closeup_{name}", description=description, kind=kind)
        self._families.append(family)
        return family.Metric(labels=self._labels)


LORA_TOTALS = {
    "hits": "LoRA files answered from memory",
    "misses": "LoRA files read from disk",
    "evictions": "LoRA files dropped from memory for lack of room",
    "row_hits": "Requests whose LoRAs were resident in the bank",
    "row_misses": "Requests whose LoRAs had to be put into the bank",
}
LORA_STATES = {
    "held": "LoRA files in memory",
    "bytes": "Bytes of the LoRA files in memory",
    "rows": "Rows of the bank",
    "rows_resident": "Rows of the bank that hold LoRAs",
    "rows_in_use": "Rows of the bank that running requests use",
    "bank_bytes": "Bytes of the bank's arrays",
}


def lora_totals(loras: LoraCounters) -> dict[str, int]:
    """Return the value of each of `LORA_TOTALS`."""
    store, bank = loras.store, loras.bank
    return {
        "hits": store.hits,
        "misses": store.misses,
        "evictions": store.evictions,
        "row_hits": bank.hits,
        "row_misses": bank.misses,
    }


def lora_states(loras: LoraCounters) -> dict[str, int]:
    """Return the value of each of `LORA_STATES`."""
    store, bank = loras.store, loras.bank
    return {
        "held": store.held,
        "bytes": store.held_bytes,
        "rows": bank.rows,
        "rows_resident": bank.resident,
        "rows_in_use": bank.in_use,
        "bank_bytes": bank.array_bytes,
    }
