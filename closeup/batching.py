"""Step-level continuous batching: one engine call does one step of many sequences.

Sequences may differ in everything but the shapes of their latents and of their context: sampler,
step, guidance, mask, LoRA. A new one joins at the next tick; one that has done its segment's
steps leaves. Nothing in the engine mixes rows, so what a sequence gets does not depend on its
batch mates beyond the rounding of differently shaped matrix products.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from closeup.errors import ModelError, UnavailableError
from closeup.feeds import Segment, SequenceFeeds, join_feeds

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array]], dict[str, Array]]


class LoraSource(Protocol):
    """Where the resident LoRA vectors are; see `closeup.lora_bank.LoraBank`."""

    def array(self, rows: Sequence[int]) -> Array:
        """Return the bank (S, M, r) in which these rows can be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentResult:
    """State after the segment.

    Attributes:
        sample: (C, h, w) float32.
        memory: (2, C, h, w) float32.
        steps: how many were done, from 1 to K.
    """

    sample: Array
    memory: Array
    steps: int


@dataclass(kw_only=True)
class BatchCounters:
    """Totals since the start, written by the worker thread only.

    Attributes:
        engine_calls: ticks run.
        sequence_steps: steps of single sequences; more than engine_calls when calls are shared.
        engine_s: seconds inside the engine.
        largest_batch: most sequences in one call.
        failed_sequences: answered with an error.
    """

    engine_calls: int = 0
    sequence_steps: int = 0
    engine_s: float = 0.0
    largest_batch: int = 0
    failed_sequences: int = 0


@dataclass(kw_only=True, slots=True, eq=False)
class _Running:
    segment: Segment
    feeds: SequenceFeeds
    sample: Array
    memory: Array
    future: Future[SegmentResult]
    group: tuple[object, ...]
    due_s: float
    last_tick: int
    done: int = 0

    @property
    def is_over(self) -> bool:
        return self.done == len(self.segment.timestep) or time.monotonic() >= self.due_s


class StepBatcher:
    """The worker thread that owns the denoiser engine.

    Args:
        run: the engine, feeds -> outputs; called from the worker thread only.
        max_batch: sequences in one call.
        loras: the resident LoRA bank; None when the engine has no LoRA inputs.
        run_plain: the same engine without LoRA inputs, for calls in which no sequence uses any.
    """

    def __init__(
        self,
        run: Run,
        *,
        max_batch: int,
        loras: LoraSource | None = None,
        run_plain: Run | None = None,
    ) -> None:
        self.counters = BatchCounters()
        self._run = run
        self._max_batch = max_batch
        self._loras = loras
        self._run_plain = run_plain
        self._active: list[_Running] = []
        self._wake = threading.Condition()
        self._closed = False
        self._tick = 0
        self._thread = threading.Thread(target=self._work, name="denoiser", daemon=True)
        self._thread.start()

    def submit(self, segment: Segment) -> Future[SegmentResult]:
        """Queue a segment; it joins the batch at the next tick.

        Cancelling the future takes the sequence out at the next tick.

        Raises:
            UnavailableError: the batcher is closed.
        """
        budget_s = math.inf if segment.budget_s is None else segment.budget_s
        running = _Running(
            segment=segment,
            feeds=SequenceFeeds(segment),
            sample=np.ascontiguousarray(segment.sample, np.float32),
            memory=np.ascontiguousarray(segment.memory, np.float32),
            future=Future(),
            group=segment.group,
            due_s=time.monotonic() + budget_s,
            # A newcomer goes first, one that comes back queues: a sequence of slow steps comes
            # back after each, and two such would keep others out for good.
            last_tick=-1 if segment.is_first else self._tick,
        )
        with self._wake:
            if self._closed:
                raise UnavailableError("the denoiser is shutting down; try another server.")
            self._active.append(running)
            self._wake.notify()
        return running.future

    def close(self) -> None:
        """Stop the worker; sequences still running are answered with UnavailableError."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._drop_cancelled()
                while not self._active and not self._closed:
                    self._wake.wait()
                    self._drop_cancelled()
                if self._closed:
                    break
                batch = self._next_batch()
            try:
                self._step(batch)
            except BaseException as error:  # the thread must outlive any one batch
                log.exception("a denoising tick failed")
                for running in batch:
                    self._fail(running, ModelError(f"the denoising step failed: {error}"))
        for running in self._active:
            self._fail(running, UnavailableError("the server is shutting down."))

    def _drop_cancelled(self) -> None:
        self._active = [running for running in self._active if not running.future.cancelled()]

    def _next_batch(self) -> list[_Running]:
        """Those that have waited longest, of the shape of the first of them."""
        if len(self._active) == 1:
            return list(self._active)
        waiting = sorted(self._active, key=lambda running: running.last_tick)
        return [running for running in waiting if running.group == waiting[0].group][
            : self._max_batch
        ]

    def _step(self, batch: list[_Running]) -> None:
        for running in batch:
            running.last_tick = self._tick
        self._tick += 1
        try:
            outputs = self._timed_run(batch)
        except Exception as error:
            if len(batch) == 1:
                raise
            log.warning("an engine call of %d sequences failed, each runs alone: %s",
                        len(batch), error)  # fmt: skip
            for running in batch:
                self._step_alone(running)
            return
        for index, running in enumerate(batch):
            self._advance(running, outputs["next_sample"][index], outputs["next_memory"][index])

    def _step_alone(self, running: _Running) -> None:
        try:
            outputs = self._timed_run([running])
        except Exception as error:
            self._fail(running, ModelError(f"the denoising step failed: {error}"))
        else:
            self._advance(running, outputs["next_sample"][0], outputs["next_memory"][0])

    def _timed_run(self, batch: list[_Running]) -> dict[str, Array]:
        feeds = join_feeds(
            [running.feeds for running in batch],
            samples=[running.sample for running in batch],
            memories=[running.memory for running in batch],
            steps=[running.done for running in batch],
        )
        rows = [running.segment.lora_row for running in batch]
        run = self._run
        if self._loras is None or (self._run_plain is not None and not any(rows)):
            del feeds["lora_row"]
            run = self._run_plain or run
        else:
            feeds["lora"] = self._loras.array(rows)
        start = time.perf_counter()
        outputs = run(feeds)
        elapsed_s = time.perf_counter() - start
        self.counters.engine_calls += 1
        self.counters.sequence_steps += len(batch)
        self.counters.engine_s += elapsed_s
        self.counters.largest_batch = max(self.counters.largest_batch, len(batch))
        return outputs

    def _advance(self, running: _Running, sample: Array, memory: Array) -> None:
        if not (np.isfinite(sample).all() and np.isfinite(memory).all()):
            step = running.done + 1
            self._fail(
                running,
                ModelError(
                    f"the picture's latents are no longer finite after step {step} of the "
                    "segment: lower cfg_scale or the LoRA weights."
                ),
            )
            return
        running.sample, running.memory = sample, memory
        running.done += 1
        if running.is_over:
            self._leave(running)
            if running.future.set_running_or_notify_cancel():
                running.future.set_result(
                    SegmentResult(
                        sample=np.array(sample), memory=np.array(memory), steps=running.done
                    )
                )

    def _fail(self, running: _Running, error: Exception) -> None:
        self.counters.failed_sequences += 1
        self._leave(running)
        if not running.future.done() and running.future.set_running_or_notify_cancel():
            running.future.set_exception(error)

    def _leave(self, running: _Running) -> None:
        with self._wake:
            self._active = [other for other in self._active if other is not running]
