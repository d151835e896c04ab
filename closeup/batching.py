"""Step-level continuous batching: one engine call does one step of many sequences.

Sequences may differ in everything but the shapes of their latents and of their context: sampler,
step, guidance, mask, LoRA. A new one joins at the next tick; one that has done its segment's
steps leaves. Nothing in the engine mixes rows, so what a sequence gets does not depend on its
batch mates beyond the rounding of differently shaped matrix products.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from closeup.errors import ModelError, UnavailableError

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array]], dict[str, Array]]


class LoraSource(Protocol):
    """Where the resident LoRA vectors are; see `closeup.lora_bank.LoraBank`."""

    def array(self, rows: Sequence[int]) -> Array:
        """Return the bank (S, M, r) in which these rows can be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """K steps of one sequence. Arrays are float32; shapes without a batch dimension.

    Attributes:
        sample: (C, h, w), in the sampler's space.
        memory: (2, C, h, w), the sampler's memory; slot 0 is the denoised estimate.
        context: (rows, L, D); rows is 1 (no guidance) or 2 (negative, prompt).
        guidance: scale s of ``negative + s * (prompt - negative)``; unused with one row.
        timestep: (K,) what the network is told.
        input_scale: (K,) factor of the network's input.
        step: (K, 3, 5) sampler matrices (see `closeup.samplers.StepTable`).
        noise: (K, C, h, w) or None for zeros.
        mask: (1 or K, 1, h, w) in [0, 1], 1 is repainted; None repaints everything.
        known: (C, h, w) what stays where the mask is 0; needed with a mask.
        known_noise: (C, h, w) the noise that brings `known` to a step's level.
        known_step: (K, 2) coefficients of known and known_noise after each step.
        lora_row: row of the LoRA bank, 0 for none.
        extras: the family's further inputs by network row: name -> (rows, ...).
    """

    sample: Array
    memory: Array
    context: Array
    guidance: float
    timestep: Array
    input_scale: Array
    step: Array
    noise: Array | None = None
    mask: Array | None = None
    known: Array | None = None
    known_noise: Array | None = None
    known_step: Array | None = None
    lora_row: int = 0
    extras: Mapping[str, Array] = field(default_factory=dict)

    @property
    def group(self) -> tuple[object, ...]:
        """Segments with equal groups can share an engine call."""
        extras = sorted((name, array.shape[1:]) for name, array in self.extras.items())
        return self.sample.shape, self.context.shape[1:], tuple(extras)


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentResult:
    """State after the segment: sample (C, h, w) and memory (2, C, h, w), float32."""

    sample: Array
    memory: Array


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
    sample: Array
    memory: Array
    future: Future[SegmentResult]
    group: tuple[object, ...]
    done: int = 0
    last_tick: int = -1


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
        running = _Running(
            segment=segment,
            sample=np.asarray(segment.sample, np.float32),
            memory=np.asarray(segment.memory, np.float32),
            future=Future(),
            group=segment.group,
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
        feeds = feeds_from_sequences(
            [running.segment for running in batch],
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
        if running.done == len(running.segment.timestep):
            self._leave(running)
            if running.future.set_running_or_notify_cancel():
                running.future.set_result(
                    SegmentResult(sample=np.array(sample), memory=np.array(memory))
                )

    def _fail(self, running: _Running, error: Exception) -> None:
        self.counters.failed_sequences += 1
        self._leave(running)
        if not running.future.done() and running.future.set_running_or_notify_cancel():
            running.future.set_exception(error)

    def _leave(self, running: _Running) -> None:
        with self._wake:
            self._active = [other for other in self._active if other is not running]


def feeds_from_sequences(
    segments: Sequence[Segment],
    *,
    samples: Sequence[Array],
    memories: Sequence[Array],
    steps: Sequence[int],
) -> dict[str, Array]:
    """Return the engine's inputs for one step of each sequence (the LoRA bank apart).

    Args:
        segments: B segments of one group.
        samples: their current latents, each (C, h, w).
        memories: their current sampler memory, each (2, C, h, w).
        steps: the row of its table that each takes now.

    Returns:
        Every input named in DESIGN's table, B sequences and R network rows.
    """
    rows_of = [len(segment.context) for segment in segments]
    rows = np.repeat(np.arange(len(segments)), rows_of)
    first = np.cumsum([0, *rows_of[:-1]])
    pairs = list(zip(segments, steps, strict=True))
    zeros = np.zeros_like(samples[0])
    ones = np.ones((1, *zeros.shape[1:]), np.float32)

    def at(arrays: Array | None, step: int, default: Array) -> Array:
        if arrays is None:
            return default
        chosen: Array = arrays[min(step, len(arrays) - 1)]
        return chosen

    def stacked(arrays: list[Array]) -> Array:
        # A sequence alone, the usual case of an idle server, needs no copy.
        joined = arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
        return np.ascontiguousarray(joined, np.float32)

    def stacked_rows(arrays: list[Array]) -> Array:
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return np.ascontiguousarray(joined, np.float32)

    feeds = {
        "sample": stacked(list(samples)),
        "memory": stacked(list(memories)),
        "noise": stacked([at(s.noise, k, zeros) for s, k in pairs]),
        "known": stacked([zeros if s.known is None else s.known for s in segments]),
        "known_noise": stacked([zeros if s.known_noise is None else s.known_noise
                                for s in segments]),
        "mask": stacked([at(s.mask, k, ones) for s, k in pairs]),
        "rows": rows.astype(np.int64),
        "timestep": np.array([s.timestep[k] for s, k in pairs], np.float32)[rows],
        "context": stacked_rows([s.context for s in segments]),
        "pick": np.stack([first + np.array(rows_of) - 1, first], 1).astype(np.int64),
        "guidance": np.array([_guidance(s) for s in segments], np.float32),
        "input_scale": np.array([s.input_scale[k] for s, k in pairs], np.float32),
        "step": stacked([s.step[k] for s, k in pairs]),
        "known_step": np.array([(0, 0) if s.known_step is None else s.known_step[k]
                                for s, k in pairs], np.float32),
        "lora_row": np.array([s.lora_row for s in segments], np.int64)[rows],
    }  # fmt: skip
    for name in segments[0].extras:
        joined = np.concatenate([segment.extras[name] for segment in segments])
        feeds[name] = np.ascontiguousarray(joined, np.float32)
    return feeds


def _guidance(segment: Segment) -> tuple[float, float]:
    if len(segment.context) == 1:
        return 1.0, 0.0
    return segment.guidance, 1.0 - segment.guidance
