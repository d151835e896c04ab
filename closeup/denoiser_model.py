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

from closeup.denoiser import LEASE_MARGIN_S, Answer, Denoiser
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
        self._metrics.publish(self._denoiser.slots_in_use)  # the warm-up's

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
        self._metrics.publish(self._denoiser.slots_in_use)


class _Metrics:
    """Counters on Triton's metrics endpoint.

    Every change crosses to Triton's process, at a few tenths of a millisecond each, so ticks are
    summed here and published with the answers.
    """

    def __init__(self, model: str) -> None:
        self._lock = threading.Lock()
        self._pending = [0.0, 0.0, 0.0]
        self._families: list[Any] = []
        kind = pb_utils.MetricFamily.COUNTER
        self._counters = [
            self._metric(model, name, description, kind)
            for name, description in (
                ("closeup_engine_calls_total", "Denoiser engine calls"),
                ("closeup_sequence_steps_total", "Denoising steps of sequences"),
                ("closeup_engine_seconds_total", "Seconds in the denoiser engine"),
            )
        ]
        gauge = pb_utils.MetricFamily.GAUGE
        self._slots = self._metric(model, "closeup_slots_in_use", "Pictures in flight", gauge)

    def tick(self, sequences: int, seconds: float) -> None:
        """Count one engine call."""
        with self._lock:
            for index, amount in enumerate((1, sequences, seconds)):
                self._pending[index] += amount

    def publish(self, slots_in_use: int) -> None:
        """Bring Triton's counters up to date."""
        with self._lock:
            amounts, self._pending = self._pending, [0.0, 0.0, 0.0]
        if any(amounts):
            for counter, amount in zip(self._counters, amounts, strict=True):
                counter.increment(amount)
        self._slots.set(slots_in_use)

    def _metric(self, model: str, name: str, description: str, kind: Any) -> Any:
        family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
        self._families.append(family)
        return family.Metric(labels={"model": model})
