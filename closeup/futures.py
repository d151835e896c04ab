"""Futures made of futures: the denoiser's operations end in whatever thread finishes them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from closeup.errors import UnavailableError

T = TypeVar("T")
S = TypeVar("S")


def finished(value: T) -> Future[T]:
    """Return a future that has its result."""
    answer: Future[T] = Future()
    answer.set_result(value)
    return answer


def mapped(future: Future[T], convert: Callable[[T], S]) -> Future[S]:
    """Return the future of ``convert(result)``.

    Args:
        future: cancelled, it stands for a server that shuts down: UnavailableError.
        convert: must not raise.
    """
    answer: Future[S] = Future()

    def finish(done: Future[T]) -> None:
        if answer.set_running_or_notify_cancel():  # else whoever asked has gone
            _settle(answer, done, convert)

    future.add_done_callback(finish)
    return answer


def chained(
    first: Future[T], then: Callable[[T], Future[S]], undo: Callable[[T], None]
) -> Future[S]:
    """Return the future of ``then(result)``, which starts when the first is done.

    Args:
        first: as in `mapped`.
        then: starts the second; may raise.
        undo: takes the first's result back where the second fails or nobody waits for it any
            more; must not raise.
    """
    answer: Future[S] = Future()

    def begin(done: Future[T]) -> None:
        if done.cancelled() or done.exception() is not None:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(_error_of(done))
            return
        value = done.result()
        try:
            second = then(value)
        except BaseException as error:
            second = Future()
            second.set_exception(error)
        second.add_done_callback(lambda done: end(value, done))

    def end(value: T, done: Future[S]) -> None:
        awaited = answer.set_running_or_notify_cancel()
        if not awaited or done.cancelled() or done.exception() is not None:
            undo(value)
        if awaited:
            _settle(answer, done, lambda result: result)

    first.add_done_callback(begin)
    return answer


def _settle(answer: Future[S], done: Future[T], convert: Callable[[T], S]) -> None:
    if done.cancelled() or done.exception() is not None:
        answer.set_exception(_error_of(done))
    else:
        answer.set_result(convert(done.result()))


def _error_of(done: Future[T]) -> BaseException:
    """The error of a future that has no result."""
    error = None if done.cancelled() else done.exception()
    return error or UnavailableError("the server is shutting down.")
