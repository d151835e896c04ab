"""The Triton model `<model>_denoiser`: `closeup.denoiser.Denoiser` behind late answers.

Non-decoupled: `execute` hands segments to the batcher's thread and returns; each answer is sent
when its segment is done.
"""

from __future__ import annotations

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
        self._metrics.slots(self._denoiser.slots_in_use)
        error = done.exception()
        if error is not None:
            reply.fail(error)
        else:
            reply.finish(done.result())


class _Metrics:
    """Counters on Triton's metrics endpoint."""

    def __init__(self, model: str) -> None:
        labels = {"model": model}

        def counter(name: str, description: str) -> Any:
            family = pb_utils.MetricFamily(
                name=name, description=description, kind=pb_utils.MetricFamily.COUNTER
            )
            self._families.append(family)
            return family.Metric(labels=labels)

        self._families: list[Any] = []
        self._calls = counter("closeup_engine_calls_total", "Denoiser engine calls")
        self._steps = counter("closeup_sequence_steps_total", "Denoising steps of sequences")
        self._seconds = counter("closeup_engine_seconds_total", "Seconds in the denoiser engine")
        gauge = pb_utils.MetricFamily(
            name="closeup_slots_in_use",
            description="Pictures in flight",
            kind=pb_utils.MetricFamily.GAUGE,
        )
        self._families.append(gauge)
        self._slots = gauge.Metric(labels=labels)

    def tick(self, sequences: int, seconds: float) -> None:
        self._calls.increment(1)
        self._steps.increment(sequences)
        self._seconds.increment(seconds)

    def slots(self, in_use: int) -> None:
        self._slots.set(in_use)
