"""One request on its way through the graph: its ticket, its progress, its clock."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from closeup.errors import CloseupError, ModelError, RequestCancelled
from closeup.request import Request
from closeup.segments import ACQUIRE, RELEASE

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
T = TypeVar("T")
log = logging.getLogger(__name__)

# A segment ends with the step that is under way after this time: one longer delays cancellation,
# one shorter costs calls. What its steps bring with them is bounded apart.
SEGMENT_S = 0.4
SEGMENT_BYTES = 4 << 20

COUNTERS = ("inference_cycles", "denoiser_steps", "faces_repainted")


class Models(Protocol):
    """Whatever can run the repository's models: Triton's BLS, or engines in this process."""

    async def infer(
        self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> dict[str, Array]:
        """Run one model.

        Args:
            name: of the Triton model.
            inputs: with the batch dimension where the model has one.
            outputs: names of the tensors wanted.

        Raises:
            CloseupError: the model's own error, with its class.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a request is.

    Attributes:
        stage: ``encode``, ``generate``, ``super_resolution``, ``hires_fix``, ``faces``.
        step: work done in this stage.
        steps: work of this stage (denoising steps over all pictures, tiles).
        elapsed_s: since the request was accepted.
        eta_s: expected seconds left in this stage; None before its first step is done.
        image: index of the picture in `preview`.
        preview: JPEG of the current denoised estimate.
    """

    stage: str
    step: int
    steps: int
    elapsed_s: float
    eta_s: float | None
    image: int | None = None
    preview: bytes | None = None


@dataclass(kw_only=True)
class Run:
    """State of one request while it runs.

    Attributes:
        request: what is wanted.
        models: what runs it.
        check: raises when the request was cancelled or is past its deadline; called before
            every engine call.
        report: takes progress events.
        segment_steps: steps a segment; None ends segments by time.
        timings_ms: stage -> wall milliseconds; stages do not overlap.
        usage: counters for billing: inference cycles (one a picture for its generation, its
            `hires_fix` and its face pass), denoising steps, faces.
        warnings: sentences for the client.
    """

    request: Request
    models: Models
    check: Callable[[], None]
    report: Callable[[Progress], None]
    segment_steps: int | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    warnings: list[str] = field(default_factory=list)
    ticket: int = 0
    started_s: float = field(default_factory=time.perf_counter)
    failed: bool = False
    _returning: asyncio.Future[None] | None = None
    _stage: str = ""
    _stage_started_s: float = 0.0
    _done: int = 0
    _total: int = 0

    async def infer(
        self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> dict[str, Array]:
        """`Models.infer`, unless the request is to stop."""
        if self.failed:
            raise RequestCancelled("another picture of the request failed.")
        self.check()
        return await self.models.infer(name, inputs, outputs)

    async def infer_floats(
        self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> dict[str, Floats]:
        """Return outputs of a model, float32.

        Raises:
            ModelError: some of their values are not finite; later stages would hide them.
        """
        return checked_floats(name, await self.infer(name, inputs, outputs), outputs)

    async def admit(
        self, encoding: Mapping[str, Array] | None = None, outputs: Sequence[str] = ()
    ) -> dict[str, Array]:
        """Take a ticket of the denoiser: slots for the pictures, the LoRAs resident.

        Args:
            encoding: prompts that the denoiser encodes on the same way (see `closeup.segments`).
            outputs: of the encoding.

        Returns:
            The answer, with the outputs.

        Raises:
            UnavailableError: no free slot.
            RequestError: a LoRA does not fit the model.
        """
        loras = json.dumps([[tag.id, tag.weight] for tag in self.request.loras])
        inputs = {
            **(encoding or {}),
            "operation": text_tensor(ACQUIRE),
            "slots": np.array([self.request.num_images], np.int64),
            "loras": text_tensor(loras),
        }
        answer = await self.infer(
            self.request.model.denoiser, inputs, ["ticket", "warnings", *outputs]
        )
        self.ticket = int(answer["ticket"][0])
        for sentence in json.loads(answer["warnings"][0]):
            self.warn(sentence)
        return answer

    @asynccontextmanager
    async def returning_ticket(self) -> AsyncIterator[None]:
        """Give the ticket that was taken inside the block back at its end.

        After a success only the way back is started, so that the files are made meanwhile:
        `ticket_returned` waits for it.
        """
        try:
            yield
        except BaseException:
            try:
                await self._release()
            except CloseupError:
                # What happened first is what the client should hear of.
                log.exception("a ticket could not be returned")
            raise
        self._returning = await start(self._release())

    async def ticket_returned(self) -> None:
        """Wait until the ticket is back; to be awaited before the client gets its answer."""
        if self._returning is not None:
            await self._returning

    async def _release(self) -> None:
        ticket, self.ticket = self.ticket, 0
        if ticket:
            inputs = {
                "operation": text_tensor(RELEASE),
                "ticket": np.array([ticket], np.int64),
            }
            await self.models.infer(self.request.model.denoiser, inputs, ["ticket"])

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[None]:
        """Time a stage and announce it.

        Args:
            name: see `Progress.stage`.
            steps: units of work it has.
        """
        self._stage, self._total, self._done = name, steps, 0
        self._stage_started_s = time.perf_counter()
        self._announce()
        try:
            yield
        finally:
            elapsed_s = time.perf_counter() - self._stage_started_s
            self.timings_ms[name] = self.timings_ms.get(name, 0.0) + 1000 * elapsed_s

    def extend(self, steps: int) -> None:
        """Add work to the current stage that was not known when it began."""
        self._total += steps

    def advance(
        self, steps: int, *, image: int | None = None, preview: bytes | None = None
    ) -> None:
        """Note finished work of the current stage and report it."""
        self._done += steps
        self._announce(image, preview)

    def segment_length(self, step_bytes: int) -> int:
        """Return how many steps of a sequence the next segment is given, at least 1.

        Args:
            step_bytes: of each step's noise and mask.
        """
        if self.segment_steps is not None:
            return self.segment_steps
        return max(1, SEGMENT_BYTES // max(1, step_bytes))

    def warn(self, sentence: str) -> None:
        """Add a sentence for the client, once."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a usage counter."""
        self.usage[name] += amount

    def _announce(self, image: int | None = None, preview: bytes | None = None) -> None:
        now_s = time.perf_counter()
        eta_s = None
        if self._done:
            eta_s = (now_s - self._stage_started_s) * (self._total - self._done) / self._done
        self.report(
            Progress(
                stage=self._stage,
                step=self._done,
                steps=self._total,
                elapsed_s=now_s - self.started_s,
                eta_s=eta_s,
                image=image,
                preview=preview,
            )
        )


async def together(run: Run, pictures: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Await the pictures' coroutines side by side and return their results in order.

    When one fails the others stop before their next engine call and are waited for, so that
    nothing of a failed request runs on.

    Raises:
        CloseupError: the first failure.
    """

    async def watched(coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return await coroutine
        except BaseException:
            run.failed = True
            raise

    results = await asyncio.gather(*map(watched, pictures), return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    for failure in failures:
        if not isinstance(failure, RequestCancelled):
            raise failure
    for failure in failures:
        raise failure
    return [result for result in results if not isinstance(result, BaseException)]


async def start(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start a coroutine and come back when it waits for an engine: what follows runs meanwhile."""
    task = asyncio.ensure_future(coroutine)
    await asyncio.sleep(0)
    return task


def checked_floats(
    name: str, answer: Mapping[str, Array], outputs: Sequence[str]
) -> dict[str, Floats]:
    """Return a model's outputs as float32.

    Args:
        name: of the model.
        answer: its outputs.
        outputs: those wanted.

    Raises:
        ModelError: some of their values are not finite.
    """
    for output in outputs:
        values = answer[output]
        # The smallest and the largest need no copy, and a NaN is passed on by both.
        if values.size and not np.isfinite([values.min(), values.max()]).all():
            raise ModelError(
                f"the output {output} of {name} holds values that are not finite: lower "
                "cfg_scale or the LoRA weights; if it stays, export the model in fp32."
            )
    return {output: np.asarray(answer[output], np.float32) for output in outputs}


def text_tensor(text: str) -> Array:
    """Return a one-element BYTES tensor."""
    return np.array([text.encode()], np.object_)
