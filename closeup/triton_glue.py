"""What our Python models share inside Triton: answers that always come, and BLS calls.

Imported by model.py files only: `triton_python_backend_utils` exists inside Triton alone.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from closeup.errors import (
    CloseupError,
    DeadlineError,
    ModelError,
    RequestCancelled,
    RequestError,
    UnavailableError,
)
from closeup.fields import FIELD_BY_NAME
from closeup.run import Array

log = logging.getLogger(__name__)

_ERRORS: Mapping[str, type[CloseupError]] = {
    "UNAVAILABLE": UnavailableError,
    "CANCELLED": RequestCancelled,
    "INTERNAL": ModelError,
}
WATCH_INTERVAL_S = 1.0
_STOPPING = "Server not ready"
"""Triton's words for a call between models once it has been told to stop."""


def configure_logging() -> None:
    """Send this process's log records to Triton's log."""

    class TritonHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logger = pb_utils.Logger
            write = logger.log_error if record.levelno >= logging.ERROR else (
                logger.log_warn if record.levelno >= logging.WARNING else logger.log_info
            )  # fmt: skip
            write(self.format(record))

    root = logging.getLogger("closeup")
    root.handlers = [TritonHandler()]
    root.setLevel(logging.INFO)
    root.propagate = False


def request_inputs(request: Any) -> dict[str, Array]:
    """Copy a request's inputs: Triton frees them when `execute` returns."""
    return {tensor.name(): np.array(tensor.as_numpy(), copy=True) for tensor in request.inputs()}


def tensors_from(outputs: Mapping[str, Array]) -> list[Any]:
    """Return Triton tensors of numpy arrays; strings are object arrays of bytes."""
    return [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in outputs.items()]


def triton_error(error: BaseException) -> Any:
    """Return the error a client sees: its code, one sentence, never a traceback."""
    if isinstance(error, CloseupError):
        code, text = error.code, str(error)
        if code == CloseupError.code:
            log.error("a request failed: %s", text)
    else:
        reference = uuid.uuid4().hex[:12]
        log.error("error %s", reference, exc_info=error)
        code, text = "INTERNAL", f"the server failed; its log names the cause under {reference}."
    triton_code = getattr(pb_utils.TritonError, code, pb_utils.TritonError.INTERNAL)
    # What came out of a file may hold halves of characters, which Triton's module refuses.
    safe = text.encode("utf-8", "replace").decode()
    return pb_utils.TritonError(f"{code}: {safe}", triton_code)


class Reply:
    """Owns one response sender; the final answer is sent exactly once.

    Args:
        request: the Triton request.
        limit_s: after this the `Watchdog` answers in place of a stuck worker.
    """

    def __init__(self, request: Any, limit_s: float) -> None:
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._closed = False
        self.due_s = time.monotonic() + limit_s

    @property
    def cancelled(self) -> bool:
        """The client went away: gRPC cancel or deadline, or a closed stream."""
        return bool(self._sender.is_cancelled())

    @property
    def closed(self) -> bool:
        """The final answer was sent."""
        return self._closed

    def send_event(self, outputs: Mapping[str, Array]) -> None:
        """Send a response before the final one (decoupled models only)."""
        with self._lock:
            if not self._closed:
                self._sender.send(pb_utils.InferenceResponse(tensors_from(outputs)))

    def finish(self, outputs: Mapping[str, Array]) -> None:
        """Send the final answer, unless one was sent."""
        self._close(lambda: pb_utils.InferenceResponse(tensors_from(outputs)))

    def fail(self, error: BaseException) -> None:
        """Send an error as the final answer, unless one was sent."""
        self._close(lambda: pb_utils.InferenceResponse(error=triton_error(error)))

    def _close(self, response: Callable[[], Any]) -> None:
        """Send a response as the last one, or, where that fails, the news that it did."""
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        with self._lock:
            if self._closed:
                return
            try:
                self._sender.send(response(), flags=final)
            except Exception as error:  # no room in shared memory for the pictures, say
                failure = pb_utils.InferenceResponse(error=triton_error(error))
                self._sender.send(failure, flags=final)
            finally:
                self._closed = True


class Watchdog:
    """Answers what is older than its limit, so that nothing hangs a client or the shutdown."""

    def __init__(self) -> None:
        self._replies: set[Reply] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def guard(self, reply: Reply) -> Reply:
        """Watch a reply until it is closed."""
        with self._lock:
            self._replies.add(reply)
        return reply

    def close(self) -> None:
        """Answer whatever is still open and stop."""
        self._stop.set()
        self._thread.join()
        for reply in self._replies:
            reply.fail(UnavailableError("the server is shutting down."))

    def _watch(self) -> None:
        while not self._stop.wait(WATCH_INTERVAL_S):
            now_s = time.monotonic()
            with self._lock:
                self._replies = {reply for reply in self._replies if not reply.closed}
                late = [reply for reply in self._replies if now_s > reply.due_s]
            for reply in late:
                log.error("a request was answered by the watchdog")
                try:
                    reply.fail(DeadlineError("the request ran past the server's time limit."))
                except Exception:  # the others are waiting too
                    log.exception("an answer could not be sent")


class TritonModels:
    """`closeup.run.Models` over Triton's BLS.

    Every answer is asked for in CPU memory: the native backends else leave theirs on the GPU, which
    numpy cannot read, and this process would open a CUDA context for it.
    """

    async def infer(
        self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> dict[str, Array]:
        """Run a model of the repository.

        Raises:
            CloseupError: of the class that the model's error code names.
        """
        request = pb_utils.InferenceRequest(
            model_name=name,
            inputs=tensors_from(inputs),
            requested_output_names=list(outputs),
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = await request.async_exec()
        if response.has_error():
            raise error_from_message(name, response.error().message())
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}


def error_from_message(model: str, message: str) -> CloseupError:
    """Return the error that a model's message stands for.

    An engine that refuses its tensors refuses what this server made, not what the client sent:
    only what names a request field is the client's.
    """
    code, separator, text = message.partition(": ")
    field, _, sentence = text.partition(": ")
    if separator and code == RequestError.code and (field in FIELD_BY_NAME or field == "request"):
        return RequestError({field: sentence})
    if separator and code in _ERRORS:
        return _ERRORS[code](text)
    if message.endswith(_STOPPING):
        return UnavailableError("the server is shutting down; try another server.")
    return ModelError(f"the model {model} failed: {message}")
